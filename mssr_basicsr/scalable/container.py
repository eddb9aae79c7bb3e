"""The bytes of a ``.mssr`` file: a header that describes the contents, then one section per level, smallest first.

docs/format.md is the specification. Nothing here knows about networks, and nothing in a file is trusted before it
has been checked against the file's own checksums and length.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Union

import xxhash

from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.frames import compress_text, decompress
from mssr_basicsr.scalable.header import ALIGNMENT, Header, parse_header

Source = Union[str, 'os.PathLike[str]', BinaryIO]

MAGIC = b'\x89MSSR\r\n\x1a'  # as PNG's: a transfer as text, or a cut to 7 bits, shows here
MAJOR, MINOR = 2, 0
_PREAMBLE = struct.Struct('<8sHHIQ')  # magic, major and minor version, length of the header's frame, its XXH64
_MAX_FRAME = 1 << 20  # of the header


# ------------------------------ writing ------------------------------ #


def write_file(fields: Mapping[str, Any], counts: Sequence[Sequence[int]], sections: Sequence[bytes]) -> bytes:
    """The file's bytes, always the same for the same arguments.

    Args:
        fields: the JSON values of the header, except ``sections``.
        counts: for each level from K to 0, how many elements of each weight it adds.
        sections: for each level from K to 0, its frame.
    """
    table = [
        {'bytes': len(section), 'xxh64': xxhash.xxh64_hexdigest(section), 'counts': list(count)}
        for section, count in zip(sections, counts)
    ]
    text = json.dumps({**fields, 'sections': table}, sort_keys=True, separators=(',', ':'), allow_nan=False)
    file = join_file(compress_text(text.encode('ascii')), sections)
    read_header(io.BytesIO(file), 'the file to be written')
    return file


def join_file(header: bytes, sections: Sequence[bytes]) -> bytes:
    """A file of the header's frame and those of the sections, with the padding between."""
    file = _PREAMBLE.pack(MAGIC, MAJOR, MINOR, len(header), xxhash.xxh64_intdigest(header)) + header
    for section in sections:
        file += bytes(-len(file) % ALIGNMENT) + section
    return file


# ------------------------------ reading ------------------------------ #


class ScalableFile:
    """A ``.mssr`` file or binary stream, complete or cut after any of its sections.

    Sections are read one at a time and in any order; from a stream that cannot seek, in the file's order.

    Args:
        source: a path, or a binary stream positioned at the file's first byte. A path is opened, and closed by
            :meth:`close` or a ``with`` statement; closing a stream is up to the caller.

    Raises:
        ScalableFileError: it is not a ``.mssr`` file, or its header is corrupted.
        OSError: it cannot be opened.
    """

    def __init__(self, source: Source) -> None:
        self._owned = isinstance(source, (str, os.PathLike))
        self._stream: BinaryIO = (
            open(source, 'rb', buffering=0) if self._owned else source  # type: ignore  # noqa: SIM115  (see close)
        )
        self.name = str(source) if self._owned else str(getattr(source, 'name', 'the stream'))
        try:
            self._seekable = can_seek(self._stream)
            self._origin = self._stream.tell() if self._seekable else 0
            #: The length in bytes; None if the stream cannot say.
            self.size = self._length() if self._seekable else None
            if self._seekable:
                self._stream.seek(self._origin)
            self.header, self._start = read_header(self._stream, self.name)
        except BaseException:
            self.close()
            raise
        #: How many bytes have been read so far.
        self.bytes_read = self._position = len(self._start)

    def close(self) -> None:
        """Close the file, if it was given as a path."""
        if self._owned:
            self._stream.close()

    def __enter__(self) -> ScalableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What the file holds, as JSON values; ``levels`` has a record for each level, largest first.

        In a level's record, ``sparsity`` is the removed share of the prunable weights, ``parameters`` counts all
        parameters of the level, prunable or not, ``bytes`` is the size of its own section (for the smallest level
        including the header), ``cumulative_bytes`` all that is read for it, and ``metrics`` what has been measured, by
        validation set.
        """
        header, present = self.header, set(self.available())
        prunable = sum(weight.numel for weight in header.weights)
        levels = [
            {
                'level': section.level,
                'sparsity': (header.num_parameters(0) - header.num_parameters(section.level)) / prunable,
                'parameters': header.num_parameters(section.level),
                'bytes': section.end if section.level == header.smallest_level else section.size,
                'cumulative_bytes': section.end,
                'present': section.level in present,
                'metrics': header.metrics.get(str(section.level), {}),
            }
            for section in reversed(header.sections)
        ]
        return {
            'file': self.name,
            'backbone': header.backbone,
            'scale': header.scale,
            'dtype': header.dtype,
            'metadata': header.metadata,
            'file_bytes': self.size,
            'whole_bytes': header.sections[-1].end,
            'levels': levels,
        }

    def available(self) -> list[int]:
        """The levels whose sections are complete, smallest (K) first; all levels if the stream cannot tell."""
        sections = self.header.sections
        return [section.level for section in sections if self.size is None or section.end <= self.size]

    def read_section(self, level: int) -> bytes:
        """The frame of one level's section; reads its bytes, the padding before it, and no others.

        Raises:
            ScalableFileError: the file ends before the section does, or the section is corrupted.
        """
        section = self.header.section(level)
        if self.size is not None and section.end > self.size:  # it may have grown since: a download that went on
            self.size = self._length()
            if section.end > self.size:
                raise self.cut_short(level)
        padding = self._read(section.start - section.padding, section.start, level)
        frame = self._read(section.start, section.end, level)
        if xxhash.xxh64_hexdigest(frame) != section.checksum or any(padding):
            raise ScalableFileError(f'{self.name}: the section of level {level} is corrupted (checksum)')
        return frame

    def read_prefix(self, level: int) -> bytes:
        """The file's bytes up to the end of ``level``'s section: a file of the levels from ``level`` to K.

        Raises:
            ScalableFileError: the file ends before the section does, or the stream cannot seek and a section has been
                read from it.
        """
        return self._start + self._read(len(self._start), self.header.section(level).end, level)

    def _read(self, start: int, end: int, level: int) -> bytes:
        """The file's bytes from ``start`` to ``end``, of which ``level`` has need."""
        if self._seekable:  # always: whoever gave us the stream may have moved it since
            self._stream.seek(self._origin + start)
        elif self._position != start:
            raise ScalableFileError(f'{self.name}: level {level} is not the next one, and the stream cannot seek')
        data = read_exactly(self._stream, end - start)
        self._position = start + len(data)
        self.bytes_read += len(data)
        if self._position < end:
            self.size = self._position
            raise self.cut_short(level)
        return data

    def _length(self) -> int:
        """How many bytes a stream that can seek has now, from the file's first one."""
        self._stream.seek(0, io.SEEK_END)
        return self._stream.tell() - self._origin

    def bytes_after(self, level: int) -> int:
        """How many bytes follow the section of ``level``. From a stream that cannot seek, they are read to know it."""
        if self.size is None:
            self.size = self._position
            while more := self._stream.read(1 << 16):
                self.size += len(more)
        return self.size - self.header.section(level).end

    def cut_short(self, level: int) -> ScalableFileError:
        """The error that says how much of the file ``level`` needs."""
        end = self.header.section(level).end
        return ScalableFileError(f'{self.name}: level {level} needs the first {end:,} bytes; there are {self.size:,}')


