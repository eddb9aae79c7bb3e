"""``mssr pack``: a checkpoint becomes one file."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from mssr_basicsr.commands import info

HELP = 'make a .mssr file of a checkpoint'

_DTYPES = {'fp32': 'F32', 'fp16': 'F16', 'bf16': 'BF16', 'int8': 'I8'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', type=Path, help='net_g_latest.pth of the backward stage')
    parser.add_argument('-opt', '--opt', type=Path, required=True, help='the YAML that it was trained or tested with')
    parser.add_argument('-o', '--output', type=Path, help='default: beside the checkpoint, as .mssr')
    parser.add_argument(
        '--dtype',
        choices=_DTYPES,
        default='fp32',
        help='of the prunable weights (fp32: lossless; int8: with a scale per output channel)',
    )
    parser.add_argument(
        '--metadata',
        action='append',
        type=_key_and_text,
        default=[],
        metavar='KEY=TEXT',
        help='a line about the model, such as license=..., author=..., training_data=..., description=..., date=...; '
        'may be given several times',
    )
    parser.add_argument(
        '--gt', type=Path, help='folder of ground-truth images: measure each level, keep it in the file'
    )
    parser.add_argument('--lq', type=Path, help='folder of their LR images; default: made from them by bicubic')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
    """``mssr pack``: a checkpoint of the backward stage becomes a ``.mssr`` file."""
    from mssr_basicsr.foundation.saving import write_whole
    from mssr_basicsr.scalable.checkpoint import load_checkpoint
    from mssr_basicsr.scalable.packing import pack as pack_network

    metadata = dict(arguments.metadata)
    if len(metadata) < len(arguments.metadata):
        raise ValueError(f'--metadata: found {[key for key, _ in arguments.metadata]}; allowed: each key once')
    network, scale, metrics = load_checkpoint(arguments.checkpoint, arguments.opt)
    output = arguments.output or arguments.checkpoint.with_suffix('.mssr')
    dtype = _DTYPES[arguments.dtype]
    if dtype != 'F32':
        metrics = {}  # they are of the exact values
    data = pack_network(network, scale, metrics, dtype, metadata)
    if arguments.gt is not None:
        measured = _measure(data, arguments.gt, arguments.lq)
        exact = measured if dtype == 'F32' else _measure(pack_network(network, scale), arguments.gt, arguments.lq)
        name = arguments.gt.resolve().name
        merged = {level: {**metrics.get(level, {}), name: values} for level, values in measured.items()}
        data = pack_network(network, scale, merged, dtype, metadata)
        for level, values in measured.items():
            cost = values['psnr'] - exact[level]['psnr']
            line = f'level {level}: PSNR {values["psnr"]:.4f} dB on {name}'
            print(line + ('' if dtype == 'F32' else f' as {dtype}, {cost:+.4f} dB to F32'))
    write_whole(output, data)
    return info.run(argparse.Namespace(file=output, json=arguments.json))


def _measure(data: bytes, gt: Path, lq: Path | None) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of every level of a file's bytes, by level, from 0 on."""
    from mssr_basicsr.scalable.images import metrics, validation_pairs
    from mssr_basicsr.scalable.model import ScalableModel

    model = ScalableModel(io.BytesIO(data), level=0)
    pairs = list(validation_pairs(gt, lq, model.header.scale))
    found = {}
    for level in range(model.header.smallest_level + 1):
        model.shrink(level)
        results = [metrics(model.upscale(small, bgr=True), truth, model.header.scale) for small, truth in pairs]
        found[str(level)] = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
    return found


def _key_and_text(argument: str) -> tuple[str, str]:
    key, separator, text = argument.partition('=')
    if not (key and separator and argument.isprintable()):
        raise argparse.ArgumentTypeError(f'found {argument!r}; allowed: key=text, in printable characters')
    return key, text
