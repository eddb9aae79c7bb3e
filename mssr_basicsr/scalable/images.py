"""Image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mssr_basicsr.foundation.saving import write_whole
from mssr_basicsr.scalable.evaluation import published_metrics

Image = npt.NDArray[Any]

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.tif', '.tiff')


def list_images(path: Path) -> list[Path]:
    """The file itself, or a folder's image files in order of their names; ValueError if there is none."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f'{path}: no images ({", ".join(SUFFIXES)}) there')
    return found


def read_image(path: Path) -> Image:
    """As in the file: (H, W) or (H, W, C), uint8 or uint16, BGR(A). ValueError if it is no image."""
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if path.stat().st_size else None
    if image is None:
        raise ValueError(f'{path}: not an image that OpenCV can read')
    return image


def write_image(path: Path, image: Image) -> None:
    """Write a file whose suffix says the format; it is there whole or not at all."""
    done, data = cv2.imencode(path.suffix, image)
    if not done:
        raise ValueError(f'{path}: OpenCV cannot write {image.dtype} {image.shape} so')
    write_whole(path, data.tobytes())


def metrics(image: Image, truth: Image, scale: int) -> dict[str, float]:
    """PSNR (dB) and SSIM as published, by :func:`published_metrics`, ``scale`` pixels of border left out.

    Both are grey or BGR, uint8. The truth is cut to the image's size: its own may have been no multiple of the scale.
    """
    height, width = image.shape[:2]
    if truth.ndim != image.ndim or min(np.subtract(truth.shape, image.shape)) < 0:
        raise ValueError(f'the ground truth has shape {truth.shape}, the upscaled image {image.shape}')
    return published_metrics(image, truth[:height, :width], scale)


def resize_bicubic(image: Image, factor: float) -> Image:
    """A uint8 image resized by BasicSR's ``imresize`` (MATLAB's bicubic), and rounded to uint8 again."""
    from mssr_basicsr.adapter.discovery import load_basicsr

    load_basicsr()
    from basicsr.utils.matlab_functions import imresize

    resized: Image = (imresize(image / 255.0, factor) * 255.0).round().clip(0, 255).astype(np.uint8)
    return resized


def read_to_evaluate(path: Path) -> Image:
    """A grey file as (H, W), any other as (H, W, 3) BGR; uint8. ValueError if it is none that OpenCV can read."""
    stored = cv2.imread(os.fspath(path), cv2.IMREAD_UNCHANGED)
    image = stored if stored is None or stored.ndim == 2 else cv2.imread(os.fspath(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f'{path}: not an image that OpenCV can read')
    if image.dtype != np.uint8:
        raise ValueError(f'{path}: found {image.dtype} pixels; allowed: 8 bits a channel')
    return image


def validation_pairs(gt: Path, lq: Path | None, scale: int) -> Iterator[tuple[Image, Image]]:
    """For each image in the folder ``gt``, (LR, ground truth cut to a multiple of the scale): both grey, or both BGR.

    The LR image is the one of the same name in ``lq``, or made by :func:`resize_bicubic`.
    """
    for file in list_images(gt):
        truth = read_to_evaluate(file)
        height, width = (size - size % scale for size in truth.shape[:2])
        truth = truth[:height, :width]
        if lq is None:
            yield resize_bicubic(truth, 1 / scale), truth
            continue
        if not (lq / file.name).is_file():
            raise ValueError(f'{lq / file.name}: the LR image of {file} is not there')
        small = read_to_evaluate(lq / file.name)
        yield small if small.ndim == truth.ndim else small[..., 0], truth
