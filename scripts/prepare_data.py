"""Turn a folder of HR images into the HR/LR pair of LMDBs that BasicSR's PairedImageDataset reads.

    python scripts/prepare_data.py --input DIV2K_HR --output datasets/DIV2K_x2 --scale 2 --sub-image 480 --step 240

writes, with BasicSR's own LmdbMaker,

    OUTPUT/gt.lmdb          dataroot_gt: the images, cropped at the right and bottom to a multiple of the scale
    OUTPUT/lq_x2.lmdb       dataroot_lq: BasicSR's imresize of them (MATLAB bicubic), rounded to 8 bits
    OUTPUT/prepared.json    what it was made with

OUTPUT is complete or absent. Running it again with the same settings does nothing; with others it is refused. Images
are read as `mssr upscale` reads them: upright, palettes and CMYK as RGB, only the first of several frames. Grey images
are stored as grey (PairedImageDataset reads them as three equal channels), alpha is dropped. Images of more than 8 bits
are refused. Only files directly in the input folder are read; those that are not images by their names are skipped and
listed.

With --scale-augment 90 80 70 60, each image is also stored at 0.9, 0.8, 0.7 and 0.6 of its size, as FSRCNN was trained:
edges become sharper, and patches show more. Copies that would be too small are left out and listed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.utils.lmdb_util import LmdbMaker
from tqdm import tqdm

from mssr_basicsr.scalable.evaluation import resize_bicubic
from mssr_basicsr.scalable.images import list_images, read_eight_bits, skipped_message

PNG_LEVEL = 1  # BasicSR's default: higher ones decode no faster


class DataError(ValueError):
    """The data or the arguments are wrong; the text names everything that is."""


def prepare(
    input_dir: str | Path,
    output_dir: str | Path,
    scale: int,
    sub_image: int | None = None,
    step: int | None = None,
    scale_augment: Sequence[int] = (),
) -> bool:
    """Write the HR/LR LMDBs of the images in `input_dir`; return False if `output_dir` holds exactly these already.

    With `sub_image`, squares with that many HR pixels per side are stored, every `step` pixels (default: `sub_image`)
    and once more flush with the right and bottom border, so that nothing is left out. They are cut from the whole image
    and its whole LR image, so no LR pixel is affected by a border that the image does not have. `scale_augment` are the
    sizes, in percent, at which each image is stored besides its own.

    Raises DataError, naming every bad file, before anything is written.
    """
    source, output = Path(input_dir), Path(output_dir)
    step = sub_image if step is None else step
    for name, value in (('scale', scale), ('sub-image', sub_image), ('step', step)):
        if value is not None and value < (2 if name == 'scale' else 1):
            raise DataError(f'--{name} {value} is too small')
        if value is not None and value % scale:
            raise DataError(f'--{name} {value} is not a multiple of the scale, {scale}')
    if step and (not sub_image or step > sub_image):
        raise DataError(f'--step {step} needs a --sub-image of at least that size: pixels would be left out')
    if not set(scale_augment) <= set(range(1, 100)) or len(set(scale_augment)) < len(scale_augment):
        found = ' '.join(map(str, scale_augment))
        raise DataError(f'--scale-augment {found} is not a list of different percentages from 1 to 99')

    paths = _list_images(source, bool(scale_augment))
    settings = {'scale': scale, 'sub_image': sub_image, 'step': step, 'images': len(paths), 'sha256': _digest(paths)}
    settings |= {'scale_augment': list(scale_augment) or None, 'grey files': 'kept grey'}
    databases = ('gt.lmdb', f'lq_x{scale}.lmdb')
    if output.exists():
        _check_prepared(output, databases, settings)
        return False

    smallest = max(sub_image or 0, 4 * scale)  # 4 * scale: the bicubic kernel's width
    map_size, sizes = _check_images(paths, smallest, sub_image, step, scale_augment)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{output.name}.', dir=output.parent) as temporary:
        new = Path(temporary) / 'new'  # a folder inside: the temporary one itself is closed to other users
        new.mkdir()
        # Until a commit, what was put is held in memory: BasicSR's default of 5000 whole images may not fit there.
        hr, lr = (LmdbMaker(str(new / name), map_size, batch=100, compress_level=PNG_LEVEL) for name in databases)
        with closing(hr), closing(lr):
            for path in tqdm(paths, desc='Write', unit='image'):
                for key, gt, lq in _pairs(path, scale, sub_image, step, sizes[path]):
                    hr.put(_png(gt), key, np.atleast_3d(gt).shape)
                    lr.put(_png(lq), key, np.atleast_3d(lq).shape)
        (new / 'prepared.json').write_text(json.dumps(settings, indent=2) + '\n')
        for file in new.rglob('*'):
            if file.is_file():
                with file.open('rb+') as handle:
                    os.fsync(handle.fileno())
        new.rename(output)
    return True


def _list_images(source: Path, with_copies: bool) -> list[Path]:
    """The folder's images, sorted; DataError if there are none or their names cannot be BasicSR's LMDB keys."""
    if not source.is_dir():
        raise DataError(f'{source} is not a folder')
    try:
        paths, others = list_images(source)
    except ValueError as error:
        raise DataError(str(error)) from error
    if others:
        print(f'prepare_data: {skipped_message(source, others)}', file=sys.stderr)
    bad = []
    count = Counter(p.stem for p in paths)
    for path in paths:
        if count[path.stem] > 1:
            bad.append(f'{path.name}: another image has the same name but for the extension')
        elif not re.fullmatch(r'[ -~]+', path.stem) or '.' in path.stem:
            bad.append(f"{path.name}: BasicSR's LMDB keys are ASCII and end at the first dot; rename it")
        elif with_copies and '@' in path.stem:
            bad.append(f'{path.name}: @ marks the copies of --scale-augment; rename it')
    _refuse(source, bad)
    return paths


def _digest(paths: list[Path]) -> str:
    """A hash of the files' names and bytes, so that a fresh copy of the same images counts as the same."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b'\0' + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _check_prepared(output: Path, databases: tuple[str, str], settings: dict[str, Any]) -> None:
    """Return if `output` is what `settings` would make; otherwise DataError, saying how it differs."""
    try:
        found = json.loads((output / 'prepared.json').read_text())
    except (OSError, ValueError):
        raise DataError(f'{output} exists and was not made by this script: choose another folder') from None
    differs = [f'{k} {found.get(k)} there, {v} asked for' for k, v in settings.items() if found.get(k) != v]
    differs = differs or [f'{d} is missing there' for d in databases if not (output / d / 'data.mdb').is_file()]
    if differs:
        raise DataError(f'{output} holds something else ({"; ".join(differs)}): remove it or choose another folder')


