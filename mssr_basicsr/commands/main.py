"""The command mssr: one file that holds every size, made, looked at, taken apart and used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mssr_basicsr import __version__

COMMANDS = ('info', 'verify', 'upscale', 'extract', 'export', 'plot', 'pack', 'benchmark')


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``mssr``, with a parser for each module of :data:`COMMANDS`.

    A command's module has ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``, which returns the exit status.
    """
    parser = argparse.ArgumentParser(prog='mssr', description=__doc__)
    parser.add_argument('--version', action='version', version=f'mssr-basicsr {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for name in COMMANDS:
        module = import_module(f'mssr_basicsr.commands.{name}')
        command = commands.add_parser(name, help=module.HELP, description=module.run.__doc__.replace('``', ''))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 1 it could not be done (one line says why), 2 wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f'mssr: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
