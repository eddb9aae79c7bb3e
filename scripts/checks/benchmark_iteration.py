"""Time per training iteration: MSSR's forward stage against BasicSR's SRModel, same network, same batch, one run.

    python scripts/checks/benchmark_iteration.py [--rounds 60] [--num-feat 64 --num-block 16]

The contenders take turns, an iteration each and each round in another order, so that a busy machine slows all of them
alike. A ratio is the median over the rounds of the ratios within a round. Beside it stands the ratio of floating point
operations (counted by torch, forward and backward), for self-distillation the median over the pairs of depths drawn.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from basicsr.models import build_model
from torch.utils.flop_counter import FlopCounterMode
from toy import forward_options

WARM_UP = 3  # rounds that do not count


def options(folder: str, backbone: dict[str, Any], model_type: str, ssd: bool) -> dict[str, Any]:
    """Options of a training: BasicSR's for ``SRModel``, else a forward stage of two levels, an iteration each."""
    opt = forward_options(Path(folder))
    opt.update(model_type=model_type, num_gpu=min(1, torch.cuda.device_count()), datasets={}, val=None)
    opt.update(is_train=True, dist=False, rank=0, world_size=1)
    opt['path'].update(models=folder, visualization=folder)
    opt['network_g'].update(sparsity=[0, 0.75], backbone=backbone)
    train = opt['train']
    train.update(level_iter=1, total_iter=2, ema_decay=0)
    del train['rewind_iter']
    if not ssd:
        del train['ssd_opt']
    if model_type == 'SRModel':
        opt['network_g'] = backbone
        del train['level_iter']
    return opt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=60, help='iterations of each contender (default: 60)')
    parser.add_argument('--num-feat', type=int, default=32, help='features of the EDSR (default: 32)')
    parser.add_argument('--num-block', type=int, default=8, help='blocks of the EDSR (default: 8)')
    parser.add_argument('--patch', type=int, default=24, help='side of an LR patch (default: 24)')
    args = parser.parse_args()
    logging.getLogger('basicsr').setLevel(logging.ERROR)
    torch.backends.cudnn.benchmark = True
    backbone = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'upscale': 2}
    backbone.update(num_feat=args.num_feat, num_block=args.num_block)
    lq = torch.rand(16, 3, args.patch, args.patch)
    batch = {'lq': lq, 'gt': torch.rand(16, 3, 2 * args.patch, 2 * args.patch)}

    with tempfile.TemporaryDirectory() as folder:
        models = {
            'SRModel': build_model(options(folder, backbone, 'SRModel', False)),
            'MSSR, dense level': build_model(options(folder, backbone, 'MSSRForwardModel', False)),
            'MSSR, 75 % sparse': build_model(options(folder, backbone, 'MSSRForwardModel', False)),
            'MSSR, 75 % sparse, SSD at 2 depths': build_model(options(folder, backbone, 'MSSRForwardModel', True)),
        }
        for name, model in models.items():
            model.feed_data(batch)
            model.update_learning_rate(1)
            if '75 %' in name:
                model.update_learning_rate(2)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    operations: dict[str, list[int]] = {name: [] for name in models}
    for i in range(WARM_UP + args.rounds):
        for name in sorted(models, key=lambda name: random.random()):
            model = models[name]
            synchronize()
            start = time.perf_counter()
            model.optimize_parameters(i)
            synchronize()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    for i in range(WARM_UP, WARM_UP + args.rounds):  # the depths that iteration i draws are drawn again
        for name, model in models.items():
            if 'SSD' in name or i == WARM_UP:
                with FlopCounterMode(display=False) as counter:
                    model.optimize_parameters(i)
                operations[name].append(counter.get_total_flops())

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    print(f'EDSR x2, {args.num_block} blocks, {args.num_feat} features, batch 16, LR patch {args.patch}; {device}')
    print(f'{"":36}{"ms/iteration":>14}{"ratio":>8}{"operations":>12}')
    for name in models:
        ratio = median(mine / stock for mine, stock in zip(seconds[name], seconds['SRModel']))
        counted = median(operations[name]) / operations['SRModel'][0]
        print(f'{name:36}{1000 * median(seconds[name]):14.1f}{ratio:8.3f}{counted:12.3f}')


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == '__main__':
    main()
