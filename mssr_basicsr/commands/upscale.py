"""``mssr upscale``: an image, or every image of a folder."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENGINES = ('auto', 'torch')
HELP = 'upscale an image or a folder'
_UNITS = {'': 1, 'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


def parse_size(text: str) -> int:
    """``200KB`` (thousands), ``1.5MiB`` (1024s) or ``200000`` as bytes."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([a-zA-Z]*)', text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(
            f'found {text!r}; allowed: a number of bytes, KB, MB, KiB or MiB, such as 200KB'
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('input', type=Path, help='an image, or a folder of images')
    parser.add_argument('-o', '--output', type=Path, required=True, help='an image, or a folder to write PNGs into')
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--level', type=int, help='default: the largest that is there')
    size.add_argument('--budget', type=parse_size, help='the most bytes of the file to read, such as 200KB')
    parser.add_argument('--tile', type=int, help='side of tiles in input pixels, 0 for none; default: only if large')
    parser.add_argument('--gt', type=Path, help='folder of ground-truth images of the same names: PSNR and SSIM')
    parser.add_argument('--device', help='such as cpu or cuda:1; default: cuda if there is one')
    parser.add_argument(
        '--engine', choices=ENGINES, default='auto', help='auto: on a CPU, convolutions skip zeros where that is faster'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr upscale``: an image, or every image of a folder, at the level or within the bytes asked for."""
    import torch
    from tqdm import tqdm

    from mssr_basicsr import ScalableModel
    from mssr_basicsr.scalable.images import list_images, metrics, read_image, write_image

    inputs = list_images(arguments.input)
    outputs = _output_paths(arguments.input, inputs, arguments.output)
    device = arguments.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    engine = arguments.engine if torch.device(device).type == 'cpu' else 'torch'
    with ScalableModel(arguments.file, arguments.level, max_bytes=arguments.budget, engine=engine) as model:
        model.network.to(device)
        header, level, upscaler = model.header, model.level, model.upscaler
    tiles = functools.partial(tqdm, unit='tile', leave=False, disable=None, file=sys.stderr)
    records, failures = [], []
    with tqdm(total=len(inputs), unit='image', disable=None, file=sys.stderr) as bar:
        for source, target in zip(inputs, outputs):
            bar.set_postfix_str(source.name)
            try:
                result = upscaler.upscale(read_image(source), arguments.tile, bgr=True, progress=tiles)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_image(target, result)
                record: dict[str, Any] = {'input': str(source), 'output': str(target)}
                if arguments.gt is not None:
                    record.update(metrics(result, read_image(_truth(arguments.gt, source)), header.scale))
                records.append(record)
            except (ValueError, OSError) as error:
                if len(inputs) == 1:
                    raise
                failures.append(f'{source}: {error}')
            bar.update()
    means = {
        key: sum(record[key] for record in records) / len(records)
        for key in ('psnr', 'ssim')
        if records and key in records[0]
    }
    parameters, read = header.num_parameters(level), header.section(level).end
    if arguments.json:
        found = {'level': level, 'parameters': parameters, 'bytes_read': read, 'images': records, 'mean': means}
        print(json.dumps({**found, 'failures': failures}, indent=2))
    else:
        print(f'level {level}: {parameters:,} parameters, {read:,} bytes read; {len(records)} images upscaled')
        if means:
            print(f'PSNR {means["psnr"]:.4f} dB, SSIM {means["ssim"]:.4f} on Y')
    for failure in failures:
        print(f'mssr: error: {failure}', file=sys.stderr)
    return 1 if failures else 0


def _output_paths(source: Path, inputs: Sequence[Path], output: Path) -> list[Path]:
    """A file for a file, if ``output`` ends like an image; else PNGs of the same names in the folder ``output``."""
    from mssr_basicsr.scalable.images import SUFFIXES

    if output.suffix:
        if source.is_dir():
            raise ValueError(f'--output: found {output}; allowed: a folder, as the input is one')
        if output.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f'--output: found {output}; allowed: a folder, or a name that ends in {", ".join(SUFFIXES)}'
            )
        return [output]
    targets = [output / f'{file.stem}.png' for file in inputs]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise ValueError(f'{source}: two images there would both become {twice}')
    if {file.resolve() for file in inputs} & {target.resolve() for target in targets}:
        raise ValueError(f'--output: found {output}; allowed: another folder, or the inputs would be overwritten')
    return targets


def _truth(folder: Path, source: Path) -> Path:
    found = [path for path in folder.iterdir() if path.stem == source.stem]
    if len(found) != 1:
        raise ValueError(f'--gt: {folder} has {len(found)} files called {source.stem}; allowed: one')
    return found[0]
