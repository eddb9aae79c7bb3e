"""``mssr plot``: PSNR over bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = 'PSNR over size'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('files', metavar='FILE.mssr', nargs='+', type=Path)
    parser.add_argument(
        '-o', '--output', type=Path, required=True, help='the image to write; one that exists is overwritten'
    )


def run(arguments: argparse.Namespace) -> int:
    """``mssr plot``: PSNR over cumulative bytes, a line for each file and validation set."""
    from mssr_basicsr import plot

    plot(arguments.files, arguments.output)
    print(arguments.output)
    return 0
