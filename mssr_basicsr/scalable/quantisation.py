"""Weights as 8-bit integers with one scale per output channel, the same integers at every level.

Rounding every weight to the nearest integer makes errors add up, which brightens or darkens flat areas. So, as in
SQuant (Guo et al., ICLR 2022), some weights are rounded the other way, starting with those closest to the middle
between two integers, until the errors of each kernel, and of each output channel, sum to at most half a step. Levels
are processed from the smallest on, and none changes a weight of a smaller one, so this holds at every level.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LARGEST = 127
# A scale's fraction has 4 bits, of the 7 that bfloat16 has: it becomes 6 % larger at most, and takes half a byte less.
_FRACTION = 16

Floats = npt.NDArray[np.float64]


def quantise(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` as integers from -127 to 127, int8 of its shape, and their scales, bfloat16 (C,), never 0.

    The stored weight is the product of both, which is exact in float32.

    Args:
        weight: float32 (C, ...), all finite; C is the number of scales, the output channels of a convolution.
        levels: its level map, of the same shape.
    """
    if weight.numel() == 0:
        return weight.to(torch.int8), torch.ones(len(weight), dtype=torch.bfloat16, device='cpu')
    channels = weight.double().reshape(len(weight), -1).numpy()
    scales = _scales(np.abs(channels).max(1))
    kernels = weight.shape[1] if weight.dim() > 1 else 1
    exact = (channels / scales[:, None]).reshape(len(weight), kernels, -1)
    rounded = np.rint(exact).clip(-_LARGEST, _LARGEST)
    level_of = levels.numpy().reshape(exact.shape)
    for level in np.unique(level_of)[::-1]:
        present, movable = level_of >= level, level_of == level
        _settle_kernels(rounded, exact, present, movable)
        _settle_channels(rounded, exact, present, movable)
    integers = torch.from_numpy(rounded.astype(np.int8)).reshape(weight.shape)
    return integers, torch.from_numpy(scales).to(torch.bfloat16)


def _scales(largest: Floats) -> Floats:
    """For each channel, the smallest scale with a short fraction that reaches its largest magnitude with 127."""
    fraction, exponent = np.frexp(np.maximum(largest / _LARGEST, 2.0**-120))
    scales: Floats = np.ldexp(np.ceil(fraction * 2 * _FRACTION) / (2 * _FRACTION), exponent)
    return scales


def _settle_kernels(
    rounded: Floats, exact: Floats, present: npt.NDArray[np.bool_], movable: npt.NDArray[np.bool_]
) -> None:
    """Move weights by a step until each kernel's errors (the last axis) sum to at most half a step, if possible."""
    error = np.where(present, rounded - exact, 0.0)
    total = error.sum(-1, keepdims=True)
    direction = np.sign(total)
    gain = _gain(rounded, error, direction, movable)
    rank = (-gain).argsort(-1, kind='stable').argsort(-1, kind='stable')
    rounded -= direction * ((rank < np.rint(np.abs(total))) & (gain > 0))


def _settle_channels(
    rounded: Floats, exact: Floats, present: npt.NDArray[np.bool_], movable: npt.NDArray[np.bool_]
) -> None:
    """The same for each output channel, moving at most one weight of each kernel."""
    error = np.where(present, rounded - exact, 0.0)
    total = error.sum((1, 2), keepdims=True)
    direction = np.sign(total)
    gain = _gain(rounded, error, direction, movable)
    best = gain.argmax(-1)[..., None]
    best_gain = np.take_along_axis(gain, best, -1)
    rank = (-best_gain).argsort(1, kind='stable').argsort(1, kind='stable')
    moved = (rank < np.rint(np.abs(total))) & (best_gain > 0)
    np.put_along_axis(rounded, best, np.take_along_axis(rounded, best, -1) - direction * moved, -1)


def _gain(rounded: Floats, error: Floats, direction: Floats, movable: npt.NDArray[np.bool_]) -> Floats:
    """How far each weight already is on the side of ``direction``; below 0 where it cannot be moved back."""
    possible = movable & (np.abs(rounded - direction) <= _LARGEST)
    return np.where(possible, error * direction, -1.0)
