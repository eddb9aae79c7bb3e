"""Saved is whole or absent: files are written under another name, flushed, and then renamed."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def saved_whole(path_options: MutableMapping[str, Any], key: str) -> Iterator[None]:
    """While the context is open, ``path_options[key]`` is a temporary folder; what was put there is moved at the end.

    This makes BasicSR's own save methods safe: a run killed at any moment leaves the old file or the new one, and a
    failed save, which BasicSR passes over after three tries, is an error.

    Raises:
        OSError: nothing was written, or a checkpoint was cut short (a full disk).
    """
    folder = Path(path_options[key])
    with tempfile.TemporaryDirectory(prefix='.saving-', dir=folder) as temporary:
        path_options[key] = temporary
        try:
            yield
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


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is there whole or not at all, and flushed to the disk; OSError if it cannot be."""
    path = Path(path)
    temporary = path.with_name(f'.saving-{path.name}')
    try:
        with open(temporary, 'wb') as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
