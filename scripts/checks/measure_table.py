"""Up to which share of kept weights the kernel beats torch, by kernel size and channels: the table of sparse/table.py.

    python scripts/checks/measure_table.py [--rounds 5]

A chain of four equal convolutions with ReLU on 160 x 160 pixels, one thread, processor time, against torch's better
layout. Printed are the ratios and the largest density at which the kernel is at least as fast.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any, Callable

import numpy as np
import torch
from torch import nn

from mssr_basicsr.sparse.layers import ABSENT, make_sparse
from mssr_basicsr.sparse.network import accelerate

DENSITIES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.no_grad()
def ratio(channels: int, k: int, density: float, rounds: int) -> float:
    layers = [nn.Conv2d(channels, channels, k, padding=k // 2) for _ in range(4)]
    dense = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU()))).eval()
    sparse, random = copy.deepcopy(dense), np.random.default_rng(0)
    for layer in sparse:
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach().numpy().ravel()
            kept = random.random(weight.size) < density
            make_sparse(layer, weight, np.where(kept, 0, ABSENT).astype(np.uint8))
    accelerate(sparse)
    x = torch.rand(1, channels, 160, 160)
    last, dense_last = x.contiguous(memory_format=torch.channels_last), copy.deepcopy(dense)
    dense_last.to(memory_format=torch.channels_last)
    works = [lambda: sparse(x), lambda: dense(x), lambda: dense_last(last)]
    times = [[seconds(work) for work in works] for _ in range(rounds + 1)][1:]
    ours, *theirs = (statistics.median(column) for column in zip(*times))
    return min(theirs) / ours


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for k in (3, 1):
        for channels in (8, 16, 32, 48, 64, 128):
            ratios = {density: ratio(channels, k, density, rounds) for density in DENSITIES}
            wins = [density for density, value in ratios.items() if value >= 1]
            shown = '  '.join(f'{density:.2f}: {value:.2f}' for density, value in ratios.items())
            print(f'{k}x{k}, {channels:3} channels: up to {max(wins, default=0):.2f}   ({shown})', flush=True)


if __name__ == '__main__':
    main()
