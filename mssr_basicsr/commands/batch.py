"""Which output file each image is upscaled to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.saving import require_other_file, require_regular_file, require_writable_folder
from mssr_basicsr.scalable.images import WRITABLE_SUFFIXES, list_images


class Batch(NamedTuple):
    """What one run of the command upscales."""

    jobs: list[tuple[Path, Path]]  #: input and output of each image
    passed_over: list[Path]  #: what else is in the folder of images, other than the output


def plan_batch(source: Path, output: str, others: Sequence[Path] = ()) -> Batch:
    """One output file if ``output`` is named like an image, otherwise PNGs of the same names in the folder ``output``.

    Images whose names differ only in the extension keep it: ``a.jpg`` and ``a.png`` become ``a.jpg.png`` and
    ``a.png.png``.

    Args:
        source: an image, or a folder of images.
        output: what to write: a folder if it is an existing folder, ends in a separator or has no extension.
        others: other files that the command reads; they are never overwritten either.

    Raises:
        ValueError: an output is one of the inputs, or cannot be written; or there are no images.
        OSError: the source is not there.
    """
    inputs, passed_over = list_images(source)
    target = Path(output)
    if is_folder(output):
        targets = _names_in(target, inputs)
    elif target.suffix.lower() not in WRITABLE_SUFFIXES:
        if source.is_dir():
            targets = _names_in(target, inputs)  # a new folder, whatever it is called
        else:
            allowed = f'a folder, or a name that ends in {", ".join(WRITABLE_SUFFIXES)}'
            raise OptionError('--output', output, allowed)
    elif source.is_dir():
        raise OptionError('--output', output, 'a folder, as the input is one')
    else:
        targets = [target]
    if target.is_file() and targets != [target]:
        raise OptionError('--output', output, 'a folder; this is a file')
    by_path = {os.path.realpath(path): path for path in (*inputs, *others)}
    # An output may be another name of an input: a hard link, or one on a disk that ignores case.
    by_inode = {_inode(path): path for path in (*inputs, *others) if path.exists()}
    for path in targets:
        require_regular_file(path)
        same = by_path.get(os.path.realpath(path)) or (by_inode.get(_inode(path)) if path.exists() else None)
        if same is not None:
            require_other_file(path, same)
    for path in {path.parent: path for path in reversed(targets)}.values():  # the first in each folder
        require_writable_folder(path)
    passed_over = [path for path in passed_over if os.path.realpath(path) != os.path.realpath(target)]
    return Batch(list(zip(inputs, targets)), passed_over)


def is_folder(output: str) -> bool:
    """Whether an output of this name is a folder, existing or not."""
    separators = (os.sep, os.altsep or os.sep)
    return output.endswith(separators) or Path(output).is_dir() or not Path(output).suffix


def _inode(path: Path) -> tuple[int, int]:
    """What all names of one file have in common."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _names_in(folder: Path, inputs: Sequence[Path]) -> list[Path]:
    stems = Counter(path.stem for path in inputs)
    targets = [folder / f'{path.name if stems[path.stem] > 1 else path.stem}.png' for path in inputs]
    twice = [target for target, count in Counter(targets).items() if count > 1]
    if twice:  # a.png.png beside a.png and a.jpg
        allowed = 'different names for the images that would be written to it'
        raise OptionError('--output', str(twice[0]), allowed)
    return targets
