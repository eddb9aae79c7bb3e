"""``mssr plot``: PSNR over bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

from mssr_basicsr.scalable.description import describe

HELP = 'PSNR over size'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('files', metavar='FILE.mssr', nargs='+', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='the image to write')


def run(arguments: argparse.Namespace) -> int:
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
