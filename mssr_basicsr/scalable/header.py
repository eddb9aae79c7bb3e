"""The header of a ``.mssr`` file: a JSON object that describes the contents, and is checked before any of it is used.

docs/format.md is the specification.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from mssr_basicsr.foundation.checks import is_number
from mssr_basicsr.method import MAX_LEVELS
from mssr_basicsr.scalable.errors import ScalableFileError

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
ALIGNMENT = 64  #: of the header's end and of sections
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
    """A file's header; :func:`parse_header` guarantees that it is consistent.

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
        """The parameters of ``level``, with those never pruned; ScalableFileError if there is no such level."""
        self.section(level)
        return self._parameters[self.smallest_level - level]

    @cached_property
    def _parameters(self) -> tuple[int, ...]:
        """Those of each level from K to 0. Summed up once: a short file may have millions of counts."""
        added = [sum(section.counts) for section in self.sections]
        return tuple(self.num_other_parameters + total for total in accumulate(added))


def _refuse(constant: str) -> float:
    raise ValueError(f'{constant} is not a finite number')


def _finite(number: str) -> float:
    """The number, which is not so large that it would be infinite."""
    value = float(number)
    return value if math.isfinite(value) else _refuse(number[:80])


def parse_header(text: bytes, start: int) -> Header:
    """The header, checked.

    Args:
        text: its JSON.
        start: where in the file the header ends, and so the sections start.

    Raises:
        ScalableFileError: the text is not JSON, or what it says is inconsistent or not allowed.
    """
    try:
        return _parse(json.loads(text, parse_constant=_refuse, parse_float=_finite), start)
    except ScalableFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ScalableFileError(f'not JSON ({error})') from error


def _parse(fields: Any, start: int) -> Header:
    _require(fields, dict, 'the header')
    check_texts(fields)
    backbone = _field(fields, 'backbone', dict)
    if not isinstance(backbone.get('type'), str):
        raise ScalableFileError('backbone: it has no type')
    weights = tuple(_weight(entry) for entry in _field(fields, 'weights', list))
    others = tuple(_other(entry) for entry in _field(fields, 'others', list))
    if not any(weight.numel for weight in weights):
        raise ScalableFileError('weights: there are none, or none has an element')
    computed = _field(fields, 'computed', list, [])
    names = [tensor.name for tensor in weights + others] + computed
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ScalableFileError('weights, others, computed: a name occurs twice, or is not a text')
    dtype = _field(fields, 'dtype', str)
    if dtype not in WEIGHT_DTYPES:
        raise ScalableFileError(f'dtype: found {dtype!r}; allowed: {", ".join(WEIGHT_DTYPES)}')
    if dtype == 'I8' and not all(weight.shape for weight in weights):
        raise ScalableFileError('weights: one that is stored as I8 has no dimensions, and so no channels')
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
        raise ScalableFileError(
            f'sections: the counts of {weights[left.index(next(filter(None, left)))].name} do not add up'
        )
    if header.num_other_parameters > sum(tensor.numel for tensor in others):
        raise ScalableFileError('num_other_parameters: more than others has')
    return header


def _sections(table: list[Any], end: int, weights: Sequence[TensorInfo]) -> list[Section]:
    if not 2 <= len(table) <= MAX_LEVELS:
        raise ScalableFileError(f'sections: found {len(table)}; allowed: 2 to {MAX_LEVELS}')
    sections = []
    for level, entry in zip(range(len(table) - 1, -1, -1), table):
        _require(entry, dict, 'sections')
        counts = [_natural(count, 'counts') for count in _field(entry, 'counts', list)]
        if len(counts) != len(weights):
            raise ScalableFileError(f'sections: level {level} has {len(counts)} counts for {len(weights)} weights')
        size = _natural(_field(entry, 'bytes', int), 'bytes')
        padding = -end % ALIGNMENT
        start = end + padding
        sections.append(Section(level, padding, start, size, _checksum(_field(entry, 'xxh64', str)), tuple(counts)))
        end = start + size
    return sections


def _weight(entry: Any) -> TensorInfo:
    if not (isinstance(entry, list) and len(entry) == 2):
        raise ScalableFileError(f'weights: found {str(entry)[:80]}; allowed: [name, shape]')
    return TensorInfo(entry[0], _shape(entry[1]))


def _other(entry: Any) -> TensorInfo:
    if not (isinstance(entry, list) and len(entry) == 3):
        raise ScalableFileError(f'others: found {str(entry)[:80]}; allowed: [name, shape, dtype]')
    if _require(entry[2], str, 'others') not in DTYPES:
        raise ScalableFileError(f'others: found {entry[2][:80]!r}; allowed: {", ".join(DTYPES)}')
    return TensorInfo(entry[0], _shape(entry[1]), entry[2])


def _shape(sizes: Any) -> tuple[int, ...]:
    if len(_require(sizes, list, 'shape')) > _MAX_DIMENSIONS:
        raise ScalableFileError(f'shape: found {len(sizes)} dimensions; allowed: {_MAX_DIMENSIONS}')
    shape = tuple(_natural(size, 'shape') for size in sizes)
    _natural(math.prod(shape), 'shape')
    return shape


def _checksum(found: str) -> str:
    if not re.fullmatch('[0-9a-f]{16}', found):
        raise ScalableFileError(f'xxh64: found {found[:80]!r}; allowed: 16 hexadecimal digits')
    return found


def _metadata(texts: dict[str, Any]) -> dict[str, str]:
    for key, text in texts.items():
        _require(text, str, f'metadata: {key[:80]}')
    return texts


def _metrics(levels: dict[str, Any]) -> dict[str, Any]:
    for datasets in levels.values():
        for values in _require(datasets, dict, 'metrics').values():
            for value in _require(values, dict, 'metrics').values():
                if not is_number(value) or abs(value) > sys.float_info.max:
                    raise ScalableFileError(f'metrics: found {str(value)[:80]!r}; allowed: a number')
    return levels


def check_texts(value: Any) -> None:
    """Raise ScalableFileError unless all text in ``value``, a header or part of it, is safe to print to a terminal."""
    if isinstance(value, str) and not value.isprintable():
        raise ScalableFileError(f'found {value[:80]!r}; allowed: printable characters')
    for item in value if isinstance(value, (dict, list)) else ():
        check_texts(item)
        if isinstance(value, dict):
            check_texts(value[item])


def _field(fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    return _require(fields.get(key, default), kind, key)


def _require(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ScalableFileError(f'{what}: found {str(value)[:80]!r}; allowed: a JSON {kind.__name__}')
    return value


def _natural(value: Any, what: str, low: int = 0) -> int:
    if not low <= _require(value, int, what) < _END_OF_NATURALS:
        raise ScalableFileError(f'{what}: found {str(value)[:80]}; allowed: {low} to {_END_OF_NATURALS - 1}')
    return int(value)
