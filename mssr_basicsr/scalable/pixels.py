"""Pixel values: uint8, uint16, and float32 from 0 (black) to 1 (white)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[Any]

_WHITE = {'uint8': 255, 'uint16': 65535, 'float32': 1}


def white(dtype: npt.DTypeLike) -> int:
    """The value of white."""
    return _WHITE[np.dtype(dtype).name]


def check_values(image: Image) -> None:
    """ValueError unless the values have one of the three types, and floats are between 0 and 1, or nearly.

    Overshoot from a filter such as bicubic resizing is accepted; 0 to 255 or the values of an HDR image are not.
    """
    if image.dtype.name not in _WHITE:
        raise ValueError(f'image: found {image.dtype} values; allowed: {", ".join(_WHITE)}')
    if image.dtype.name == 'float32' and image.size:  # of either byte order
        least, most = image.min(), image.max()
        if not (least >= -0.5 and most <= 1.5):  # nor NaN
            raise ValueError(f'image: found float32 values from {least:g} to {most:g}; allowed: 0 (black) to 1 (white)')


def to_depth(image: Image, dtype: npt.DTypeLike) -> Image:
    """The image converted to values of another type, rounded to the nearest."""
    if image.dtype == dtype:
        return image
    scaled = image * np.float32(white(dtype) / white(image.dtype))
    return scaled if np.dtype(dtype) == np.float32 else scaled.round().clip(0, white(dtype)).astype(dtype)


def without_alpha(image: Image) -> Image:
    """Only the colours or greys, (H, W) or (H, W, 3), including those of transparent pixels."""
    if image.ndim == 3 and image.shape[2] in (2, 4):
        return image[..., 0] if image.shape[2] == 2 else image[..., :3]
    return image


def as_colours(image: Image) -> Image:
    """Grey as three equal channels, keeping any alpha; colours unchanged."""
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return image[..., [0, 0, 0, 1]] if image.shape[2] == 2 else image
