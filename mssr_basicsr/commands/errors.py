"""What a command says on standard error: errors and warnings, each in one line."""

from __future__ import annotations

import os
import sys

_LONGEST = 300  # characters of a text that is not ours; some of torch's are pages


def one_line(error: BaseException) -> str:
    """An error's message in one line; for errors that are not ours, with the type."""
    text = ' '.join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{os.fsdecode(error.filename)}: {error.strerror}'  # as other commands say it
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    shown = text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'
    return f'{type(error).__name__}: {shown} (--debug shows where)'


def say_where_it_ends(file: str | os.PathLike[str], level: int) -> None:
    """Warn that the file ends before any level larger than ``level``, which is used because none was asked for."""
    if level > 0:
        print(f'mssr: {os.fspath(file)} ends before level {level - 1} does: using level {level}', file=sys.stderr)
