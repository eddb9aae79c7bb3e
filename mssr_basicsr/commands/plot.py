"""``mssr plot``: PSNR over bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = 'PSNR over size or time'
EXAMPLES = ('mssr plot net_g.mssr other.mssr -o psnr.png',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('files', metavar='FILE.mssr', nargs='+', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='output image; an existing one is overwritten')
    parser.add_argument('--time', action='store_true', help='PSNR over the time that each level takes on this CPU')


def run(arguments: argparse.Namespace) -> int:
    """``mssr plot``: PSNR over cumulative bytes, or over time, with a line for each file and validation set."""
    from mssr_basicsr import plot

    plot(arguments.files, arguments.output, arguments.time)
    print(arguments.output)
    return 0
