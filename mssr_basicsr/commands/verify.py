"""``mssr verify``: every byte that is there."""

from __future__ import annotations

import argparse
from pathlib import Path

from mssr_basicsr.foundation.json_text import as_json

HELP = 'check every byte of the file'
EXAMPLES = ('mssr verify net_g.mssr',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr verify``: read and decode every section that is present, and check it against its checksum."""
    from mssr_basicsr import ScalableFileError, verify

    found = verify(arguments.file)
    largest, smallest = found['levels'][0], found['levels'][-1]
    if arguments.json:
        print(as_json(found))
    else:
        what = 'whole' if found['whole'] else 'a whole prefix'
        print(f'{found["file"]}: OK, levels {largest} to {smallest}, {found["bytes"]:,} bytes ({what})')
    if found['unusable_bytes']:
        reason = 'since no level has them' if found['whole'] else f'since level {largest - 1} has more'
        raise ScalableFileError(f'{found["file"]}: the last {found["unusable_bytes"]:,} bytes are unusable, {reason}')
    return 0
