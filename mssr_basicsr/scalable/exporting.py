"""A level as an ONNX model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError, require_int
from mssr_basicsr.foundation.on_demand import MissingPackageError, optional_package
from mssr_basicsr.foundation.patching import replaced
from mssr_basicsr.foundation.saving import require_output, write_whole
from mssr_basicsr.scalable.model import ScalableModel


@contextmanager
def _without_log() -> Iterator[None]:
    """While the context is open, nothing is logged: the exporter reports each attempt."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


_type_as = Tensor.type_as


def _type_as_where_types_differ(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor.type_as(other)``, but without an operation where there is nothing to convert.

    BasicSR's EDSR and RCAN convert their mean colour with it; torch 2.8's exporter fails where the dtypes are equal.
    """
    return tensor if tensor.dtype == other.dtype else _type_as(tensor, other)


class Exported(NamedTuple):
    """What :func:`to_onnx` wrote."""

    level: int
    opset: int
    multiple: int  #: of which height and width of the input must be multiples


def to_onnx(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    level: int | None = None,
    opset: int | None = None,
    network: nn.Module | None = None,
) -> Exported:
    """Write a level as an ONNX model of any height and width: float32 RGB in [0, 1], (1, C, H, W).

    Args:
        source: a ``.mssr`` file.
        output: the file to write, completely or not at all; an existing one is overwritten.
        level: default: the largest in the file.
        opset: default: that of torch's exporter.
        network: as for :class:`ScalableModel`.

    Raises:
        ValueError: a wrong file, level or output, torch before 2.7, or onnx or onnxscript is not installed; the text
            says which.
        OSError: a file cannot be read or written.
    """
    require_output(output, source, option='--onnx')
    if Path(output).suffix != '.onnx':
        raise OptionError('--onnx', str(output), 'a name that ends in .onnx')
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 7):
        raise MissingPackageError('onnx: torch 2.7 or newer is needed: pip install "mssr-basicsr[onnx]"')
    onnx = optional_package('onnx', 'onnx')
    if opset is not None:
        require_int('--opset', opset, 1, onnx.defs.onnx_opset_version())
    optional_package('onnxscript', 'onnx')  # torch's exporter is written in it
    with ScalableModel(source, level, network=network, engine='torch') as model:
        upscaler = model.upscaler
    sides = (2 * max(8, upscaler.multiple), 3 * max(8, upscaler.multiple))
    example = torch.rand(1, upscaler.channels, *sides, dtype=torch.float32, device='cpu')
    converting = replaced(Tensor, 'type_as', _type_as_where_types_differ)
    with tempfile.TemporaryDirectory() as folder, _without_log(), converting:
        path = Path(folder, 'level.onnx')
        try:
            torch.onnx.export(
                model.network,
                (example,),
                path,
                input_names=['input'],
                output_names=['output'],
                dynamic_shapes=({2: 'height', 3: 'width'},),
                opset_version=opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            if opset is None:
                raise
            raise OptionError('--opset', opset, 'one that this torch can export the network to, or none') from error
        found = onnx.load(path).opset_import[0].version
        if opset not in (None, found):  # the exporter only logs that it could not convert
            raise OptionError('--opset', opset, f'{found}, or one that this onnx can convert it to')
        write_whole(output, path.read_bytes())
    return Exported(model.level, found, upscaler.multiple)
