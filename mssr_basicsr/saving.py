"""Saved is whole or absent: files are written under another name, flushed, and then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = '.saving-'  # of the names that files have before they are whole


@contextmanager
def saved_whole(path_options: MutableMapping[str, Any], key: str) -> Iterator[Path]:
    """While the context is open, ``path_options[key]`` is a temporary folder; what was put there is moved at the end.

    The context's value is that folder.

    This makes BasicSR's own save methods safe: a run killed at any moment leaves the old file or the new one, and a
    failed save, which BasicSR passes over after three tries, is an error.

    Raises:
        OSError: nothing was written, or a checkpoint was cut short (a full disk).
    """
    folder = Path(path_options[key])
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as temporary:
        path_options[key] = temporary
        try:
            yield Path(temporary)
        finally:
            path_options[key] = str(folder)
        files = list(Path(temporary).iterdir())
        if not files:
            raise OSError(f'{folder}: nothing could be saved there')
        for file in files:
            # torch.save writes a zip archive, whose directory comes last: where it is there, all is.
            if file.suffix in ('.pth', '.state') and not zipfile.is_zipfile(file):
                raise OSError(f'{folder / file.name}: could not be saved whole; is the disk full?')
            with open(file, 'rb') as written:
                os.fsync(written.fileno())
            os.replace(file, folder / file.name)
        _flush_folder(folder)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is there whole or not at all, and flushed to the disk; OSError if it cannot be."""
    path = Path(path)
    temporary = path.with_name(f'{PREFIX}{path.name}')
    try:
        with open(temporary, 'wb') as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(*folders: str) -> None:
    """Remove what a killed process had not yet moved to its place in these folders."""
    for folder in folders:
        for leftover in Path(folder).glob(f'{PREFIX}*'):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _flush_folder(folder: Path) -> None:
    """Let a rename outlast a power failure. Where folders cannot be opened (Windows) there is no such call."""
    if hasattr(os, 'O_DIRECTORY'):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
