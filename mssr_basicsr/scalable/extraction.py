"""Extracting levels of a file: as a plain checkpoint, or as a smaller file. This does not need BasicSR by itself."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.on_demand import MissingPackageError
from mssr_basicsr.foundation.saving import require_output, write_whole
from mssr_basicsr.scalable.architectures import for_spandrel
from mssr_basicsr.scalable.building import tensors_of
from mssr_basicsr.scalable.container import ScalableFile, Source
from mssr_basicsr.scalable.model import ScalableModel

FORMATS = ('.pth', '.safetensors', '.mssr')


class FileTensors(ScalableModel):
    """A :class:`ScalableModel` of only the tensors in the file: it grows and shrinks, but cannot run."""

    def __init__(self, source: Source, level: int | None = None) -> None:
        super().__init__(source, level, engine='torch')

    def _prepare_network(self, network: nn.Module | None) -> nn.Module:
        return tensors_of(self.header, self.file.size or self.header.section(self._level).end)


class _StateTensors(FileTensors):
    """The same with the buffers that the architecture computes: if there are any, it is the backbone that is built."""

    def _prepare_network(self, network: nn.Module | None) -> nn.Module:
        if not self.header.computed:
            return super()._prepare_network(network)
        try:
            return ScalableModel._prepare_network(self, network).train()  # a checkpoint has nothing merged
        except MissingPackageError as error:
            what = f'{self.header.backbone["type"]} computes {self.header.computed[0]}, which is not in the file'
            raise MissingPackageError(f'{what}: {error}') from error


class Extracted(NamedTuple):
    """What :func:`extract` wrote."""

    levels: range
    bytes: int


def level_state(source: Source, level: int | None = None) -> dict[str, Tensor]:
    """The plain state dict of a level, which the unmodified backbone loads with ``strict=True``.

    Args:
        source: a path, or a binary stream positioned at the file's first byte.
        level: default: the largest in the file.

    Raises:
        ScalableFileError: the file is corrupted, or does not have this level.
        MissingPackageError: the architecture computes buffers (attention masks), which are not in the file, and BasicSR
            is not installed.
    """
    with _StateTensors(source, level) as model:
        return _detached(model)


def extract(
    source: str | os.PathLike[str], output: str | os.PathLike[str], level: int | None = None, spandrel: bool = False
) -> Extracted:
    """Write a level as a plain checkpoint, or that level and all smaller ones as a smaller ``.mssr``.

    Args:
        source: a ``.mssr`` file.
        output: ends in ``.pth`` (``{'params': state dict}``, as BasicSR's), ``.safetensors`` or ``.mssr``. An
            existing file is overwritten, completely or not at all.
        level: default: the largest in the file.
        spandrel: use the tensor names that spandrel expects.

    Raises:
        ValueError: a wrong file, level or output, or an architecture that spandrel lacks; the text says which.
        OSError: a file cannot be read or written.
    """
    suffix = Path(output).suffix
    if suffix not in FORMATS:
        raise OptionError('--output', str(output), 'a name that ends in .pth, .safetensors or .mssr')
    if spandrel and suffix == '.mssr':
        raise OptionError('--output', str(output), 'with --spandrel, a name that ends in .pth or .safetensors')
    require_output(output, source)
    if suffix == '.mssr':
        with ScalableFile(source) as file:
            smallest = file.header.smallest_level
            chosen = min(file.available(), default=smallest) if level is None else level
            data = file.read_prefix(chosen)
        with FileTensors(io.BytesIO(data), chosen):  # nothing corrupted is passed on
            levels = range(chosen, smallest + 1)
    else:
        with _StateTensors(source, level) as model:
            state = _detached(model)
            data = _checkpoint(for_spandrel(state, model.header.backbone) if spandrel else state, suffix)
            levels = range(model.level, model.level + 1)
    write_whole(output, data)
    return Extracted(levels, len(data))


def _detached(model: ScalableModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.network.state_dict().items()}


def _checkpoint(state: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == '.safetensors':
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    buffer = io.BytesIO()
    torch.save({'params': state}, buffer)
    return buffer.getvalue()


def verify(source: Source) -> dict[str, Any]:
    """Read, decode and place every section that is present, and check it against its checksum.

    Returns:
        JSON values: ``file``, the ``levels`` present, whether it is ``whole``, how many ``bytes`` these levels take,
        and ``unusable_bytes``, the number of bytes after the last complete section.

    Raises:
        ScalableFileError: something is corrupted, or the smallest level is missing. Of a stream that cannot seek, any
            missing level is an error, since its length, which would tell how far the file goes, is unknown.
    """
    with FileTensors(source) as model:
        file, level = model.file, model.level
        unusable = file.bytes_after(level)
    return {
        'file': file.name,
        'levels': [*range(level, file.header.smallest_level + 1)],
        'whole': level == 0,
        'bytes': file.header.section(level).end,
        'unusable_bytes': unusable,
    }
