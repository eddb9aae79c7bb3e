"""The values of a section: elements of one type as byte planes; those with exponents compress.

All elements' most significant bytes come first, then all their next ones, and so on. The sign of a float, which is
random, goes behind its fraction, so that the exponent has the first plane of float32 and bfloat16 to itself. In trained
weights that plane compresses to a third; the others are noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mssr_basicsr.scalable.header import DTYPES

#: By their names in a file.
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, of_torch) for name, of_torch in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
#: The type of the scales of ``I8`` weights: its product with an integer of 8 bits is exact in float32.
SCALE_DTYPE = 'BF16'

Planes = npt.NDArray[np.uint8]


def to_planes(values: Tensor) -> list[bytes]:
    """The byte planes of a 1-D tensor, the most significant first."""
    elements = values.contiguous().view(torch.uint8).numpy()
    if values.is_floating_point():
        words = elements.view(f'<u{values.element_size()}')
        elements = ((words << 1) | (words >> (8 * words.itemsize - 1))).view(np.uint8)
    rows = elements.reshape(len(values), values.element_size())
    return [rows[:, place].tobytes() for place in range(values.element_size())][::-1]


def from_planes(planes: Planes, dtype: torch.dtype) -> Tensor:
    """The 1-D tensor whose byte planes are the rows of ``planes``, as a copy."""
    values = torch.empty(planes.shape[1], dtype=dtype, device='cpu')
    words = values.view(torch.uint8).numpy().view(f'u{dtype.itemsize}')
    words[:] = planes[0]
    for plane in planes[1:]:
        words <<= 8
        words |= plane
    if dtype.is_floating_point:
        signs = words << (8 * dtype.itemsize - 1)
        words >>= 1
        words |= signs
    return values


def split_planes(content: Planes, count: int, dtype: torch.dtype) -> tuple[Planes, Planes]:
    """The planes of ``count`` elements at the start of ``content``, and what comes after them; neither is a copy."""
    size = count * dtype.itemsize
    return content[:size].reshape(dtype.itemsize, count), content[size:]
