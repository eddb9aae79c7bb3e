"""Quality of a file's levels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from mssr_basicsr.scalable.container import Source
from mssr_basicsr.scalable.images import list_images, skipped, validation_pairs
from mssr_basicsr.scalable.metrics import metrics
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
        warnings.warn(skipped(gt, passed_over), stacklevel=2)
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
