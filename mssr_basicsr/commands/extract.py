"""``mssr extract``: one level, or a smaller file."""

from __future__ import annotations

import argparse
from pathlib import Path

from mssr_basicsr.commands.errors import say_where_it_ends

HELP = 'one level as a plain checkpoint, or a smaller .mssr'
EXAMPLES = (
    'mssr extract net_g.mssr -o level2.pth --level 2',
    'mssr extract net_g.mssr -o small.mssr --level 3',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        required=True,
        help='output file: .pth, .safetensors or .mssr; an existing one is overwritten',
    )
    parser.add_argument('--level', type=int, help='default: the largest in the file')
    parser.add_argument('--spandrel', action='store_true', help='use the tensor names that spandrel expects (for RCAN)')


def run(arguments: argparse.Namespace) -> int:
    """``mssr extract``: a level as a plain checkpoint, or that level and all smaller ones as a smaller ``.mssr``."""
    from mssr_basicsr import extract

    done = extract(arguments.file, arguments.output, arguments.level, arguments.spandrel)
    first, last = done.levels[0], done.levels[-1]
    if arguments.level is None:
        say_where_it_ends(arguments.file, first)
    what = f'level {first}' if first == last else f'levels {first} to {last}'
    print(f'{arguments.output}: {what}, {done.bytes:,} bytes')
    return 0
