"""Make, inspect, convert and use .mssr files, each of which holds every level of one scalable SR model."""

# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module

from mssr_basicsr import __version__
from mssr_basicsr.commands.completion import complete
from mssr_basicsr.commands.errors import one_line

COMMANDS = ('info', 'verify', 'upscale', 'benchmark', 'extract', 'export', 'plot', 'pack')
BUILDING = ('upscale', 'benchmark', 'extract', 'export', 'plot', 'pack')  #: those that build a backbone
COMPLETION = 'Completion with Tab: pip install argcomplete; eval "$(register-python-argcomplete mssr)"'


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``mssr``, with a parser for each module of :data:`COMMANDS`.

    A command's module has ``HELP``, ``EXAMPLES``, ``add_arguments(parser)`` and ``run(arguments)``, which returns the
    exit status.
    """
    parser = argparse.ArgumentParser(
        prog='mssr', description=__doc__, epilog=COMPLETION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--version', action='version', version=f'mssr-basicsr {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for name in COMMANDS:
        module = import_module(f'mssr_basicsr.commands.{name}')
        description = module.run.__doc__.replace('``', '')
        examples = 'examples:\n  ' + '\n  '.join(module.EXAMPLES)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=textwrap.fill(' '.join(description.split())),
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument('--debug', action='store_true', help='show the traceback of an error')
        if name in BUILDING:
            command.add_argument(
                '--import',
                dest='imports',
                metavar='MODULE',
                action='append',
                default=[],
                help="a module that registers the backbone's architecture, such as hat.archs; can be repeated",
            )
        command.set_defaults(run=module.run, refuse=command.error)
    return parser


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register architectures with BasicSR, also from the current folder, as a script there would.

    Raises:
        ValueError: a module cannot be imported; the text says why.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # our own output may be an image, or JSON
                import_module(name)
        except (Exception, SystemExit) as error:  # whatever the module does when it is imported
            raise ValueError(
                f'--import: found {name!r}; allowed: a module ({type(error).__name__}: {error})'
            ) from error


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """While the context is open, SIGTERM and SIGHUP end the process by an exception, which leaves no partial file."""
    known = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]  # Windows has the first
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        known = []
    ours = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Exit status: 0 success, 1 failure (one line says why), 2 wrong usage, 130 interrupted (a line says what was done).
    """
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # the name of a file may be no text, and is no reason to fail
    if sys.stderr is None:  # closed by whoever starts us: print would take stdout instead, and tqdm would fail
        sys.stderr = open(os.devnull, 'w')  # noqa: SIM115  (as long as the process)
    try:
        parser = build_parser()
        if '_ARGCOMPLETE' in os.environ:  # the shell asks what may come next
            complete(parser)
        arguments, unknown = parser.parse_known_args(words)
        if unknown:  # argparse would show the usage of mssr, not of the command
            arguments.refuse(f'unrecognized arguments: {" ".join(unknown)}')
        if '' in words:  # of a variable that is not set; as a path, it would be the current folder
            arguments.refuse('found an empty argument; allowed: a name, a number or a text')
        import_modules(getattr(arguments, 'imports', []))
        with _ended_in_order():
            status = int(arguments.run(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads what we print has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt as interrupt:
        done = str(interrupt) or 'nothing was written'
        print(f'mssr: interrupted; {done}', file=sys.stderr)
        return 130
    except Exception as error:
        if '--debug' in words:
            traceback.print_exc()
        print(f'mssr: error: {one_line(error)}', file=sys.stderr)
        return 1
