"""``mssr info``: the table of levels."""

from __future__ import annotations

import argparse
from pathlib import Path

from mssr_basicsr.commands.json_text import as_json

HELP = 'metadata and the table of levels: parameters, bytes, PSNR'
EXAMPLES = ('mssr info net_g.mssr',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr info``: metadata and the table of levels: parameters, bytes, PSNR."""
    from mssr_basicsr import ScalableFile
    from mssr_basicsr.scalable.description import level_table
    from mssr_basicsr.sparse.library import engine_name

    with ScalableFile(arguments.file) as file:
        found = {**file.describe(), 'engine': engine_name()}
    if arguments.json:
        print(as_json(found))
        return 0
    options = ', '.join(f'{key}={value}' for key, value in found['backbone'].items() if key != 'type')
    state = 'whole' if found['file_bytes'] == found['whole_bytes'] else f'of {found["whole_bytes"]:,}'
    print(f'{found["file"]}: {found["backbone"]["type"]} x{found["scale"]} ({options})')
    print(f'{found["file_bytes"]:,} bytes ({state}), values {found["dtype"]}')
    print(f'engine: {found["engine"]}')
    for key, text in found['metadata'].items():
        print(f'{key}: {text}')
    print(level_table(found['levels']))
    return 0
