"""Quality of a file's levels: on which pairs of images it is measured, and how."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mssr_basicsr.foundation.on_demand import require_basicsr
from mssr_basicsr.scalable.container import Source
from mssr_basicsr.scalable.images import list_images, read_eight_bits, skipped_message
from mssr_basicsr.scalable.metrics import metrics, smallest_side
from mssr_basicsr.scalable.model import ScalableModel
from mssr_basicsr.scalable.pixels import Image


def evaluate(
    source: Source, gt: str | os.PathLike[str], lq: str | os.PathLike[str] | None = None
) -> dict[str, dict[str, float]]:
    """PSNR (dB) and SSIM on Y of every level in the file: by level (as a string), means over a folder of images.

    A warning names what else is in the folder.

    Args:
        source: a ``.mssr`` file or stream.
        gt: the folder of ground-truth images.
        lq: the folder of their LR images, with the same names; default: made from the ground truth by bicubic.

    Raises:
        ValueError: a wrong file or image; the text says which.
        OSError: a file cannot be read.
    """
    passed_over = list_images(gt)[1]
    if passed_over:
        warnings.warn(skipped_message(gt, passed_over), stacklevel=2)
    with ScalableModel(source) as model:
        return evaluate_on(list(validation_pairs(gt, lq, model.header.scale)), model)


def evaluate_on(pairs: Sequence[tuple[Image, Image]], model: ScalableModel) -> dict[str, dict[str, float]]:
    """The same of a model at its largest level, on pairs of LR image and ground truth; it is left at its smallest."""
    found = {}
    for level in range(model.level, model.header.smallest_level + 1):
        model.shrink(level)
        results = [metrics(model.upscale(small, bgr=True), truth, model.header.scale) for small, truth in pairs]
        found[str(level)] = {key: sum(result[key] for result in results) / len(results) for key in results[0]}
    return found


def resize_bicubic(image: Image, factor: float) -> Image:
    """A uint8 image resized with BasicSR's ``imresize`` (MATLAB's bicubic) and rounded to uint8."""
    require_basicsr('to resize as MATLAB does')
    from basicsr.utils.matlab_functions import imresize

    resized: Image = (imresize(image / 255.0, factor) * 255.0).round().clip(0, 255).astype(np.uint8)
    return resized


def validation_pairs(
    gt: str | os.PathLike[str], lq: str | os.PathLike[str] | None, scale: int
) -> Iterator[tuple[Image, Image]]:
    """For each image in the folder ``gt``: (LR, ground truth cropped to a multiple of the scale), both grey or BGR.

    The LR image is the one with the same name in ``lq``, or made by :func:`resize_bicubic`.

    Raises:
        ValueError: an image cannot be read or is too small to be compared, or an LR image is missing, or does not fit
            its ground truth; the text names the file, or both.
    """
    least = -(-smallest_side(scale) // scale) * scale
    for file in list_images(gt)[0]:
        truth = read_eight_bits(file)
        if min(truth.shape[:2]) < least:
            found = f'{truth.shape[1]}x{truth.shape[0]}'
            raise ValueError(f'{file}: found {found} pixels; allowed: at least {least} per side, to be compared')
        height, width = (size - size % scale for size in truth.shape[:2])
        truth = truth[:height, :width]
        if lq is None:
            yield resize_bicubic(truth, 1 / scale), truth
            continue
        lr_file = Path(lq, file.name)
        if not lr_file.is_file():
            raise ValueError(f'{lr_file}: the LR image of {file} is missing')
        small = read_eight_bits(lr_file)
        if truth.ndim > small.ndim:
            raise ValueError(f'{lr_file}: found a grey image; allowed: a colour one, like {file}')
        if small.shape[:2] != (height // scale, width // scale):
            found, allowed = f'{small.shape[1]}x{small.shape[0]}', f'{width // scale}x{height // scale}'
            raise ValueError(f'{lr_file}: found {found} pixels; allowed: {allowed}, like {file} / {scale}')
        yield small if small.ndim == truth.ndim else small[..., 0], truth
