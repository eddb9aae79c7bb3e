"""Completion in the shell, by argcomplete: of commands, options, choices, and the files that an argument takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

_FILES = {'file': ['mssr'], 'files': ['mssr'], 'checkpoint': ['pth'], 'opt': ['yml', 'yaml'], 'input': [], 'output': []}
_FOLDERS = ('gt', 'lq')


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process; without argcomplete, return."""
    try:
        from argcomplete import autocomplete
        from argcomplete.completers import DirectoriesCompleter, FilesCompleter
    except ImportError:
        return

    def files(prefix: str, action: argparse.Action, **_: Any) -> Iterable[str]:
        found: Iterable[str] = []
        if action.dest in _FOLDERS:
            found = DirectoriesCompleter()(prefix)
        elif action.dest in _FILES:
            found = FilesCompleter(_FILES[action.dest])(prefix)
        return found

    autocomplete(parser, always_complete_options=False, default_completer=files)  # type: ignore[arg-type]