def require_no_pipe(path: str | os.PathLike[str]) -> None:
    """Raise ScalableFileError if ``path`` is a pipe: what measures the model reads it several times."""
    if Path(path).is_fifo():
        raise ScalableFileError(f'{path}: found a pipe; allowed: a file, since it is read several times')


def can_seek(stream: BinaryIO) -> bool:
    """Whether the stream can seek. One that does not say so, as temporary files before Python 3.11, is tried."""
    if hasattr(stream, 'seekable'):
        return stream.seekable()
    try:
        stream.seek(stream.tell())
    except (AttributeError, OSError):
        return False
    return True


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """Up to ``size`` bytes, fewer only at the stream's end; one read of a pipe or a socket may give fewer."""
    parts: list[bytes] = []
    while size > 0 and (more := stream.read(size)):
        parts.append(more)
        size -= len(more)
    return b''.join(parts)


def read_header(stream: BinaryIO, name: str) -> tuple[Header, bytes]:
    """The header, checked, and the bytes that were read for it, after which the sections start.

    Raises:
        ScalableFileError: not a ``.mssr`` file, another version, or a header that is corrupted or inconsistent.
    """
    start = read_exactly(stream, _PREAMBLE.size)
    if start[:8] != MAGIC[: len(start)] or not start:
        raise ScalableFileError(f'{name}: not a scalable model file (it starts with {start[:8]!r})')
    if len(start) < _PREAMBLE.size:
        raise ScalableFileError(f'{name}: truncated within its first {_PREAMBLE.size} bytes')
    _, major, minor, length, checksum = _PREAMBLE.unpack(start)
    if major != MAJOR:
        remedy = 'pack the model again' if major < MAJOR else 'update mssr-basicsr'
        raise ScalableFileError(f'{name}: format version: found {major}.{minor}; allowed: {MAJOR}.x ({remedy})')
    if length > _MAX_FRAME:
        raise ScalableFileError(f'{name}: length of the header: found {length:,} bytes; allowed: up to {_MAX_FRAME:,}')
    frame = read_exactly(stream, length)
    end = _PREAMBLE.size + length
    if len(frame) < length:
        there = _PREAMBLE.size + len(frame)
        raise ScalableFileError(f'{name}: the header needs the first {end:,} bytes; there are {there:,}')
    if xxhash.xxh64_intdigest(frame) != checksum:
        raise ScalableFileError(f'{name}: the header is corrupted (checksum)')
    try:
        # Objects parsed from JSON take up to twenty times its length, so a small file must have a short header.
        return parse_header(decompress(frame, (1 << 15) + 32 * length), end), start + frame
    except ScalableFileError as error:
        raise ScalableFileError(f'{name}: header: {error}') from error
