"""The bytes of a ``.mssr`` file: a header that describes the contents, then one section per level, smallest first.

docs/format.md is the specification. Nothing here knows about networks, and nothing in a file is trusted before it
has been checked against the file's own checksums and length.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Union

import xxhash

from mssr_basicsr.method import MAX_LEVELS
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.frames import compress_text, decompress

Source = Union[str, 'os.PathLike[str]', BinaryIO]

#: The types in a file: their names there, as in safetensors, and in torch.
DTYPES = {
    'F64': 'float64',
    'F32': 'float32',
    'F16': 'float16',
    'BF16': 'bfloat16',
    'I64': 'int64',
    'I32': 'int32',
    'I16': 'int16',
    'I8': 'int8',
    'U8': 'uint8',
    'BOOL': 'bool',
}
#: What the prunable weights of a file may be stored as. ``I8`` are integers to be multiplied with a scale.
WEIGHT_DTYPES = ('F32', 'F16', 'BF16', 'I8')
MAGIC = b'\x89MSSR\r\n\x1a'  # as PNG's: a transfer as text, or a cut to 7 bits, shows here
MAJOR, MINOR = 2, 0
_PREAMBLE = struct.Struct('<8sHHIQ')  # magic, major and minor version, length of the header's frame, its XXH64
_ALIGNMENT = 64  # of the header's end and of sections
_MAX_FRAME = 1 << 20  # of the header
_MAX_DIMENSIONS = 8
_END_OF_NATURALS = 1 << 48


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape and type, as it is in the backbone's state dict."""

    name: str
    shape: tuple[int, ...]
    dtype: str = 'F32'  #: one of DTYPES; prunable weights are float32

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Section:
    """One level's delta: what it has and the next smaller level lacks."""

    level: int
    padding: int  #: bytes of zeros before it
    start: int  #: of its first byte in the file, a multiple of 64
    size: int  #: in bytes
    checksum: str  #: XXH64 of its bytes, in hex
    counts: tuple[int, ...]  #: how many weights of each of Header.weights it has

    @property
    def end(self) -> int:
        """The length of the prefix that holds this level and all smaller ones."""
        return self.start + self.size


@dataclass(frozen=True)
class Header:
    """A file's header; :func:`read_header` and :func:`write_file` guarantee that it is consistent.

    The sections go from level K to 0, and their counts add up to every weight.
    """

    backbone: Mapping[str, Any]  #: options of the architecture, with its type
    scale: int  #: upscaling factor
    dtype: str  #: of the prunable weights in the file, one of WEIGHT_DTYPES
    weights: tuple[TensorInfo, ...]  #: the prunable weights
    others: tuple[TensorInfo, ...]  #: parameters and buffers that are in every level; in the first section
    num_other_parameters: int  #: how many elements of ``others`` belong to parameters
    computed: tuple[str, ...]  #: names of buffers that the architecture computes; not in the file
    computed_checksum: str  #: of these buffers
    metrics: Mapping[str, Any]  #: by level (as a string), validation set and metric, where known
    metadata: Mapping[str, str]  #: what the author says of the model: license, author, training data, ...
    sections: tuple[Section, ...]

    @property
    def smallest_level(self) -> int:
        """K."""
        return len(self.sections) - 1

    def section(self, level: int) -> Section:
        """The section of ``level``; ScalableFileError if there is no such level."""
        if not 0 <= level <= self.smallest_level:
            raise ScalableFileError(f'level {level}: this model has levels 0 to {self.smallest_level}')
        return self.sections[self.smallest_level - level]

    def candidates(self, level: int) -> list[int]:
        """For each weight, how many of its elements are in no level smaller than ``level``."""
        larger = [section.counts for section in self.sections if section.level <= level]
        return [sum(counts) for counts in zip(*larger)]  # the counts of all levels add up to all elements

    def num_parameters(self, level: int) -> int:
        """The parameters that ``level`` has, including those that are never pruned."""
        return self.num_other_parameters + sum(sum(s.counts) for s in self.sections if s.level >= level)


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
        file += bytes(-len(file) % _ALIGNMENT) + section
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
            self._seekable = self._stream.seekable()
            self._origin = self._stream.tell() if self._seekable else 0
            #: The length in bytes; None if the stream cannot say.
            self.size = self._stream.seek(0, io.SEEK_END) - self._origin if self._seekable else None
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
            self.size = self._stream.seek(0, io.SEEK_END) - self._origin
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


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """Up to ``size`` bytes, fewer only at the stream's end; one read of a pipe or a socket may give fewer."""
    data = b''
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


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
        # What is read of JSON takes up to twenty times the text's memory, so that a small file's is kept short.
        fields = json.loads(decompress(frame, (1 << 15) + 32 * length), parse_constant=_refuse, parse_float=_finite)
    except ScalableFileError as error:
        raise ScalableFileError(f'{name}: header: {error}') from error
    except (ValueError, RecursionError) as error:
        raise ScalableFileError(f'{name}: the header is not JSON ({error})') from error
    try:
        return _parse(fields, end), start + frame
    except (_Contradiction, RecursionError) as error:
        raise ScalableFileError(f'{name}: header: {error}') from error


class _Contradiction(Exception):
    """What is wrong with a header."""


def _refuse(constant: str) -> float:
    raise ValueError(f'{constant} is not a finite number')


def _finite(number: str) -> float:
    """The number, which is not so large that it would be infinite."""
    value = float(number)
    return value if math.isfinite(value) else _refuse(number[:80])


