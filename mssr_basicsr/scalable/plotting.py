"""PSNR over size, as a figure."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.on_demand import optional_package
from mssr_basicsr.foundation.saving import require_output, write_whole
from mssr_basicsr.scalable.container import ScalableFile, require_no_pipe


def new_figure(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """``pyplot.subplots(...)`` without a window; MissingPackageError without matplotlib."""
    optional_package('matplotlib', 'plot').use('Agg')
    from matplotlib import pyplot

    return pyplot.subplots(*args, **{'constrained_layout': True, **kwargs})


def draw_psnr(
    axis: Any, lines: Mapping[str, Sequence[tuple[float, float]]], sizes: str, styles: Mapping[str, str] | None = None
) -> None:
    """Draw PSNR over size into a matplotlib axis, with a logarithmic size axis.

    Args:
        axis: to draw into.
        lines: the points (size, PSNR in dB) by label.
        sizes: what the sizes are, for the axis.
        styles: matplotlib format strings by label; default: dots joined by a line.
    """
    for label, points in lines.items():
        axis.plot(*zip(*points), (styles or {}).get(label, 'o-'), label=label)
    axis.set(xscale='log', xlabel=sizes, ylabel='PSNR (dB)')
    axis.grid(alpha=0.3, which='both')


def figure_format(output: str | os.PathLike[str]) -> str:
    """The format that ``output``'s suffix means; OptionError if it is none that matplotlib can write."""
    optional_package('matplotlib', 'plot')
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, allowed = Path(output).suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
    if suffix not in allowed:
        names = ', '.join(f'.{name}' for name in sorted(allowed))
        raise OptionError('--output', str(output), f'a name that ends in {names}')
    return suffix


def save_figure(figure: Any, output: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a matplotlib figure in the format of its suffix, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format=figure_format(output))
    write_whole(output, buffer.getvalue())


def plot(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    time: bool = False,
) -> None:
    """Draw PSNR over the bytes that each level reads, with a line for each ``.mssr`` file and validation set.

    Files are labelled with their names, or with their paths if these have the same name.

    Args:
        files: one or several ``.mssr`` files whose levels have been measured.
        output: the figure to write, in the format of its suffix; an existing file is overwritten.
        time: instead, draw over the milliseconds that a level takes for 320 x 180 pixels on this CPU, measured now.

    Raises:
        ValueError: a wrong file or output, a file without PSNR, or matplotlib is not installed; the text says which.
        OSError: a file cannot be read or written.
    """
    if isinstance(files, (str, os.PathLike)):
        files = [files]
    require_output(output, *files)
    for path in files if time else ():
        require_no_pipe(path)
    figure_format(output)
    figure, axis = new_figure(figsize=(7, 4.5))
    sizes = 'ms for 320 x 180 pixels on this CPU' if time else 'KB read from the file, up to each level'
    sets_of_files = [_levels_by_set(path, time) for path in files]  # of all, before any is timed
    stems = Counter(Path(path).stem for path in files)
    for path, sets in zip(files, sets_of_files):
        label = Path(path).stem if stems[Path(path).stem] == 1 else str(path)
        milliseconds = _milliseconds(path) if time else {}
        for name, rows in sets.items():
            places = [milliseconds[row['level']] if time else row['cumulative_bytes'] / 1000 for row in rows]
            points = [(place, row['metrics'][name]['psnr']) for place, row in zip(places, rows)]
            draw_psnr(axis, {_literal(f'{name}, {label}'): points}, sizes)
            for row, point in zip(rows, points):
                axis.annotate(f'{row["level"]}', point, textcoords='offset points', xytext=(4, 5))
    for set_formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        set_formatter(lambda size, _: f'{size:g}')  # 30 and not 3 x 10^1
    axis.legend()
    save_figure(figure, output)


def _literal(text: str) -> str:
    """The text, to be shown literally.

    Matplotlib takes what is between dollar signs for mathematics, fails on bytes that are not text, and leaves labels
    that begin with an underscore out of the legend.
    """
    text = f' {text}' if text.startswith('_') else text
    return text.encode('utf-8', 'backslashreplace').decode().replace('$', r'\$')


def _levels_by_set(path: str | os.PathLike[str], present: bool) -> dict[str, list[dict[str, Any]]]:
    """A file's records of levels with a PSNR, by validation set; if ``present``, of the levels that are in the file.

    Raises:
        ValueError: there is none.
    """
    with ScalableFile(path) as file:
        levels = [row for row in file.describe()['levels'] if row['present'] or not present]
    names = sorted({name for row in levels for name, values in row['metrics'].items() if 'psnr' in values})
    if not names:
        raise ValueError(f'{path}: found no PSNR; allowed: a file packed with --gt')
    return {name: [row for row in levels if 'psnr' in row['metrics'].get(name, {})] for name in names}


def _milliseconds(path: str | os.PathLike[str]) -> dict[int, float]:
    from mssr_basicsr.scalable.measuring import measure_levels

    return {row['level']: row['milliseconds'] for row in measure_levels(Path(path), (320, 180), None, rounds=3)}
