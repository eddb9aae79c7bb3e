"""``mssr info``: the table of levels."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mssr_basicsr.foundation.json_text import as_json
from mssr_basicsr.foundation.tables import table_with_metrics

HELP = 'metadata and the table of levels: parameters, bytes, PSNR'
EXAMPLES = ('mssr info net_g.mssr',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr info``: metadata and the table of levels: parameters, bytes, PSNR."""
    found = describe(arguments.file)
    print(as_json(found) if arguments.json else as_text(found))
    return 0


def describe(path: Path) -> dict[str, Any]:
    """What the file holds, as :meth:`ScalableFile.describe` says it, and the ``engine`` that would run it here."""
    from mssr_basicsr import ScalableFile
    from mssr_basicsr.sparse.library import engine_name

    with ScalableFile(path) as file:
        return {**file.describe(), 'engine': engine_name()}


def as_text(found: dict[str, Any]) -> str:
    """What :func:`describe` found, for people."""
    options = ', '.join(f'{key}={value}' for key, value in found['backbone'].items() if key != 'type')
    size, whole = found['file_bytes'], f'{found["whole_bytes"]:,}'
    if size is None:
        state = f'{whole} bytes if whole (a stream does not say how many it has)'
    else:
        state = f'{size:,} bytes ({"whole" if size == found["whole_bytes"] else f"of {whole}"})'
    lines = [
        f'{found["file"]}: {found["backbone"]["type"]} x{found["scale"]} ({options})',
        f'{state}, values {found["dtype"]}',
        f'engine: {found["engine"]}',
        *(f'{key}: {text}' for key, text in found['metadata'].items()),
        level_table(found['levels']),
    ]
    return '\n'.join(lines)


def level_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """The ``levels`` of :meth:`ScalableFile.describe` as text, with a column for each metric of each validation set."""
    head = ['level', 'sparsity (prunable)', 'parameters', 'bytes', 'cumulative']
    cells = [
        [
            f'{row["level"]}{"" if row["present"] else " (not there)"}',
            f'{row["sparsity"]:.2%}',
            f'{row["parameters"]:,}',
            f'{row["bytes"]:,}',
            f'{row["cumulative_bytes"]:,}',
        ]
        for row in levels
    ]
    return table_with_metrics(head, cells, levels)
