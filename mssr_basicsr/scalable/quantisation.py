"""Weights as integers of 8 bits with one scale per output channel, the same integers at every level.

Rounding every weight to the nearest integer leaves sums of errors, which brighten or darken flat areas. So, as in
SQuant (Guo et al., ICLR 2022), some weights are rounded the other way, those first that lie nearest to the middle of
two integers, until the errors of each kernel, and of each output channel, sum up to half a step at most. Levels take
their turns, smallest first, and none changes a weight of a smaller one: this holds at every level.
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

    The weight that the file holds is the product of both, which is exact in float32.

    Args:
        weight: float32 (C, ...), all of it finite; C is a scale's reach, the output channels of a convolution.
        levels: its level map, of the same shape.
    """
    if weight.numel() == 0:
        return weight.to(torch.int8), torch.ones(len(weight), dtype=torch.bfloat16)
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
    """For each channel's largest magnitude, the smallest scale of a short fraction that 127 of reach it."""
    fraction, exponent = np.frexp(np.maximum(largest / _LARGEST, 2.0**-120))
    scales: Floats = np.ldexp(np.ceil(fraction * 2 * _FRACTION) / (2 * _FRACTION), exponent)
    return scales


def _settle_kernels(
    rounded: Floats, exact: Floats, present: npt.NDArray[np.bool_], movable: npt.NDArray[np.bool_]
) -> None:
    """Move weights by a step until the errors of each kernel (the last axis) sum up to half a step, if they can."""
    error = np.where(present, rounded - exact, 0.0)
    total = error.sum(-1, keepdims=True)
    direction = np.sign(total)
    gain = _gain(rounded, error, direction, movable)
    rank = (-gain).argsort(-1, kind='stable').argsort(-1, kind='stable')
    rounded -= direction * ((rank < np.rint(np.abs(total))) & (gain > 0))


def _settle_channels(
    rounded: Floats, exact: Floats, present: npt.NDArray[np.bool_], movable: npt.NDArray[np.bool_]
) -> None:
    """The same for each output channel, at most one weight of each kernel being moved."""
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
