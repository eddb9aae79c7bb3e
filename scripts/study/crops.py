"""Shows a crop of a photograph at every level of a file, beside bicubic and the photograph itself, with PSNR on Y.

    python scripts/study/crops.py MODEL.mssr [PHOTO.png] [--crop X Y SIZE] [-o crops.png]

The photograph is made smaller by bicubic and upscaled again. By default it is one that scikit-image ships. The crop is
in its pixels; PSNR is the whole photograph's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import matplotlib
import skimage

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from mssr_basicsr import ScalableModel
from mssr_basicsr.scalable.images import metrics, resize_bicubic, validation_pairs

PHOTO = Path(skimage.__file__).parent / 'data' / 'motorcycle_left.png'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    parser.add_argument('photo', type=Path, nargs='?', default=PHOTO)
    parser.add_argument('--crop', type=int, nargs=3, metavar=('X', 'Y', 'SIZE'), default=(360, 300, 110))
    parser.add_argument('-o', '--output', type=Path, default=Path('crops.png'))
    arguments = parser.parse_args()
    with ScalableModel(arguments.model) as model:
        scale, smallest = model.header.scale, model.header.smallest_level
        ((small, photo),) = validation_pairs(arguments.photo, None, scale)
        panels = [('bicubic', resize_bicubic(small, scale))]
        model.shrink(smallest)
        for level in range(smallest, -1, -1):
            model.expand(level)
            panels.append((f'level {level}', model.upscale(small, bgr=True)))
    x, y, size = arguments.crop
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(2.4 * (len(panels) + 1), 2.8), constrained_layout=True)
    panels = [(f'{title}, {metrics(image, photo, scale)["psnr"]:.2f} dB', image) for title, image in panels]
    for axis, (title, image) in zip(axes, [*panels, ('photograph', photo)]):
        axis.imshow(cv2.cvtColor(image[y : y + size, x : x + size], cv2.COLOR_BGR2RGB), interpolation='nearest')
        axis.set_title(title, fontsize=9)
        axis.axis('off')
    figure.savefig(arguments.output, dpi=100)
    print(arguments.output)


if __name__ == '__main__':
    main()
