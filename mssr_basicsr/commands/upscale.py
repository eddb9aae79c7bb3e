"""``mssr upscale``: an image, or every image of a folder."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mssr_basicsr.commands.errors import one_line, say_where_it_ends
from mssr_basicsr.foundation.checks import OptionError, require_folder, require_int
from mssr_basicsr.foundation.json_text import as_json
from mssr_basicsr.sparse import ENGINES

if TYPE_CHECKING:
    from mssr_basicsr import ScalableModel

HELP = 'upscale an image or a folder'
EXAMPLES = (
    'mssr upscale net_g.mssr photo.jpg -o large.png --level 4',
    'mssr upscale net_g.mssr photos/ -o large/ --budget 200KB',
    'mssr upscale net_g.mssr lq/ -o sr/ --gt gt/ --json',
    'curl -s URL | mssr upscale net_g.mssr - -o - > large.png',
)
_UNITS = {'': 1, 'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


def parse_size(text: str) -> int:
    """``200KB`` (thousands), ``1.5MiB`` (1024s) or ``200000`` as bytes."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([a-zA-Z]*)', text.strip())
    unit = None if match is None else _UNITS.get(match[2].upper())
    size = math.inf if match is None or unit is None else float(match[1]) * unit
    if math.isinf(size):  # also a number of hundreds of digits
        raise argparse.ArgumentTypeError(
            f'found {text[:80]!r}; allowed: a number of bytes, KB, MB, GB, KiB, MiB or GiB, such as 200KB'
        )
    return int(size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('input', help='an image, a folder of images, or - for an image from standard input')
    parser.add_argument(
        '-o',
        '--output',
        required=True,
        help='an image, a folder to write PNGs into, or - for a PNG to standard output; existing files are '
        'overwritten, but never an input',
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--level', type=int, help='default: the largest in the file')
    size.add_argument('--budget', type=parse_size, help='how many bytes of the file to read at most, such as 200KB')
    parser.add_argument(
        '--tile', type=int, help='tile size in input pixels, 0 for no tiles; default: what fits the cache'
    )
    parser.add_argument('--gt', type=Path, help='folder of ground-truth images with the same names, for PSNR and SSIM')
    parser.add_argument('--device', help='such as cpu or cuda:1; default: cuda if available')
    parser.add_argument(
        '--engine', choices=ENGINES, default='auto', help='auto: on a CPU, convolutions skip zeros where that is faster'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr upscale``: an image, or every image in a folder, at the given level or within the given budget."""
    from mssr_basicsr.commands.batch import is_folder

    with contextlib.ExitStack() as stack:
        source, output = Path(arguments.input), arguments.output
        streams = '-' in (arguments.input, output)
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if streams else ''
        names = {}  # of files in the temporary folder, for people
        if arguments.input == '-':
            if arguments.gt is not None:
                raise OptionError('--gt', str(arguments.gt), 'nothing, with an image from standard input')
            source = Path(folder, 'standard input')
            names[source] = '-'
            source.write_bytes(_stream('stdin').read())
        if output == '-':
            if source.is_dir():
                raise OptionError('--output', output, 'a folder, as the input is one')
            _stream('stdout')
            output = str(Path(folder, 'standard output.png'))
            names[Path(output)] = '-'
        elif source in names and is_folder(output):
            raise OptionError('--output', output, 'an image, or -, as the input is standard input')
        with contextlib.redirect_stdout(sys.stderr if Path(output) in names else sys.stdout):
            status = _upscale(arguments, source, output, names)
        if status == 0 and Path(output) in names:
            _stream('stdout').write(Path(output).read_bytes())
        return status


def _stream(name: str) -> BinaryIO:
    """Standard input or output, for bytes; ValueError if it is closed."""
    stream: BinaryIO | None = getattr(getattr(sys, name), 'buffer', None)
    if stream is None:
        raise ValueError(f'-: {name} is closed')
    return stream


def _upscale(arguments: argparse.Namespace, source: Path, output: str, names: Mapping[Path, str]) -> int:
    """Upscale every image and report on it; ``names`` are what to call files in the temporary folder."""
    from tqdm import tqdm

    from mssr_basicsr.commands.batch import plan_batch
    from mssr_basicsr.scalable.images import skipped_message

    if arguments.tile is not None:
        require_int('--tile', arguments.tile, 0)
    truths = _truths(arguments.gt)
    others = [arguments.file, *(arguments.gt.iterdir() if arguments.gt is not None else ())]
    jobs, passed_over = plan_batch(source, output, others)
    if passed_over:
        print(f'mssr: {skipped_message(source, passed_over)}', file=sys.stderr)
    model = _load(arguments)  # imports torch, which takes seconds: only once the paths are known to be right

    def work(source: Path, target: Path) -> dict[str, Any]:
        found = _upscale_image(model, source, target, arguments, truths)
        called = {'input': names.get(source, str(source)), 'output': names.get(target, str(target))}
        if found['lost']:
            tqdm.write(f'mssr: {called["output"]}: not kept: {"; ".join(found["lost"])}', file=sys.stderr)
        return {**called, **found}

    records, failures = _each(jobs, work, arguments.debug)
    for path, name in names.items():
        failures = [failure.replace(str(path), name) for failure in failures]
    _report(model, records, failures, arguments.json)
    return 1 if failures else 0


def _load(arguments: argparse.Namespace) -> ScalableModel:
    """The model at the level and on the device that the arguments ask for; its file is closed."""
    from mssr_basicsr import ScalableModel

    device = _device(arguments.device)
    engine = arguments.engine if device.startswith('cpu') else 'torch'
    with ScalableModel(arguments.file, arguments.level, max_bytes=arguments.budget, engine=engine) as model:
        model.network.to(device)
        largest = min(model.file.available())
    if model.level == largest and arguments.level is None:
        say_where_it_ends(arguments.file, model.level)
    return model


def _upscale_image(
    model: ScalableModel, source: Path, target: Path, arguments: argparse.Namespace, truths: Mapping[str, Path]
) -> dict[str, Any]:
    """Upscale one image; returns what the output file lost and, with ground truth, the metrics.

    All that can be wrong with the files is found before the network runs.
    """
    from tqdm import tqdm

    from mssr_basicsr.scalable.images import check_writable, read_image, write_image
    from mssr_basicsr.scalable.metrics import check_truth, metrics

    picture, scale = read_image(source), model.header.scale
    truth = None if arguments.gt is None else read_image(_truth(arguments.gt, truths, source)).pixels
    height, width = (side * scale for side in picture.pixels.shape[:2])
    check_writable(target, height, width)
    if truth is not None:
        check_truth(truth, (height, width, *picture.pixels.shape[2:]), scale)
    progress = functools.partial(tqdm, unit='tile', leave=False, disable=None, file=sys.stderr)
    result = model.upscaler.upscale(picture.pixels, arguments.tile, bgr=True, progress=progress)
    lost = picture.lost + write_image(target, result, picture.icc)
    return {'lost': lost, **({} if truth is None else metrics(result, truth, scale))}


def _report(model: ScalableModel, records: list[dict[str, Any]], failures: list[str], json: bool) -> None:
    """Print what was done, for people or as JSON, and a line for each failure."""
    measured = [record for record in records if 'psnr' in record]
    means = {key: sum(one[key] for one in measured) / len(measured) for key in ('psnr', 'ssim') if measured}
    level = model.level
    parameters, read = model.header.num_parameters(level), model.header.section(level).end
    if json:
        found = {'level': level, 'parameters': parameters, 'bytes_read': read, 'images': records, 'mean': means}
        print(as_json({**found, 'failures': failures}))
    else:
        count = f'{len(records)} of {len(records) + len(failures)} images upscaled'
        print(f'level {level}: {parameters:,} parameters, {read:,} bytes read; {count}')
        if means:
            print(f'PSNR {means["psnr"]:.4f} dB, SSIM {means["ssim"]:.4f} on Y of {len(measured)} images')
    for failure in failures:
        print(f'mssr: error: {failure}', file=sys.stderr)


def _each(
    jobs: Sequence[tuple[Path, Path]], work: Callable[[Path, Path], dict[str, Any]], debug: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The result of ``work`` for each image, and a line for each that fails, which does not stop the others."""
    from tqdm import tqdm

    records, failures = [], []
    try:
        with tqdm(total=len(jobs), unit='image', disable=None, file=sys.stderr) as bar:
            for source, target in jobs:
                bar.set_postfix_str(source.name)
                try:
                    records.append(work(source, target))
                except Exception as error:  # whatever OpenCV or torch raises of this image
                    if debug:
                        traceback.print_exc()
                    failures.append(_named(source, error))
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'{len(records)} of {len(jobs)} images were upscaled') from None
    return records, failures


def _named(source: Path, error: Exception) -> str:
    """An error in one line that names the image."""
    text = one_line(error)
    return text if text.startswith(str(source)) else f'{source}: {text}'


def _device(name: str | None) -> str:
    """The requested device, or the best available one; OptionError if it is not available."""
    import torch

    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # torch raises RuntimeError, AssertionError and what its backends do
        here = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        raise OptionError('--device', name, f'{", ".join(here)}, or another device that torch has here') from error
    return name


def _truths(folder: Path | None) -> dict[str, Path]:
    """The ground-truth files by name without extension, leaving out ambiguous names."""
    if folder is None:
        return {}
    require_folder('--gt', folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    stems = Counter(path.stem for path in files)
    return {path.stem: path for path in files if stems[path.stem] == 1}


def _truth(folder: Path, truths: Mapping[str, Path], source: Path) -> Path:
    if source.stem not in truths:
        raise OptionError('--gt', str(folder), f'one file there called {source.stem}, with any extension')
    return truths[source.stem]
