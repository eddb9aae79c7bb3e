"""Show a crop of a photograph at levels of a file, beside bicubic, with the bytes that each level reads.

    python scripts/side_by_side.py MODEL.mssr [PHOTO.png] [--levels 4 0] [--crop X Y SIZE] [-o side_by_side.png]
    python scripts/side_by_side.py MODEL.mssr [PHOTO.png] --downscale      # how much of the photograph is recovered

By default the photograph is one that scikit-image ships. The crop is given in its pixels. With --downscale it is
first downscaled by bicubic and then shown beside the levels (by default all), with the PSNR on Y of each over the whole
photograph.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import cv2

from mssr_basicsr import ScalableModel
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.saving import require_output
from mssr_basicsr.scalable.evaluation import resize_bicubic, validation_pairs
from mssr_basicsr.scalable.metrics import metrics
from mssr_basicsr.scalable.plotting import figure_format, new_figure, save_figure


class Panel(NamedTuple):
    """An image of the figure, BGR."""

    title: str
    image: Any


def photo_of_skimage() -> Path:
    package = find_spec('skimage')
    if package is None or package.origin is None:
        raise ValueError('PHOTO: found none, and scikit-image is not installed; allowed: an image')
    return Path(package.origin).parent / 'data' / 'motorcycle_left.png'


def upscaled(model: ScalableModel, small: Any, levels: list[int]) -> list[Panel]:
    """The image by bicubic and at each level."""
    panels = [Panel('bicubic', resize_bicubic(small, model.header.scale))]
    for level in sorted(levels, reverse=True):
        model.shrink(model.header.smallest_level)
        model.expand(level)
        end = model.header.section(level).end
        panels.append(Panel(f'level {level}: {end:,} bytes', model.upscale(small, bgr=True)))
    return panels


def draw(panels: list[Panel], crop: tuple[int, int, int], output: Path) -> None:
    """Write the figure: the same square (x, y, side) of every panel."""
    x, y, side = crop
    figure, axes = new_figure(1, len(panels), figsize=(2.6 * len(panels), 3))
    for axis, (title, image) in zip(axes, panels):
        square = image[y : y + side, x : x + side]
        axis.imshow(cv2.cvtColor(square, cv2.COLOR_BGR2RGB), interpolation='nearest')
        axis.set_title(title, fontsize=9)
        axis.axis('off')
    save_figure(figure, output, dpi=100)


def side_by_side(arguments: argparse.Namespace) -> None:
    photo: Path = arguments.photo or photo_of_skimage()
    require_output(arguments.output, arguments.model, photo)
    figure_format(arguments.output)
    if photo.is_dir():
        raise OptionError('PHOTO', str(photo), 'an image')
    with ScalableModel(arguments.model) as model:
        scale, smallest = model.header.scale, model.header.smallest_level
        ((small, whole),) = validation_pairs(photo, None, scale)
        levels = arguments.levels or [smallest, model.level]
        if not all(model.level <= level <= smallest for level in levels):
            raise OptionError('--levels', levels, f'{model.level} to {smallest}, which {arguments.model} has')
        height, width = whole.shape[:2]
        side = min(height, width) // 3
        x, y, side = arguments.crop or ((width - side) // 2, (height - side) // 2, side)
        if min(x, y) < 0 or not 1 <= side <= min(width - x, height - y):
            raise OptionError('--crop', arguments.crop, f'X Y SIZE of a square within {width}x{height}')
        if arguments.downscale:
            levels = arguments.levels or list(range(model.level, smallest + 1))
            panels = upscaled(model, small, levels)
            psnr = [metrics(panel.image, whole, scale)['psnr'] for panel in panels]
            panels = [Panel(f'{title.split(":")[0]}, {dB:.2f} dB', image) for (title, image), dB in zip(panels, psnr)]
            panels.append(Panel('photograph', whole))
            zoom = 1
        else:
            panels, zoom = upscaled(model, whole, levels), scale
    draw(panels, (x * zoom, y * zoom, side * zoom), arguments.output)
    print(arguments.output)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    parser.add_argument('photo', type=Path, nargs='?')
    parser.add_argument('--levels', type=int, nargs='+', help='default: the smallest and the largest')
    parser.add_argument('--downscale', action='store_true', help='make the photograph smaller first')
    parser.add_argument('--crop', type=int, nargs=3, metavar=('X', 'Y', 'SIZE'), help='default: the middle')
    parser.add_argument('-o', '--output', type=Path, default=Path('side_by_side.png'))
    try:
        side_by_side(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f'side_by_side: {error}')


if __name__ == '__main__':
    main()
