"""A level as an ONNX model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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

    The model is run, by onnx, on an image of another size than that of the export, and compared with the network.

    Raises:
        ValueError: a wrong file, level or output, torch before 2.7, onnx or onnxscript is not installed, or torch's
            model is right at one size alone; the text says which.
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
    m = upscaler.multiple
    side = -(-8 // m) * m  # images with fewer pixels than this may be too small for a network
    example, other = (
        torch.rand(1, upscaler.channels, *sides, dtype=torch.float32, device='cpu')
        for sides in ((2 * side, 3 * side), (2 * side + m, 3 * side + 2 * m))
    )
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
        exported = onnx.load(path)
        found = exported.opset_import[0].version
        if opset not in (None, found):  # the exporter only logs that it could not convert
            raise OptionError('--opset', opset, f'{found}, or one that this onnx can convert it to')
        _check(exported, model.network, example, other)
        write_whole(output, path.read_bytes())
    return Exported(model.level, found, m)


@torch.no_grad()
def _check(exported: Any, network: nn.Module, example: Tensor, other: Tensor) -> None:
    """OptionError if the exported model is right for the example, but not for an image of another size.

    A size that the network computes with, as in ``F.adaptive_max_pool2d(x, (h // 8, w // 8))``, may have become a
    constant. A model with operations that onnx cannot run by itself is taken to be right.
    """
    reference = optional_package('onnx.reference', 'onnx')

    def is_right(image: Tensor) -> bool:
        expected = network(image).numpy()
        try:
            (found,) = reference.ReferenceEvaluator(exported).run(None, {'input': image.numpy()})
        except Exception:  # whatever onnx raises of operations and of shapes
            return False
        return found.shape == expected.shape and bool(abs(found - expected).max() <= 1e-3 * abs(expected).max())

    if is_right(example) and not is_right(other):
        sizes = ['x'.join(map(str, image.shape[:1:-1])) for image in (example, other)]
        raise OptionError(
            'backbone',
            type(network).__name__,
            f'one that torch exports for all sizes; its model is right for {sizes[0]} pixels, but not for {sizes[1]}',
        )