def _parse(fields: Any, start: int) -> Header:
    _require(fields, dict, 'the header')
    _check_texts(fields)
    backbone = _field(fields, 'backbone', dict)
    if not isinstance(backbone.get('type'), str):
        raise _Contradiction('backbone: it has no type')
    weights = tuple(_weight(entry) for entry in _field(fields, 'weights', list))
    others = tuple(_other(entry) for entry in _field(fields, 'others', list))
    if not weights:
        raise _Contradiction('weights: there are none')
    computed = _field(fields, 'computed', list, [])
    names = [tensor.name for tensor in weights + others] + computed
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise _Contradiction('weights, others, computed: a name occurs twice, or is not a text')
    dtype = _field(fields, 'dtype', str)
    if dtype not in WEIGHT_DTYPES:
        raise _Contradiction(f'dtype: found {dtype!r}; allowed: {", ".join(WEIGHT_DTYPES)}')
    if dtype == 'I8' and not all(weight.shape for weight in weights):
        raise _Contradiction('weights: one that is stored as I8 has no dimensions, and so no channels')
    header = Header(
        backbone=backbone,
        scale=_natural(_field(fields, 'scale', int), 'scale', 1),
        dtype=dtype,
        weights=weights,
        others=others,
        num_other_parameters=_natural(_field(fields, 'num_other_parameters', int), 'num_other_parameters'),
        computed=tuple(computed),
        computed_checksum=_field(fields, 'computed_checksum', str, None if computed else ''),
        metrics=_metrics(_field(fields, 'metrics', dict, {})),
        metadata=_metadata(_field(fields, 'metadata', dict, {})),
        sections=tuple(_sections(_field(fields, 'sections', list), start, weights)),
    )
    left = [weight.numel - sum(counts) for weight, counts in zip(weights, zip(*(s.counts for s in header.sections)))]
    if any(left):
        raise _Contradiction(
            f'sections: the counts of {weights[left.index(next(filter(None, left)))].name} do not add up'
        )
    if header.num_other_parameters > sum(tensor.numel for tensor in others):
        raise _Contradiction('num_other_parameters: more than others has')
    return header


def _sections(table: list[Any], end: int, weights: Sequence[TensorInfo]) -> list[Section]:
    if not 2 <= len(table) <= MAX_LEVELS:
        raise _Contradiction(f'sections: found {len(table)}; allowed: 2 to {MAX_LEVELS}')
    sections = []
    for level, entry in zip(range(len(table) - 1, -1, -1), table):
        _require(entry, dict, 'sections')
        counts = [_natural(count, 'counts') for count in _field(entry, 'counts', list)]
        if len(counts) != len(weights):
            raise _Contradiction(f'sections: level {level} has {len(counts)} counts for {len(weights)} weights')
        size = _natural(_field(entry, 'bytes', int), 'bytes')
        padding = -end % _ALIGNMENT
        start = end + padding
        sections.append(Section(level, padding, start, size, _checksum(_field(entry, 'xxh64', str)), tuple(counts)))
        end = start + size
    return sections


def _weight(entry: Any) -> TensorInfo:
    if not (isinstance(entry, list) and len(entry) == 2):
        raise _Contradiction(f'weights: found {str(entry)[:80]}; allowed: [name, shape]')
    return TensorInfo(entry[0], _shape(entry[1]))


def _other(entry: Any) -> TensorInfo:
    if not (isinstance(entry, list) and len(entry) == 3):
        raise _Contradiction(f'others: found {str(entry)[:80]}; allowed: [name, shape, dtype]')
    if _require(entry[2], str, 'others') not in DTYPES:
        raise _Contradiction(f'others: found {entry[2][:80]!r}; allowed: {", ".join(DTYPES)}')
    return TensorInfo(entry[0], _shape(entry[1]), entry[2])


def _shape(sizes: Any) -> tuple[int, ...]:
    if len(_require(sizes, list, 'shape')) > _MAX_DIMENSIONS:
        raise _Contradiction(f'shape: found {len(sizes)} dimensions; allowed: {_MAX_DIMENSIONS}')
    shape = tuple(_natural(size, 'shape') for size in sizes)
    _natural(math.prod(shape), 'shape')
    return shape


def _checksum(found: str) -> str:
    if not re.fullmatch('[0-9a-f]{16}', found):
        raise _Contradiction(f'xxh64: found {found[:80]!r}; allowed: 16 hexadecimal digits')
    return found


def _metadata(texts: dict[str, Any]) -> dict[str, str]:
    for key, text in texts.items():
        _require(text, str, f'metadata: {key[:80]}')
    return texts


def _metrics(levels: dict[str, Any]) -> dict[str, Any]:
    for datasets in levels.values():
        for values in _require(datasets, dict, 'metrics').values():
            for value in _require(values, dict, 'metrics').values():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
                    raise _Contradiction(f'metrics: found {str(value)[:80]!r}; allowed: a number')
    return levels


def _check_texts(value: Any) -> None:
    """Raise unless all text in a header is safe to print to a terminal."""
    if isinstance(value, str) and not value.isprintable():
        raise _Contradiction(f'found {value[:80]!r}; allowed: printable characters')
    for item in value if isinstance(value, (dict, list)) else ():
        _check_texts(item)
        if isinstance(value, dict):
            _check_texts(value[item])


def _field(fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    return _require(fields.get(key, default), kind, key)


def _require(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Contradiction(f'{what}: found {str(value)[:80]!r}; allowed: a JSON {kind.__name__}')
    return value


def _natural(value: Any, what: str, low: int = 0) -> int:
    if not low <= _require(value, int, what) < _END_OF_NATURALS:
        raise _Contradiction(f'{what}: found {str(value)[:80]}; allowed: {low} to {_END_OF_NATURALS - 1}')
    return int(value)
