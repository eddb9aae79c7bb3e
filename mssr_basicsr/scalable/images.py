"""Image files, and how good upscaled ones are by the field's protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mssr_basicsr.foundation.on_demand import load_basicsr
from mssr_basicsr.foundation.saving import write_whole

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
    """PSNR (dB) and SSIM on the Y channel, ``scale`` pixels of border left out, by BasicSR's functions.

    Both are BGR uint8. The truth is cut to the image's size: its own may have been no multiple of the scale.
    """
    load_basicsr('to measure PSNR and SSIM')
    from basicsr.metrics import calculate_psnr, calculate_ssim

    height, width = image.shape[:2]
    if truth.ndim != image.ndim or min(np.subtract(truth.shape, image.shape)) < 0:
        raise ValueError(f'the ground truth has shape {truth.shape}, the upscaled image {image.shape}')
    images = [picture.astype(np.uint8) for picture in (image, truth[:height, :width])]
    return {
        'psnr': float(calculate_psnr(*images, crop_border=scale, test_y_channel=image.ndim == 3)),
        'ssim': float(calculate_ssim(*images, crop_border=scale, test_y_channel=image.ndim == 3)),
    }


def resize_bicubic(image: Image, factor: float) -> Image:
    """A uint8 image resized by BasicSR's ``imresize`` (MATLAB's bicubic), and rounded to uint8 again."""
    load_basicsr('to resize as MATLAB does')
    from basicsr.utils.matlab_functions import imresize

    resized: Image = (imresize(image / 255.0, factor) * 255.0).round().clip(0, 255).astype(np.uint8)
    return resized


def validation_pairs(gt: Path, lq: Path | None, scale: int) -> Iterator[tuple[Image, Image]]:
    """For each image in the folder ``gt``, (LR, ground truth) in BGR uint8.

    The LR image is the one of the same name in ``lq``, or made by :func:`resize_bicubic`.
    """
    for file in list_images(gt):
        truth = cv2.imread(os.fspath(file), cv2.IMREAD_COLOR)
        if truth is None:
            raise ValueError(f'{file}: not an image that OpenCV can read')
        height, width = (size - size % scale for size in truth.shape[:2])
        truth = truth[:height, :width]
        if lq is None:
            yield resize_bicubic(truth, 1 / scale), truth
        else:
            small = cv2.imread(os.fspath(lq / file.name), cv2.IMREAD_COLOR)
            if small is None:
                raise ValueError(f'{lq / file.name}: the LR image of {file} is not there')
            yield small, truth
