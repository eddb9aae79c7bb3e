"""Where the weights of a section belong: positions coded close to their entropy.

A level takes some of the weights that no smaller level has. In each layer these candidates are numbered in the order of
the flattened weight, and which of them are chosen is written in bytes:

- all or none: nothing;
- less than a quarter: the distance of each to the one before; more than three quarters: the same of the others;
- else: one bit for each candidate, 1 where it is chosen, the first in the highest bit.

The bytes go through the Huffman code of Zstandard (RFC 8878). Of weights that are chosen independently, the distances
follow a geometric distribution and eight bits are near uniform; for both, such a code is close to the entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from mssr_basicsr.scalable.errors import ScalableFileError

Indices = npt.NDArray[np.intp]

# As a distance this byte says: 255 further, and no position there.
_SKIP = 255
# A Huffman table is for one block, and layers differ in their density: short blocks follow that, each at some 50 bytes.
_BLOCK = 16384


def coding_order(counts: Sequence[int], candidates: Sequence[int]) -> list[int]:
    """The layers' indices from the sparsest to the densest choice, so that neighbours share a Huffman table well."""
    share = [min(count, n - count) / n if n else 0.0 for count, n in zip(counts, candidates)]
    return sorted(range(len(share)), key=lambda i: (share[i], i))


def entropy_bound(counts: Sequence[int], candidates: Sequence[int]) -> float:
    """The bytes below which no code can get that knows of each layer only how many of its candidates are chosen.

    ``counts[i]`` of ``candidates[i]``, in any order: the sum of n * H(count / n) over the layers, in bytes.
    """
    bits = 0.0
    for count, n in zip(counts, candidates):
        for share in (count / n, 1 - count / n) if n else ():
            bits -= n * share * math.log2(share) if share else 0
    return bits / 8


def encode_positions(chosen: Sequence[npt.NDArray[np.bool_]]) -> bytes:
    """Code which candidates are chosen, one bool array a layer; layers in any order that the reader knows."""
    written = b''.join(_write(which) for which in chosen)
    # No search for repetitions: in positions they are chance, and cost more to say than they save.
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, search_log=1, min_match=7
    )
    coder = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(written))
    blocks = [
        coder.compress(written[start : start + _BLOCK]) + coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for start in range(0, len(written), _BLOCK)
    ]
    return b''.join(blocks) + coder.flush()


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


def decode_positions(data: bytes, counts: Sequence[int], candidates: Sequence[int]) -> list[Indices]:
    """For each layer the numbers of the candidates that are chosen, ascending, ``counts[i]`` of ``candidates[i]``.

    Raises:
        ScalableFileError: ``data`` is not what :func:`encode_positions` makes of such a choice. It takes no more memory
            than a true answer would.
    """
    written = np.frombuffer(_decompress(data, sum(map(_most, counts, candidates))), np.uint8)
    numbers, start = [], 0
    for count, n in zip(counts, candidates):
        if _as_distances(count, n):
            stated = min(count, n - count)
            positions, used = _read_distances(written[start : start + _most(count, n)], stated)
            if stated and positions[-1] >= n:
                raise ScalableFileError(f'positions: the last of a layer is {positions[-1]}, it has {n} candidates')
            if stated < count:
                positions = _others(positions, n) if stated else np.arange(n)
        else:
            used = (n + 7) // 8
            positions = np.unpackbits(written[start : start + used]).view(np.bool_).nonzero()[0]
            if len(positions) != count or positions[-1] >= n:
                raise ScalableFileError(f'positions: a layer has {len(positions)}, the header says {count} of {n}')
        numbers.append(positions)
        start += used
    if start != len(written):
        raise ScalableFileError(f'positions: {len(written)} bytes, of which {start} are used')
    return numbers


def _most(count: int, n: int) -> int:
    """The most bytes that a layer's positions are written in, before compression."""
    return min(count, n - count) + n // _SKIP if _as_distances(count, n) else (n + 7) // 8


def _read_distances(written: npt.NDArray[np.uint8], stated: int) -> tuple[Indices, int]:
    """The positions that ``stated`` distances lead to, and how many bytes these are."""
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
        raise ScalableFileError(f'positions: {len(positions)} where the header says {stated}, or they do not ascend')
    return positions, used


def _others(positions: Indices, n: int) -> Indices:
    rest = np.ones(n, np.bool_)
    rest[positions] = False
    return np.flatnonzero(rest)


def _decompress(data: bytes, longest: int) -> Any:
    try:
        if not 0 <= zstandard.frame_content_size(data) <= longest:  # zstandard allocates what the frame claims
            raise ScalableFileError(f'positions: {zstandard.frame_content_size(data)} bytes, {longest} is the most')
        return zstandard.ZstdDecompressor(max_window_size=1 << 17).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ScalableFileError(f'positions: {error}') from error
