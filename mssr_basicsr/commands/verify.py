"""``mssr verify``: every byte that is there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.model import ScalableModel

HELP = 'check every byte that is there'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr verify``: every section that is there is read, decoded and held against its checksum."""
    with ScalableModel(arguments.file) as model:  # reads, checks and places every section
        file, level = model.file, model.level
    end = file.header.section(level).end
    extra = (file.size or end) - end
    found = {'file': file.name, 'levels': [*range(level, file.header.smallest_level + 1)], 'whole': level == 0}
    found['unusable_bytes'] = extra
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif extra == 0:
        what = 'whole' if level == 0 else f'a whole prefix, of {file.header.sections[-1].end:,} bytes'
        print(f'{file.name}: OK, levels {level} to {file.header.smallest_level}, {end:,} bytes ({what})')
    if extra:
        what = 'the file' if level == 0 else f'level {level}'
        raise ScalableFileError(f'{file.name}: {extra:,} bytes after the end of {what} are of no use')
    return 0
