"""The positions of a section's weights, coded close to their entropy.

A level takes some of the weights that no smaller level has. In each layer these candidates are numbered in the order of
the flattened weight, and which of them are chosen is encoded in bytes:

- all or none: nothing;
- less than a quarter: the distance of each from the previous one; more than three quarters: the same for the others;
- otherwise: one bit per candidate, 1 if it is chosen, the first in the highest bit.

The bytes then go through a Huffman code (see ``frames.py``). If weights are chosen independently, the
distances are geometrically distributed and groups of eight bits are nearly uniform; for both, such a code is close to
the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np
import numpy.typing as npt

from mssr_basicsr.scalable.errors import ScalableFileError

Indices = npt.NDArray[np.intp]
#: Which candidates of a layer are chosen: their ascending numbers; a bool for each candidate, which takes less memory
#: where they are many; or all.
Choice = Union[Indices, npt.NDArray[np.bool_], slice]

# As a distance this byte says: 255 further, and no position there.
_SKIP = 255


def coding_order(counts: Sequence[int], candidates: Sequence[int]) -> list[int]:
    """The layers' indices from the sparsest to the densest choice, so that neighbours share a Huffman table well."""
    share = [min(count, n - count) / n if n else 0.0 for count, n in zip(counts, candidates)]
    return sorted(range(len(share)), key=lambda i: (share[i], i))


def choose(candidates: Indices, choice: Choice) -> Indices:
    """The candidates that are chosen."""
    if isinstance(choice, slice):
        return candidates
    # A random mask as an index would take several times as long: numpy finds what is not zero without branches.
    return candidates.take(choice.nonzero()[0] if choice.dtype == np.bool_ else choice)


def encode_positions(chosen: Sequence[npt.NDArray[np.bool_]]) -> bytes:
    """Which candidates are chosen, one bool array a layer; layers in any order that the reader knows."""
    return b''.join(_write(which) for which in chosen)


def _write(which: npt.NDArray[np.bool_]) -> bytes:
    count, n = int(which.sum()), which.size
    if not _as_distances(count, n):
        return np.packbits(which).tobytes()
    positions = np.flatnonzero(which if 2 * count < n else ~which)
    distances = np.diff(positions, prepend=0)
    skips = distances // _SKIP
    steps = np.full(len(distances) + int(skips.sum()), _SKIP, np.uint8)
    steps[np.cumsum(skips + 1) - 1] = distances % _SKIP
    return steps.tobytes()


def _as_distances(count: int, n: int) -> bool:
    return 4 * min(count, n - count) < n or n == 0


def decode_positions(
    written: npt.NDArray[np.uint8], counts: Sequence[int], candidates: Sequence[int]
) -> tuple[list[Choice], int]:
    """Which candidates of each layer are chosen, ``counts[i]`` of ``candidates[i]``; and the number of bytes read.

    Args:
        written: the output of :func:`encode_positions`; more may follow.

    Raises:
        ScalableFileError: ``written`` does not encode such a choice.
    """
    choices: list[Choice] = []
    start = 0
    for count, n in zip(counts, candidates):
        part = written[start : start + most_bytes([count], [n])]
        if _as_distances(count, n):
            stated = min(count, n - count)
            positions, used = _read_distances(part, stated)
            if stated and positions[-1] >= n:
                raise ScalableFileError(f'positions: the last of a layer is {positions[-1]}, it has {n} candidates')
            choices.append(positions if stated == count else _all_but(positions, n))
        else:
            bits, used = np.unpackbits(part).view(np.bool_), len(part)
            if len(bits) < n or bits[n:].any() or np.count_nonzero(bits) != count:
                raise ScalableFileError(f'positions: a layer does not have {count} of {n}, as the header says')
            choices.append(bits[:n])
        start += used
    return choices, start


def most_bytes(counts: Sequence[int], candidates: Sequence[int]) -> int:
    """The maximum number of bytes for the positions of so many candidates."""
    return sum(
        min(count, n - count) + n // _SKIP if _as_distances(count, n) else (n + 7) // 8
        for count, n in zip(counts, candidates)
    )


def _read_distances(written: npt.NDArray[np.uint8], stated: int) -> tuple[Indices, int]:
    """The positions given by ``stated`` distances, and the number of bytes of these."""
    steps, used = written[:stated], stated
    is_stop = steps != _SKIP
    if not is_stop.all():
        stops = np.flatnonzero(written != _SKIP)[:stated]
        used = int(stops[-1]) + 1 if len(stops) else 0
        steps, is_stop = written[:used], written[:used] != _SKIP
    positions: Indices = steps.cumsum(dtype=np.intp)
    if used > stated:
        positions = positions[is_stop]
    if len(positions) != stated or not (steps[1:].all() or (np.diff(positions) > 0).all()):
        raise ScalableFileError(f'positions: found {len(positions)}; the header says {stated}, in ascending order')
    return positions, used


def _all_but(positions: Indices, n: int) -> Choice:
    if not len(positions):
        return slice(None)
    rest = np.ones(n, np.bool_)
    rest[positions] = False
    return rest
