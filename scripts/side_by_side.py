"""Shows what a photograph becomes at the smallest level and at the largest, beside bicubic, with the bytes each takes.

    mssr upscale MODEL.mssr PHOTO.png -o small.png --level 4
    mssr upscale MODEL.mssr PHOTO.png -o large.png --level 0
    python scripts/side_by_side.py MODEL.mssr PHOTO.png small.png large.png -o side_by_side.png [--crop X Y SIZE]

The crop is in pixels of PHOTO.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from mssr_basicsr import ScalableFile
from mssr_basicsr.scalable.description import describe
from mssr_basicsr.scalable.images import read_colour, resize_bicubic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('model', 'photo', 'small', 'large'):
        parser.add_argument(name, type=Path)
    parser.add_argument('-o', '--output', type=Path, default=Path('side_by_side.png'))
    parser.add_argument('--crop', type=int, nargs=3, metavar=('X', 'Y', 'SIZE'))
    arguments = parser.parse_args()
    with ScalableFile(arguments.model) as file:
        found = describe(file)
    photo = read_colour(arguments.photo)
    small, large = found['levels'][-1], found['levels'][0]
    bicubic = resize_bicubic(photo, found['scale'])
    panels = [
        ('bicubic', bicubic),
        (f'level {small["level"]}: {small["cumulative_bytes"]:,} bytes', read_colour(arguments.small)),
        (f'level {large["level"]}: {large["cumulative_bytes"]:,} bytes', read_colour(arguments.large)),
    ]
    side = min(photo.shape[:2]) // 3
    x, y, side = arguments.crop or ((photo.shape[1] - side) // 2, (photo.shape[0] - side) // 2, side)
    s = found['scale']
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.2), constrained_layout=True, width_ratios=(1, 1, 1, 1.15))
    for axis, (title, image) in zip(axes, panels):
        axis.imshow(cv2.cvtColor(image[y * s : (y + side) * s, x * s : (x + side) * s], cv2.COLOR_BGR2RGB))
        axis.set_title(title)
    rows = [
        [f'{row["level"]}', f'{row["parameters"]:,}', f'{row["bytes"]:,}', f'{row["cumulative_bytes"]:,}']
        for row in found['levels']
    ]
    table = axes[3].table(rows, colLabels=['level', 'parameters', 'section', 'up to here'], loc='center')
    table.scale(1, 1.8)
    axes[3].set_title(f'{arguments.model.name}: {found["file_bytes"]:,} bytes')
    for axis in axes:
        axis.axis('off')
    figure.savefig(arguments.output, dpi=80)
    print(arguments.output)


if __name__ == '__main__':
    main()
