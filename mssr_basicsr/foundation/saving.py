"""Saved files are complete or absent: they are written under another name, flushed, and then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mssr_basicsr.foundation.checks import OptionError

PREFIX = '.saving-'  # of the names that files have before they are whole
_NO_REGULAR_FILE = 'a device, a pipe or a socket'


@contextmanager
def saved_whole(path_options: MutableMapping[str, Any], key: str) -> Iterator[Path]:
    """While the context is open, ``path_options[key]`` is a temporary folder, whose contents are moved at the end.

    This makes BasicSR's own save methods safe: a run killed at any moment leaves the old file or the new one, and a
    failed save, which BasicSR ignores after three tries, is an error. The context's value is the temporary folder.

    Raises:
        OSError: nothing was written, or a file is truncated (full disk); the text says where, why, and what is free.
    """
    folder = Path(path_options[key])
    with _failure_explained(folder), tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as temporary:
        path_options[key] = temporary
        try:
            yield Path(temporary)
            for file in complete_files(Path(temporary)):
                with open(file, 'rb') as written:
                    os.fsync(written.fileno())
                os.replace(file, folder / file.name)
            _flush_folder(folder)
        finally:
            path_options[key] = str(folder)


def complete_files(folder: Path) -> list[Path]:
    """The files in ``folder``; OSError if there is none or a checkpoint is truncated."""
    files = list(folder.iterdir())
    if not files:
        raise OSError('nothing could be written')
    for file in files:
        # torch.save writes a zip archive, whose directory comes last: if that is there, so is everything else.
        if file.suffix in ('.pth', '.state') and not zipfile.is_zipfile(file):
            raise OSError(f'{file.name} is truncated')
    return files


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, complete or not at all, and flush it to the disk; OSError if this fails.

    Missing folders are made. If ``path`` is a link, the file that it leads to is written, and the link stays. A device,
    a pipe or a socket is never replaced.
    """
    path = _followed(path)
    temporary = path.with_name(f'{PREFIX}{secrets.token_hex(6)}')  # the file's own name may be as long as is allowed
    with _failure_explained(path):
        if path.exists() and not path.is_file():
            raise OSError(f'it is {_NO_REGULAR_FILE}')
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, 'wb') as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if path.exists():  # as with cp, who may read it stays as it is
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
            _flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def require_other_file(
    output: str | os.PathLike[str], *inputs: str | os.PathLike[str], option: str = '--output'
) -> None:
    """Raise OptionError if ``output`` is one of the ``inputs``, even under another spelling or through a link.

    Any other existing file is overwritten, as by ``cp`` and ``convert``.
    """
    for path in inputs:
        linked = os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path)
        if linked or os.path.realpath(output) == os.path.realpath(path):
            raise OptionError(option, str(output), f'a file other than the input {path}')


def require_regular_file(output: str | os.PathLike[str], option: str = '--output') -> None:
    """Raise OptionError if ``output`` is there and is no file, or read-only, or if no file can have this name."""
    try:
        mode = os.stat(output).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # a name that is too long, links in a circle
        raise OptionError(option, str(output), f'a path that the system accepts ({error.strerror})') from error
    if not stat.S_ISREG(mode):
        found = 'a folder' if stat.S_ISDIR(mode) else _NO_REGULAR_FILE
        raise OptionError(option, str(output), f'a file; this is {found}')
    # To replace it would only take the folder's permission; and to root, access says that all files can be written.
    if not mode & 0o222 or not os.access(output, os.W_OK):
        raise OptionError(option, str(output), 'a file that can be written; this one is read-only')


def require_writable_folder(output: str | os.PathLike[str], option: str = '--output') -> None:
    """Raise OptionError unless the folder of ``output`` can be written in, or made; nothing is left behind."""
    standing = next((parent for parent in _followed(output).parents if os.path.lexists(parent)), Path())
    if not standing.is_dir():
        raise OptionError(option, str(output), f'a path inside a folder; {standing} is not one')
    try:
        tempfile.TemporaryFile(prefix=PREFIX, dir=standing).close()
    except OSError as error:
        allowed = f'a path in a folder that can be written in; {standing} cannot ({error.strerror})'
        raise OptionError(option, str(output), allowed) from error


def require_output(output: str | os.PathLike[str], *inputs: str | os.PathLike[str], option: str = '--output') -> None:
    """Raise OptionError unless ``output`` can be written and is none of the ``inputs``; called before work starts."""
    require_regular_file(output, option)
    require_writable_folder(output, option)
    require_other_file(output, *inputs, option=option)


def remove_leftovers(*folders: str) -> None:
    """Remove the partial files that a process left in these folders when it was killed while saving."""
    for folder in folders:
        for leftover in Path(folder).glob(f'{PREFIX}*'):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _followed(path: str | os.PathLike[str]) -> Path:
    """The path, or where it leads if it is a link."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power failure. This is not possible where folders cannot be opened (Windows)."""
    if hasattr(os, 'O_DIRECTORY'):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _failure_explained(path: Path) -> Iterator[None]:
    """Turn failures within the context into an OSError that says what could not be saved, why, and what is free."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises either
        folder = path if path.is_dir() else path.parent
        free = f' ({shutil.disk_usage(folder).free:,} bytes are free there)' if folder.is_dir() else ''
        raise OSError(f'{path}: saving failed{free}: {error}') from error