def _check_images(
    paths: list[Path], smallest: int, sub_image: int | None, step: int | None, scale_augment: Sequence[int]
) -> tuple[int, dict[Path, list[int]]]:
    """Decode every image; a bound on the HR LMDB's size in bytes, and the sizes of each image, in percent.

    Raises DataError naming all that are bad. Copies that would be too small are no such reason; they are listed.
    """
    bad, left_out, map_size = [], [], 1 << 20
    sizes: dict[Path, list[int]] = {}
    for path in tqdm(paths, desc='Check', unit='image'):
        try:
            shape = read_eight_bits(path).shape[:2]
        except ValueError as error:
            bad.append(str(error).removeprefix(f'{path.parent}{os.sep}'))
            continue
        except OSError as error:
            bad.append(f'{path.name}: {error.strerror}')
            continue
        if min(shape) < smallest:
            bad.append(f'{path.name}: {shape[1]}x{shape[0]} is too small, it must be at least {smallest}x{smallest}')
        sizes[path] = [100]
        for percent in scale_augment:
            if min(_shape_at(shape, percent)) < smallest:
                left_out.append(f'{path.name} at {percent} %')
            else:
                sizes[path].append(percent)
        map_size += sum(_size_bound(_shape_at(shape, percent), sub_image, step) for percent in sizes[path])
    _refuse(paths[0].parent, bad)
    if left_out:
        reason = f'copies smaller than {smallest}x{smallest} are left out'
        print(f'prepare_data: {reason}: {", ".join(left_out)}', file=sys.stderr)
    return map_size, sizes


def _shape_at(shape: Sequence[int], percent: int) -> list[int]:
    """Of an image that BasicSR's imresize has resized."""
    return [math.ceil(side * (percent / 100)) for side in shape]


def _size_bound(shape: Sequence[int], sub_image: int | None, step: int | None) -> int:
    """More bytes than an image's PNGs can take in an LMDB."""
    if not (sub_image and step):
        return _entry_bound(*shape)
    return math.prod(len(_starts(side, sub_image, step)) for side in shape) * _entry_bound(sub_image, sub_image)


def _entry_bound(height: int, width: int) -> int:
    """More bytes than a PNG of that size can take in an LMDB: noise compresses to slightly more than its raw size."""
    return int(3.3 * height * width) + 16 * height + 32768


def _refuse(folder: Path, bad: list[str]) -> None:
    if bad:
        raise DataError('\n  '.join([f'{len(bad)} bad image(s) in {folder}, nothing was written:', *bad]))


def _pairs(
    path: Path, scale: int, sub_image: int | None, step: int | None, sizes: Sequence[int]
) -> Iterator[tuple[str, Any, Any]]:
    """Each (key, HR, LR) of one image at its sizes (percent), HR exactly `scale` times as large as LR."""
    image = read_eight_bits(path)  # a grey file stays one: evaluation makes a difference
    for percent in sizes:
        gt, key = image, path.stem
        if percent < 100:
            gt, key = resize_bicubic(image, percent / 100), f'{key}@{percent}'
        height, width = (side - side % scale for side in gt.shape[:2])
        gt = gt[:height, :width]
        lq = resize_bicubic(gt, 1 / scale)
        if not (sub_image and step):
            yield key, gt, lq
            continue
        corners = ((top, left) for top in _starts(height, sub_image, step) for left in _starts(width, sub_image, step))
        for index, (top, left) in enumerate(corners, 1):
            y, x, size = top // scale, left // scale, sub_image // scale
            hr_square = gt[top : top + sub_image, left : left + sub_image]
            yield f'{key}_s{index:03d}', hr_square, lq[y : y + size, x : x + size]


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where squares start along one side: every `step`, and flush with the far border."""
    return sorted({*range(0, length - size + 1, step), length - size})


def _png(image: Any) -> bytes:
    return cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])[1].tobytes()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='folder of HR images')
    parser.add_argument('--output', required=True, help='folder to make')
    parser.add_argument('--scale', type=int, required=True, help='upscaling factor, for instance 2')
    parser.add_argument('--sub-image', type=int, metavar='SIZE', help='cut into squares of SIZE HR pixels (training)')
    parser.add_argument('--step', type=int, help='HR pixels from one square to the next (default: SIZE)')
    parser.add_argument(
        '--scale-augment', type=int, nargs='+', default=[], metavar='PERCENT', help='also store copies of these sizes'
    )
    args = parser.parse_args(argv)
    try:
        made = prepare(args.input, args.output, args.scale, args.sub_image, args.step, args.scale_augment)
    except DataError as error:
        sys.exit(f'prepare_data: {error}')
    print(f'{args.output}: {"prepared" if made else "already prepared"}')


if __name__ == '__main__':
    main()
