"""PSNR and SSIM as in published super-resolution results: on Y, without the border; grey files on their own values.

Set14's third image is a grey file. Published code takes such a file as Y. Code that converts it to RGB first compares Y
in 16 to 235 instead of 0 to 255, which adds 1.32 dB to that image and 0.094 dB to the set.
"""

from __future__ import annotations

import cv2
import numpy as np

from mssr_basicsr.scalable.pixels import Image, check_values, white, without_alpha

_Y = (24.966, 128.553, 65.481)  # ITU-R BT.601's weights of blue, green and red, for Y of 16 to 235
_GREY = (0.114, 0.587, 0.299)  # the same for a grey of 0 to 255


def published_metrics(image: Image, truth: Image, border: int, round_y: bool = False) -> dict[str, float]:
    """``psnr`` (dB) and ``ssim`` of an upscaled image; of equal images the PSNR is infinite, as BasicSR's.

    Args:
        image: (H, W) grey or (H, W, 3) BGR, from 0 to 255, of any dtype.
        truth: the same. If it is grey, it is Y itself, and a colour ``image`` is converted to grey.
        border: how many pixels to ignore at each edge; usually the upscaling factor.
        round_y: round Y to 8 bits, as older papers do (VDSR, FSRCNN). MATLAB's ``rgb2ycbcr`` does that to 8-bit images.

    Raises:
        ValueError: the sizes differ or are too small, or the truth is in colour and the image is not.
    """
    if image.shape[:2] != truth.shape[:2]:
        found, allowed = _size(truth.shape), _size(image.shape)
        raise ValueError(f'the ground truth: found {found} pixels; allowed: {allowed}, like the image')
    _require_alike(image.shape, truth.shape, border)
    planes = [_plane(picture, as_grey=truth.ndim == 2) for picture in (image, truth)]
    if round_y:
        planes = [plane.round() for plane in planes]
    height, width = truth.shape[:2]
    one, other = (plane[border : height - border, border : width - border] for plane in planes)
    return {'psnr': _psnr(one, other), 'ssim': _ssim(one, other)}


def metrics(image: Image, truth: Image, scale: int) -> dict[str, float]:
    """PSNR (dB) and SSIM of an upscaled picture, by :func:`published_metrics` with a border of ``scale`` pixels.

    Both are pixels as in :class:`Picture`, of any depth, each from black to white over its full range. Alpha is
    ignored. The truth is cropped to the image's size if it is less than ``scale`` larger, as its size need not be a
    multiple.

    Raises:
        ValueError: the image is grey and the truth in colour, the sizes do not fit, too little is left within the
            border, or :func:`check_values` rejects the truth's values.
    """
    check_truth(truth, image.shape, scale)
    image, truth = without_alpha(image), without_alpha(truth)[: image.shape[0], : image.shape[1]]
    one, other = (picture * (255 / white(picture.dtype)) for picture in (image, truth))
    return published_metrics(one, other, scale)


def check_truth(truth: Image, shape: tuple[int, ...], scale: int) -> None:
    """Raise the ValueError of :func:`metrics`, if any, knowing only the ``shape`` of the upscaled picture."""
    (height, width), (true_height, true_width) = shape[:2], truth.shape[:2]
    if not (0 <= true_height - height < scale and 0 <= true_width - width < scale):
        allowed = f'{_size(shape)}, like the upscaled image, or up to {scale - 1} more per side'
        raise ValueError(f'the ground truth: found {_size(truth.shape)} pixels; allowed: {allowed}')
    _require_alike(shape, (height, width, *truth.shape[2:]), scale)
    check_values(truth)


def smallest_side(border: int) -> int:
    """The smallest height and width that can be compared: SSIM's window has 11 pixels."""
    return 2 * border + 11


def _require_alike(shape: tuple[int, ...], true_shape: tuple[int, ...], border: int) -> None:
    if _is_colour(true_shape) and not _is_colour(shape):
        raise ValueError('the ground truth: found a colour image; allowed: a grey one, like the upscaled image')
    if min(true_shape[:2]) < smallest_side(border):
        found, least = _size(true_shape), smallest_side(border)
        raise ValueError(f'the ground truth: found {found} pixels; allowed: at least {least} per side')


def _is_colour(shape: tuple[int, ...]) -> bool:
    return shape[2:] in ((3,), (4,))


def _size(shape: tuple[int, ...]) -> str:
    return f'{shape[1]}x{shape[0]}'


def _plane(image: Image, as_grey: bool) -> Image:
    """The single float64 plane on which an image is compared."""
    if image.ndim == 2:
        return image.astype(np.float64)
    plane: Image = image.astype(np.float64) @ (np.array(_GREY) if as_grey else np.array(_Y) / 255)
    return plane if as_grey else plane + 16


def _psnr(one: Image, other: Image) -> float:
    error = np.square(one - other).mean()
    return float(10 * np.log10(255**2 / error)) if error else float('inf')


def _ssim(one: Image, other: Image) -> float:
    """Wang et al. 2004: Gaussian window of 11 x 11, sigma 1.5, where it fits in whole; K1 = 0.01, K2 = 0.03."""

    def local_mean(plane: Image) -> Image:
        smooth: Image = cv2.GaussianBlur(plane, (11, 11), 1.5)[5:-5, 5:-5]
        return smooth

    mean_1, mean_2 = local_mean(one), local_mean(other)
    variance_1, variance_2 = local_mean(one**2) - mean_1**2, local_mean(other**2) - mean_2**2
    covariance = local_mean(one * other) - mean_1 * mean_2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1**2 + mean_2**2 + c1)
    contrast_and_structure = (2 * covariance + c2) / (variance_1 + variance_2 + c2)
    return float((luminance * contrast_and_structure).mean())
