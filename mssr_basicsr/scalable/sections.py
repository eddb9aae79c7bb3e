"""A level's section: which weights the level adds, and their values, as one Zstandard frame.

docs/format.md specifies the order of the frame's contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.frames import compress_parts, decompress
from mssr_basicsr.scalable.header import Header, TensorInfo
from mssr_basicsr.scalable.positions import Choice, coding_order, decode_positions, encode_positions, most_bytes
from mssr_basicsr.scalable.values import SCALE_DTYPE, TORCH_DTYPES, Planes, from_planes, split_planes, to_planes


@dataclass(frozen=True)
class Delta:
    """The contents of a section, checked in full; the values are only assembled on request."""

    counts: tuple[int, ...]  #: how many elements of each of Header.weights it adds
    choices: Mapping[int, Choice]  #: for each weight that it adds to, by number, which of its candidates
    planes: Planes  #: of the values, in the order of ``choices``
    dtype: torch.dtype  #: of the values
    scales: tuple[Tensor, ...]  #: in the first section of an I8 file: for each weight, bfloat16 (channels,)
    others: Mapping[str, Tensor]  #: in the first section: the tensors of Header.others

    def values(self) -> Iterator[tuple[int, Choice, Tensor]]:
        """For each weight that the level adds to: its number, which of its candidates, and their stored values."""
        start = 0
        for weight, choice in self.choices.items():
            end = start + self.counts[weight]
            yield weight, choice, from_planes(self.planes[:, start:end], self.dtype)
            start = end


def encode_section(
    chosen: Sequence[npt.NDArray[np.bool_]],
    values: Sequence[Tensor],
    first: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> bytes:
    """The frame of a level.

    Args:
        chosen: for each prunable weight, which of its candidates the level adds.
        values: for each prunable weight, the values that the level adds, 1-D, as stored.
        first: for the first section, the scales and the others, each in the header's order.
    """
    order = coding_order([int(which.sum()) for which in chosen], [which.size for which in chosen])
    scales, others = first or ((), ())
    parts = [encode_positions([chosen[i] for i in order])]
    for tensors in (scales, [values[i] for i in order], *_by_dtype(others)):
        parts += to_planes(torch.cat([tensor.flatten() for tensor in tensors])) if tensors else []
    return compress_parts(parts)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors of each type, types in the order in which they appear."""
    return [
        [tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors)
    ]


def decode_section(frame: bytes, header: Header, level: int) -> Delta:
    """The inverse of :func:`encode_section`.

    Raises:
        ScalableFileError: the frame does not hold exactly what the header says.
    """
    counts, candidates = header.section(level).counts, header.candidates(level)
    first = level == header.smallest_level
    dtype, scale_dtype = TORCH_DTYPES[header.dtype], TORCH_DTYPES[SCALE_DTYPE]
    channels = [weight.shape[0] for weight in header.weights] if first and header.dtype == 'I8' else []
    others = _by_name_of_dtype(header.others) if first else {}
    num_others = {name: sum(tensor.numel for tensor in tensors) for name, tensors in others.items()}
    size = sum(channels) * scale_dtype.itemsize + sum(counts) * dtype.itemsize
    size += sum(count * TORCH_DTYPES[name].itemsize for name, count in num_others.items())
    content = np.frombuffer(decompress(frame, most_bytes(counts, candidates) + size), np.uint8)

    order = coding_order(counts, candidates)
    choices, used = decode_positions(content, [counts[i] for i in order], [candidates[i] for i in order])
    rest = content[used:]
    if len(rest) != size:
        raise ScalableFileError(f'{len(rest):,} bytes after the positions; the header says {size:,}')
    scale_planes, rest = split_planes(rest, sum(channels), scale_dtype)
    scales = from_planes(scale_planes, scale_dtype)
    if not (scales.isfinite() & (scales >= 0)).all():
        raise ScalableFileError('scales: found one that is negative or not finite')
    planes, rest = split_planes(rest, sum(counts), dtype)
    tensors = {}
    for name, infos in others.items():
        other_planes, rest = split_planes(rest, num_others[name], TORCH_DTYPES[name])
        if name == 'BOOL' and other_planes.max(initial=0) > 1:
            raise ScalableFileError('others: a BOOL is neither 0 nor 1')
        parts = from_planes(other_planes, TORCH_DTYPES[name]).split([info.numel for info in infos])
        tensors.update({info.name: part.view(info.shape) for info, part in zip(infos, parts)})
    return Delta(
        counts=counts,
        choices={i: choice for i, choice in zip(order, choices) if counts[i]},
        planes=planes,
        dtype=dtype,
        scales=scales.split(channels) if channels else (),
        others=tensors,
    )


def _by_name_of_dtype(others: Sequence[TensorInfo]) -> dict[str, list[TensorInfo]]:
    return {name: [info for info in others if info.dtype == name] for name in dict.fromkeys(i.dtype for i in others)}


def scales_of_elements(scales: Tensor, indices: npt.NDArray[Any], numel: int) -> Tensor:
    """The float32 scale of each element of a weight of ``numel`` elements, given ascending flat ``indices``."""
    channels = len(scales)
    bounds = indices.searchsorted(np.arange(channels + 1) * (numel // max(1, channels)))
    return torch.from_numpy(scales.float().numpy().repeat(np.diff(bounds)))
