"""``mssr benchmark``: time and memory of each level."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mssr_basicsr.foundation.checks import OptionError, require_int
from mssr_basicsr.foundation.json_text import as_json

HELP = 'time and memory of each level on this CPU'
EXAMPLES = ('mssr benchmark net_g.mssr --size 640x360 --threads 1',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('--size', default='320x180', help='input size, WxH; default: 320x180')
    parser.add_argument('--threads', type=int, help="number of threads; default: torch's")
    parser.add_argument('--rounds', type=int, default=5, help='number of runs; medians are printed; default: 5')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr benchmark``: each level's time, memory and speed-up over torch's dense network.

    Sparse and dense runs alternate in one process; dense is the faster of default and channels-last layout.
    """
    from mssr_basicsr.scalable.measuring import measure_levels
    from mssr_basicsr.sparse.library import engine_name

    width, _, height = arguments.size.partition('x')
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OptionError('--size', arguments.size, 'width x height in pixels, such as 320x180')
    require_int('--rounds', arguments.rounds, 1)
    if arguments.threads is not None:
        require_int('--threads', arguments.threads, 1, os.cpu_count() or 1, ', as there are processors')
    levels = measure_levels(arguments.file, (int(width), int(height)), arguments.threads, arguments.rounds)
    found = {'file': str(arguments.file), 'size': arguments.size, 'engine': engine_name(), 'levels': levels}
    print(as_json(found) if arguments.json else _as_text(found))
    return 0


def _as_text(found: dict[str, Any]) -> str:
    from mssr_basicsr.foundation.tables import table_with_metrics

    head = ['level', 'engine', 'ms', 'speed-up', 'peak MB', 'weights MB', 'sparse layers']
    cells = [
        [
            f'{row["level"]}',
            row['engine'],
            f'{row["milliseconds"]:.1f}',
            f'{row["times_faster"]:.2f}',
            f'{row["peak_bytes"] / 1e6:.1f}',
            f'{row["weight_bytes"] / 1e6:.2f}',
            f'{len(row["sparse_layers"])} of {row["convolutions"]}',
        ]
        for row in found['levels']
    ]
    head_line = f'{found["file"]}: {found["size"]}, engine: {found["engine"]}'
    return f'{head_line}\n{table_with_metrics(head, cells, found["levels"])}'
