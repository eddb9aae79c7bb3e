"""Zstandard frames (RFC 8878) as used in ``.mssr`` files: they state their length and need little memory to read."""

from __future__ import annotations

from collections.abc import Iterable

import zstandard

from mssr_basicsr.scalable.errors import ScalableFileError

#: The most bytes of history that a frame may ask its reader to keep.
MAX_WINDOW = 1 << 17
# A Huffman table serves one block. Layers differ, and short blocks follow that, at some 50 bytes each.
_BLOCK = 1 << 14
# No search for repetitions: among positions and weights they are chance, and cost more to say than they save.
_HUFFMAN_ALONE = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, search_log=1, min_match=7
)
_TEXT = zstandard.ZstdCompressionParameters.from_level(19, window_log=17)


def compress_parts(parts: Iterable[bytes]) -> bytes:
    """One frame of all ``parts``, no two of which share a block and so a Huffman table."""
    parts = list(parts)
    coder = zstandard.ZstdCompressor(compression_params=_HUFFMAN_ALONE).compressobj(size=sum(map(len, parts)))
    blocks = [
        coder.compress(part[start : start + _BLOCK]) + coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for part in parts
        for start in range(0, len(part), _BLOCK)
    ]
    return b''.join(blocks) + coder.flush()


def compress_text(text: bytes) -> bytes:
    """One frame of a text, with a search for repetitions."""
    return zstandard.ZstdCompressor(compression_params=_TEXT).compress(text)


def decompress(frame: bytes, longest: int) -> bytes:
    """The content of ``frame``, which must be exactly one frame.

    Raises:
        ScalableFileError: it is not such a frame, or holds more than ``longest`` bytes, which is checked before memory
            is allocated for them.
    """
    try:
        stated = zstandard.get_frame_parameters(frame)  # a content_size of 2^64 - 1 if it states none
        if stated.content_size > longest or stated.window_size > MAX_WINDOW:
            found = f'{stated.content_size:,} bytes with a window of {stated.window_size:,}'
            allowed = f'up to {longest:,} bytes with a window of up to {MAX_WINDOW:,}'
            raise ScalableFileError(f'a frame: found {found}; allowed: {allowed}')
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ScalableFileError(f'not a Zstandard frame ({error})') from error
