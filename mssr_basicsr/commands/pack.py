"""``mssr pack``: a checkpoint becomes one file."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mssr_basicsr.commands import info
from mssr_basicsr.foundation.checks import OptionError, require_folder
from mssr_basicsr.foundation.json_text import as_json

if TYPE_CHECKING:
    from mssr_basicsr.scalable.pixels import Image

HELP = 'turn a checkpoint into a .mssr file'
EXAMPLES = ('mssr pack net_g_latest.pth --opt backward.yml -o net_g.mssr --dtype int8 --gt Set5/ --gt Set14/',)

_Metrics = dict[str, dict[str, dict[str, float]]]  # by level, validation set and metric
_DTYPES = {'fp32': 'F32', 'fp16': 'F16', 'bf16': 'BF16', 'int8': 'I8'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', type=Path, help='net_g_latest.pth of the backward stage')
    parser.add_argument('-opt', '--opt', type=Path, required=True, help='the YAML that it was trained or tested with')
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        help='default: beside the checkpoint, as .mssr; an existing one is overwritten',
    )
    parser.add_argument(
        '--dtype',
        choices=_DTYPES,
        default='fp32',
        help='of the stored prunable weights (fp32: lossless; int8: one scale per output channel)',
    )
    parser.add_argument(
        '--metadata',
        action='append',
        type=_key_and_text,
        default=[],
        metavar='KEY=TEXT',
        help='a line about the model, such as license=..., author=..., training_data=..., description=..., date=...; '
        'can be repeated',
    )
    parser.add_argument(
        '--gt',
        action='append',
        type=Path,
        default=[],
        help='folder of ground-truth images: measure each level, and store the results; can be repeated',
    )
    parser.add_argument(
        '--lq',
        action='append',
        type=Path,
        default=[],
        help='folder of the LR images, one for each --gt; default: the ground truth, downscaled by bicubic',
    )
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr pack``: a checkpoint of the backward stage becomes a ``.mssr`` file."""
    from mssr_basicsr.foundation.on_demand import require_basicsr

    require_basicsr('to read a checkpoint of MSSR')
    from mssr_basicsr import load_checkpoint, pack
    from mssr_basicsr.adapter.records import RECORDS
    from mssr_basicsr.foundation.saving import require_output, write_whole
    from mssr_basicsr.scalable.evaluation import validation_pairs
    from mssr_basicsr.scalable.images import list_images, skipped_message

    metadata = dict(arguments.metadata)
    if len(metadata) < len(arguments.metadata):
        raise OptionError('--metadata', [key for key, _ in arguments.metadata], 'each key only once')
    output = arguments.output or arguments.checkpoint.with_suffix('.mssr')
    sets = _validation_sets(arguments.gt, arguments.lq)
    images = [file for folder in (*arguments.gt, *arguments.lq) for file in folder.iterdir()]
    require_output(output, arguments.checkpoint, arguments.opt, arguments.checkpoint.with_name(RECORDS), *images)
    if output.suffix != '.mssr':
        raise OptionError('--output', str(output), 'a name that ends in .mssr')
    for folder in arguments.gt:
        passed_over = list_images(folder)[1]
        if passed_over:
            print(f'mssr: {skipped_message(folder, passed_over)}', file=sys.stderr)
    network, scale, metrics = load_checkpoint(arguments.checkpoint, arguments.opt)
    pairs = {name: list(validation_pairs(gt, lq, scale)) for name, (gt, lq) in sets.items()}  # before any is upscaled
    dtype = _DTYPES[arguments.dtype]
    if dtype != 'F32':
        metrics = {}  # they are of the exact values
    data = pack(network, scale, metrics, dtype, metadata)
    changes: _Metrics = {}
    if pairs:
        exact = None if dtype == 'F32' else pack(network, scale)
        measured, changes = _measure(pairs, data, exact, dtype, sys.stderr if arguments.json else sys.stdout)
        for level, values in measured.items():
            metrics.setdefault(level, {}).update(values)
        data = pack(network, scale, metrics, dtype, metadata)
    write_whole(output, data)
    found = info.describe(output)
    for level, change_by_set in changes.items():
        found['levels'][int(level)]['compared_with_F32'] = change_by_set
    print(as_json(found) if arguments.json else info.as_text(found))
    return 0


def _measure(
    pairs: Mapping[str, Sequence[tuple[Image, Image]]], data: bytes, exact: bytes | None, dtype: str, out: TextIO
) -> tuple[_Metrics, _Metrics]:
    """Measure every level of the file ``data``, with values of ``dtype``, and print each result to ``out``.

    Returns:
        The metrics, and how they differ from those of the file ``exact``, if there is one.
    """
    from mssr_basicsr import ScalableModel
    from mssr_basicsr.scalable.evaluation import evaluate_on

    metrics: _Metrics = {}
    changes: _Metrics = {}
    for name, images in pairs.items():
        measured = evaluate_on(images, ScalableModel(io.BytesIO(data)))
        of_exact = {} if exact is None else evaluate_on(images, ScalableModel(io.BytesIO(exact)))
        for level, values in measured.items():
            metrics.setdefault(level, {})[name] = values
            said = f'level {level}: PSNR {values["psnr"]:.4f} dB on {name}'
            if of_exact:
                change = {key: _difference(value, of_exact[level][key]) for key, value in values.items()}
                changes.setdefault(level, {})[name] = change
                said += f' as {dtype}, {change["psnr"]:+.4f} dB compared with F32'
            print(said, file=out)
    return metrics, changes


def _validation_sets(gt: list[Path], lq: list[Path]) -> dict[str, tuple[Path, Path | None]]:
    """The folders of ground truth and, if there are any, of LR images, by the name of the former; all are checked."""
    names = [folder.resolve().name for folder in gt]
    if len(set(names)) < len(names):
        raise OptionError('--gt', list(map(str, gt)), 'folders with different names')
    for folder, name in zip(gt, names):
        if not name.isprintable():
            raise OptionError('--gt', str(folder), 'a folder with a printable name, which the file holds')
    if len(lq) not in (0, len(gt)):
        allowed = f'one folder for each --gt, of which there are {len(gt)}, or none'
        raise OptionError('--lq', list(map(str, lq)), allowed)
    for option, folders in (('--gt', gt), ('--lq', lq)):
        for folder in folders:
            require_folder(option, folder)
    return dict(zip(names, zip_longest(gt, lq)))


def _difference(value: float, exact: float) -> float:
    """``value`` minus ``exact``; of equal ones 0, even of infinite ones."""
    return 0.0 if value == exact else value - exact


def _key_and_text(argument: str) -> tuple[str, str]:
    key, separator, text = argument.partition('=')
    if not (key and separator and argument.isprintable()):
        raise argparse.ArgumentTypeError(f'found {argument!r}; allowed: key=text, in printable characters')
    return key, text
