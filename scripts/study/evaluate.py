"""Evaluate every level of a .mssr file, and bicubic, as in published results: PSNR (Y unrounded and rounded), SSIM.

    python scripts/study/evaluate.py models/EDSR_8x32_x2_291.mssr --images FOLDER [--run main_backward_teacher]

FOLDER holds Set5, Set14 and BSD100; LR images are made from them by bicubic. With --run the figures replace that run's
in docs/results.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from report import SETS
from study import RESULTS, read_results

from mssr_basicsr import ScalableModel
from mssr_basicsr.foundation.saving import write_whole
from mssr_basicsr.scalable.evaluation import resize_bicubic, validation_pairs
from mssr_basicsr.scalable.metrics import published_metrics


def measure(pairs: list[tuple[Any, Any]], scale: int, upscale: Callable[[Any], Any]) -> dict[str, float]:
    """The means over a set: ``psnr``, ``psnr_rounded`` and ``ssim``."""
    found = []
    for small, truth in pairs:
        image = upscale(small)
        rounded = published_metrics(image, truth, scale, round_y=True)
        found.append({**published_metrics(image, truth, scale), 'psnr_rounded': rounded['psnr']})
    return {key: mean(one[key] for one in found) for key in ('psnr', 'psnr_rounded', 'ssim')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path)
    parser.add_argument('--images', type=Path, required=True)
    parser.add_argument('--run', help='the run in docs/results.json whose figures these become')
    arguments = parser.parse_args()
    levels: dict[int, dict[str, dict[str, float]]] = {}
    with ScalableModel(arguments.model, level=0) as model:
        scale = model.header.scale
        for name in SETS:
            pairs = list(validation_pairs(arguments.images / name, None, scale))
            print(f'bicubic {name:8}', measure(pairs, scale, lambda small: resize_bicubic(small, scale)), flush=True)
            if model.level > 0:
                model.expand(0)
            for level in range(model.header.smallest_level + 1):
                model.shrink(level)
                levels.setdefault(level, {})[name] = measure(pairs, scale, lambda small: model.upscale(small, bgr=True))
                print(f'level {level} {name:8}', levels[level][name], flush=True)
    if arguments.run:
        results = read_results()
        for record in results[arguments.run]['levels']:
            record.update(metrics=levels[record['level']], evaluation='published')
        write_whole(RESULTS, (json.dumps(results, indent=1) + '\n').encode())


if __name__ == '__main__':
    main()
