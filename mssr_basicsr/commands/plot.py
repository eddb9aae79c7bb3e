"""``mssr plot``: PSNR over bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

from mssr_basicsr.scalable.description import describe

HELP = 'PSNR over size'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('files', metavar='FILE.mssr', nargs='+', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='the image to write')
    parser.add_argument('--time', action='store_true', help='PSNR over the time that each level takes on this CPU')


def run(arguments: argparse.Namespace) -> int:
    """``mssr plot``: PSNR over cumulative bytes, or over time, a line for each file and validation set."""
    from mssr_basicsr import ScalableFile
    from mssr_basicsr.scalable.measuring import measure_levels

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
        milliseconds = {}
        if arguments.time:
            measured = measure_levels(path, (320, 180), threads=None, rounds=3)
            milliseconds = {row['level']: row['milliseconds'] for row in measured}
        for name in names:
            rows = [row for row in levels if 'psnr' in row['metrics'].get(name, {})]
            if milliseconds:
                rows = [row for row in rows if row['level'] in milliseconds]
            sizes = [milliseconds.get(row['level'], row['cumulative_bytes'] / 1000) for row in rows]
            psnr = [row['metrics'][name]['psnr'] for row in rows]
            axes.plot(sizes, psnr, marker='o', label=f'{name}, {Path(path).stem}')
            for row, x, y in zip(rows, sizes, psnr):
                axes.annotate(f'{row["level"]}', (x, y), textcoords='offset points', xytext=(4, 5))
    axes.set_xscale('log')
    over_time = 'ms for 320 x 180 pixels on this CPU'
    axes.set_xlabel(over_time if arguments.time else 'KB of the file that are read, up to each level')
    axes.set_ylabel('PSNR (dB)')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    figure.savefig(arguments.output, dpi=150)
    print(arguments.output)
    return 0
