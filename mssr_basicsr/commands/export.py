"""``mssr export``: a level as an ONNX model."""

from __future__ import annotations

import argparse
from pathlib import Path

from mssr_basicsr.commands.errors import say_where_it_ends

HELP = 'one level as an ONNX model'
EXAMPLES = ('mssr export net_g.mssr --onnx level4.onnx --level 4',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument(
        '--onnx', type=Path, required=True, help='output file; an existing one is overwritten', dest='output'
    )
    parser.add_argument('--level', type=int, help='default: the largest in the file')
    parser.add_argument('--opset', type=int, help="default: that of torch's exporter")


def run(arguments: argparse.Namespace) -> int:
    """``mssr export``: a level as an ONNX model of any height and width."""
    from mssr_basicsr import to_onnx

    done = to_onnx(arguments.file, arguments.output, arguments.level, arguments.opset)
    if arguments.level is None:
        say_where_it_ends(arguments.file, done.level)
    size = f'; height and width must be multiples of {done.multiple}' if done.multiple > 1 else ''
    print(f'{arguments.output}: level {done.level}, opset {done.opset}, float32 RGB in [0, 1], (1, C, H, W){size}')
    return 0
