"""The command mssr: one file that holds every size, made, looked at, taken apart and used."""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mssr_basicsr import __version__
from mssr_basicsr.foundation.tables import table_with_metrics
from mssr_basicsr.scalable.errors import ScalableFileError

_UNITS = {'': 1, 'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


def parse_size(text: str) -> int:
    """``200KB`` (thousands), ``1.5MiB`` (1024s) or ``200000`` as bytes."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([a-zA-Z]*)', text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(
            f'found {text!r}; allowed: a number of bytes, KB, MB, KiB or MiB, such as 200KB'
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


# ------------------------------ what a file holds ------------------------------ #


def describe(file: Any) -> dict[str, Any]:
    """What a :class:`ScalableFile` holds, as JSON values: a record for each level, largest first."""
    header, present = file.header, set(file.available())
    total = header.num_parameters(0)
    levels = [
        {
            'level': section.level,
            'parameters': header.num_parameters(section.level),
            'density': header.num_parameters(section.level) / total,
            'bytes': section.end if section.level == header.smallest_level else section.size,
            'cumulative_bytes': section.end,
            'present': section.level in present,
            'metrics': header.metrics.get(str(section.level), {}),
        }
        for section in reversed(header.sections)
    ]
    return {
        'file': file.name,
        'backbone': header.backbone,
        'scale': header.scale,
        'dtype': header.dtype,
        'file_bytes': file.size,
        'whole_bytes': header.sections[-1].end,
        'levels': levels,
    }


def level_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """The records of :func:`describe` as text, with a column for each metric of each validation set."""
    head = ['level', 'parameters', 'density', 'bytes', 'cumulative']
    cells = [
        [
            f'{row["level"]}{"" if row["present"] else " (not there)"}',
            f'{row["parameters"]:,}',
            f'{row["density"]:.2%}',
            f'{row["bytes"]:,}',
            f'{row["cumulative_bytes"]:,}',
        ]
        for row in levels
    ]
    return table_with_metrics(head, cells, levels)


def info(arguments: argparse.Namespace) -> int:
    """``mssr info``: the table of levels."""
    from mssr_basicsr import ScalableFile

    with ScalableFile(arguments.file) as file:
        found = describe(file)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    options = ', '.join(f'{key}={value}' for key, value in found['backbone'].items() if key != 'type')
    state = 'whole' if found['file_bytes'] == found['whole_bytes'] else f'of {found["whole_bytes"]:,}'
    print(f'{found["file"]}: {found["backbone"]["type"]} x{found["scale"]} ({options})')
    print(f'{found["file_bytes"]:,} bytes ({state}), values {found["dtype"]}')
    print(level_table(found['levels']))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """``mssr verify``: every section that is there is read, decoded and held against its checksum."""
    from mssr_basicsr import ScalableModel

    with ScalableModel(arguments.file) as model:  # reads, checks and places every section
        file, level = model.file, model.level
    end = file.header.section(level).end
    extra = (file.size or end) - end
    found = {'file': file.name, 'levels': [*range(level, file.header.smallest_level + 1)], 'whole': level == 0}
    found['unusable_bytes'] = extra
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif extra == 0:
        what = 'whole' if level == 0 else f'a whole prefix, of {file.header.sections[-1].end:,} bytes'
        print(f'{file.name}: OK, levels {level} to {file.header.smallest_level}, {end:,} bytes ({what})')
    if extra:
        what = 'the file' if level == 0 else f'level {level}'
        raise ScalableFileError(f'{file.name}: {extra:,} bytes after the end of {what} are of no use')
    return 0


# ------------------------------ making and taking apart ------------------------------ #


def pack(arguments: argparse.Namespace) -> int:
    """``mssr pack``: a checkpoint of the backward stage becomes a ``.mssr`` file."""
    from mssr_basicsr.foundation.saving import write_whole
    from mssr_basicsr.scalable.checkpoint import load_checkpoint
    from mssr_basicsr.scalable.packing import pack as pack_network

    network, scale, metrics = load_checkpoint(arguments.checkpoint, arguments.opt)
    output = arguments.output or arguments.checkpoint.with_suffix('.mssr')
    dtype = arguments.dtype.upper().replace('P', '')
    if dtype != 'F32':
        metrics = {}  # they are of the exact values
    data = pack_network(network, scale, metrics, dtype)
    if arguments.gt is not None:
        measured = _measure(data, arguments.gt, arguments.lq)
        exact = measured if dtype == 'F32' else _measure(pack_network(network, scale), arguments.gt, arguments.lq)
        name = arguments.gt.resolve().name
        merged = {level: {**metrics.get(level, {}), name: values} for level, values in measured.items()}
        data = pack_network(network, scale, merged, dtype)
        for level, values in measured.items():
            cost = values['psnr'] - exact[level]['psnr']
            line = f'level {level}: PSNR {values["psnr"]:.4f} dB on {name}'
            print(line + ('' if dtype == 'F32' else f' as {dtype}, {cost:+.4f} dB to F32'))
    write_whole(output, data)
    return info(argparse.Namespace(file=output, json=arguments.json))


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


def extract(arguments: argparse.Namespace) -> int:
    """``mssr extract``: a level as a plain checkpoint, or the levels from it on down as a smaller ``.mssr``."""
    import safetensors.torch
    import torch

    from mssr_basicsr import ScalableModel
    from mssr_basicsr.foundation.saving import write_whole
    from mssr_basicsr.scalable.spandrel_names import for_spandrel

    output: Path = arguments.output
    if output.suffix not in ('.pth', '.safetensors', '.mssr'):
        raise ValueError(f'--output: found {output}; allowed: a name that ends in .pth, .safetensors or .mssr')
    with ScalableModel(arguments.file, arguments.level) as model:
        level, state = model.level, model.network.state_dict()
        what = f'level {level}'
        if arguments.spandrel:
            state = for_spandrel(state, model.header.backbone)
        if output.suffix == '.mssr':
            data = model.file.read_prefix(level)
            what = f'levels {level} to {model.header.smallest_level}'
        elif output.suffix == '.safetensors':
            data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        else:
            buffer = io.BytesIO()
            torch.save({'params': state}, buffer)
            data = buffer.getvalue()
    write_whole(output, data)
    print(f'{output}: {what}, {len(data):,} bytes')
    return 0


def export(arguments: argparse.Namespace) -> int:
    """``mssr export``: a level as an ONNX model of any height and width."""
    import torch

    from mssr_basicsr import ScalableModel
    from mssr_basicsr.foundation.saving import write_whole

    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError as error:
        raise ValueError(f'{error.name} is needed: pip install "mssr-basicsr[onnx]"') from error
    with ScalableModel(arguments.file, arguments.level) as model:
        network, level, upscaler = model.network, model.level, model.upscaler
    example = torch.rand(1, upscaler.channels, 2 * max(8, upscaler.multiple), 3 * max(8, upscaler.multiple))
    any_size = torch.export.Dim.DYNAMIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'level.onnx')
        torch.onnx.export(
            network,
            (example,),
            path,
            input_names=['input'],
            output_names=['output'],
            dynamic_shapes=({2: any_size, 3: any_size},),
            opset_version=arguments.opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        opset = onnx.load(path).opset_import[0].version
        write_whole(arguments.onnx, path.read_bytes())
    size = f'; height and width must be multiples of {upscaler.multiple}' if upscaler.multiple > 1 else ''
    print(f'{arguments.onnx}: level {level}, opset {opset}, float32 RGB in [0, 1], (1, C, H, W){size}')
    return 0


def plot(arguments: argparse.Namespace) -> int:
    """``mssr plot``: PSNR over cumulative bytes, a line for each file and validation set."""
    from mssr_basicsr import ScalableFile

    try:
        import matplotlib
    except ImportError as error:
        raise ValueError('matplotlib is needed: pip install "mssr-basicsr[plot]"') from error
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for path in arguments.files:
        with ScalableFile(path) as file:
            levels = describe(file)['levels']
        names = sorted({name for row in levels for name in row['metrics']})
        if not names:
            raise ValueError(f'{path}: no PSNR is known of it; pack it with --gt')
        for name in names:
            rows = [row for row in levels if 'psnr' in row['metrics'].get(name, {})]
            sizes = [row['cumulative_bytes'] / 1000 for row in rows]
            psnr = [row['metrics'][name]['psnr'] for row in rows]
            axes.plot(sizes, psnr, marker='o', label=f'{name}, {Path(path).stem}')
            for row, x, y in zip(rows, sizes, psnr):
                axes.annotate(f'{row["level"]}', (x, y), textcoords='offset points', xytext=(4, 5))
    axes.set_xscale('log')
    axes.set_xlabel('KB of the file that are read, up to each level')
    axes.set_ylabel('PSNR (dB)')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    figure.savefig(arguments.output, dpi=150)
    print(arguments.output)
    return 0


# ------------------------------ upscaling ------------------------------ #


def upscale(arguments: argparse.Namespace) -> int:
    """``mssr upscale``: an image, or every image of a folder, at the level or within the bytes asked for."""
    import torch
    from tqdm import tqdm

    from mssr_basicsr import ScalableModel
    from mssr_basicsr.scalable.images import list_images, metrics, read_image, write_image

    inputs = list_images(arguments.input)
    outputs = _output_paths(arguments.input, inputs, arguments.output)
    device = arguments.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with ScalableModel(arguments.file, arguments.level, max_bytes=arguments.budget) as model:
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


# ------------------------------ the command line ------------------------------ #


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='mssr', description=__doc__)
    parser.add_argument('--version', action='version', version=f'mssr-basicsr {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    def command(name: str, run: Any, help: str, takes_file: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=run.__doc__.replace('``', ''))
        added.set_defaults(run=run)
        if takes_file:
            added.add_argument('file', metavar='FILE.mssr', type=Path)
        return added

    packing = command('pack', pack, 'make a .mssr file of a checkpoint', takes_file=False)
    packing.add_argument('checkpoint', type=Path, help='net_g_latest.pth of the backward stage')
    packing.add_argument('-opt', '--opt', type=Path, required=True, help='the YAML that it was trained or tested with')
    packing.add_argument('-o', '--output', type=Path, help='default: beside the checkpoint, as .mssr')
    packing.add_argument(
        '--dtype', choices=['fp32', 'fp16', 'bf16'], default='fp32', help='of the values (fp32: lossless)'
    )
    packing.add_argument(
        '--gt', type=Path, help='folder of ground-truth images: measure each level, keep it in the file'
    )
    packing.add_argument('--lq', type=Path, help='folder of their LR images; default: made from them by bicubic')

    showing = command('info', info, 'the table of levels: parameters, bytes, PSNR')
    checking = command('verify', verify, 'check every byte that is there')

    extracting = command('extract', extract, 'one level as a plain checkpoint, or a smaller .mssr')
    extracting.add_argument('-o', '--output', type=Path, required=True, help='ends in .pth, .safetensors or .mssr')
    extracting.add_argument('--level', type=int, help='default: the largest that is there')
    extracting.add_argument('--spandrel', action='store_true', help='names of tensors that spandrel knows (for RCAN)')

    upscaling = command('upscale', upscale, 'upscale an image or a folder')
    upscaling.add_argument('input', type=Path, help='an image, or a folder of images')
    upscaling.add_argument('-o', '--output', type=Path, required=True, help='an image, or a folder to write PNGs into')
    size = upscaling.add_mutually_exclusive_group()
    size.add_argument('--level', type=int, help='default: the largest that is there')
    size.add_argument('--budget', type=parse_size, help='the most bytes of the file to read, such as 200KB')
    upscaling.add_argument('--tile', type=int, help='side of tiles in input pixels, 0 for none; default: only if large')
    upscaling.add_argument('--gt', type=Path, help='folder of ground-truth images of the same names: PSNR and SSIM')
    upscaling.add_argument('--device', help='such as cpu or cuda:1; default: cuda if there is one')

    exporting = command('export', export, 'one level as an ONNX model')
    exporting.add_argument('--onnx', type=Path, required=True, help='the file to write')
    exporting.add_argument('--level', type=int, help='default: the largest that is there')
    exporting.add_argument('--opset', type=int, help="default: the current one of torch's exporter")

    plotting = command('plot', plot, 'PSNR over size', takes_file=False)
    plotting.add_argument('files', metavar='FILE.mssr', nargs='+', type=Path)
    plotting.add_argument('-o', '--output', type=Path, required=True, help='the image to write')

    for with_json in (packing, showing, checking, upscaling):
        with_json.add_argument('--json', action='store_true', help='print JSON')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 1 it could not be done (one line says why), 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f'mssr: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
