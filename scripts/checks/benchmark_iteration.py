"""Time and memory of a training iteration: MSSR's forward stage against BasicSR's SRModel, in each mode, in one run.

    python scripts/checks/benchmark_iteration.py OPTIONS.yml [--rounds 20] [--batch 16] [--gt-size 48] [--modes ...]

Network, losses and sizes are those of the YAML of a forward stage; the images are random, and nothing else is read. A
mode is `fp32` or `bf16`, with `+cl` for `train.channels_last`; SRModel, which has no modes, computes in one here as a
level does. Levels are at 75 % sparsity: alone, with the YAML's self-distillation and with that of half a batch.

The contenders take turns, an iteration each and each round in another order, so that a busy machine slows all of them
alike. A ratio is the median over the rounds of the ratios within a round: to SRModel in fp32, and to SRModel in the
same mode; of processor time (of all threads), which other work disturbs less, too. Operations are what torch counts,
forward and backward, the mean over the rounds. Peak memory is what an iteration adds to a built model: on a GPU as
torch counts it, on a CPU (Linux) the growth of a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml
from basicsr.models import build_model
from torch.utils.flop_counter import FlopCounterMode

from mssr_basicsr.models.precision import computing

WARM_UP = 3  # rounds that do not count
MODES = ('fp32', 'fp32+cl', 'bf16', 'bf16+cl')
CONTENDERS = ('SRModel', 'level', 'level, SSD', 'level, SSD of half')

Iteration = Callable[[int], None]


def build(found: dict[str, Any], contender: str, mode: str, folder: str) -> Iteration:
    """What runs one iteration of a contender."""
    precision, _, channels_last = mode.partition('+')
    train = dict(found['train'])
    for key in ('level_iter', 'rewind_iter', 'first_level', 'criterion', 'rewind'):
        train.pop(key, None)
    ssd_opt = train.pop('ssd_opt', None) or {'type': 'SSDLoss', 'num_depths': 2}
    train.update(total_iter=2, scheduler={'type': 'MultiStepLR', 'milestones': [100000], 'gamma': 0.5})
    opt: dict[str, Any] = {
        'name': 'benchmark', 'model_type': 'SRModel', 'scale': found['scale'], 'manual_seed': 0, 'is_train': True,
        'num_gpu': min(1, torch.cuda.device_count()), 'dist': False, 'rank': 0, 'world_size': 1, 'datasets': {},
        'path': {'models': folder, 'visualization': folder}, 'logger': {'print_freq': 1, 'save_checkpoint_freq': 1},
        'network_g': found['network_g']['backbone'], 'train': train,
    }  # fmt: skip
    if contender != 'SRModel':
        opt['model_type'] = 'MSSRForwardModel'
        opt['network_g'] = {**found['network_g'], 'sparsity': [0, 0.75]}
        train.update(level_iter=1, precision=precision, channels_last=bool(channels_last))
        if 'SSD' in contender:
            train['ssd_opt'] = {**ssd_opt, 'batch_share': 0.5 if 'half' in contender else 1.0}
    model = build_model(opt)
    size, backbone = found['datasets']['train']['gt_size'], found['network_g']['backbone']
    shape = (found['datasets']['train']['batch_size_per_gpu'], backbone.get('num_in_ch', backbone.get('in_chans', 3)))
    small = size // found['scale']
    model.feed_data({'lq': torch.rand(*shape, small, small), 'gt': torch.rand(*shape, size, size)})
    for step in (1, 2) if contender != 'SRModel' else (1,):  # a level's first iteration begins it
        model.update_learning_rate(step)

    def run(i: int) -> None:
        model.optimize_parameters(i)

    def run_in_mode(i: int) -> None:
        with computing([model.net_g], model.device, precision, bool(channels_last)):
            model.optimize_parameters(i)

    return run if contender != 'SRModel' else run_in_mode


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(iteration: Iteration) -> int:
    """The bytes that an iteration adds, at its peak, to what there is before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        iteration(1)
        return torch.cuda.max_memory_allocated() - before
    before = _status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak (VmHWM) starts anew
    iteration(1)
    return _status('VmHWM') - before


def _status(key: str) -> int:
    """An entry of Linux's /proc/self/status, in bytes. (ru_maxrss has the parent's peak in it.)"""
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def measure(names: list[tuple[str, str]], found: dict[str, Any], rounds: int, folder: str) -> dict[str, dict[Any, Any]]:
    """By what is measured and by contender and mode, a list with a value for each round."""
    iterations = {name: build(found, *name, folder) for name in names}
    measured: dict[str, dict[Any, Any]] = {key: {name: [] for name in names} for key in ('wall', 'cpu', 'operations')}
    for i in range(WARM_UP + rounds):
        for name in random.sample(names, len(names)):
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            iterations[name](i)
            synchronize()
            if i >= WARM_UP:
                measured['wall'][name].append(time.perf_counter() - wall)
                measured['cpu'][name].append(time.process_time() - cpu)
    for i in range(WARM_UP, WARM_UP + rounds):  # what iteration i draws is drawn again
        for name in names:
            if 'SSD' in name[0] or i == WARM_UP:
                with FlopCounterMode(display=False) as counter:
                    iterations[name](i)
                measured['operations'][name].append(counter.get_total_flops())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('options', type=Path, help='the YAML of a forward stage')
    parser.add_argument('--rounds', type=int, default=20, help='iterations of each contender (%(default)s)')
    parser.add_argument('--batch', type=int, help="images of a batch (default: the YAML's)")
    parser.add_argument('--gt-size', type=int, help="side of an HR patch (default: the YAML's)")
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES, metavar='MODE', help='default: all')
    parser.add_argument('--contenders', nargs='+', choices=CONTENDERS, default=CONTENDERS, metavar='NAME')
    parser.add_argument('--no-memory', action='store_true', help='do not measure memory')
    parser.add_argument('--memory-of', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger('basicsr').setLevel(logging.ERROR)
    torch.backends.cudnn.benchmark = True
    found = yaml.safe_load(args.options.read_text())
    data = found['datasets']['train']
    data['batch_size_per_gpu'], data['gt_size'] = (
        args.batch or data['batch_size_per_gpu'],
        args.gt_size or data['gt_size'],
    )
    with tempfile.TemporaryDirectory() as folder:
        if args.memory_of:
            print(peak_memory(build(found, *args.memory_of, folder)))
            return
        stock = ('SRModel', 'fp32')
        names = list(dict.fromkeys([stock, *((name, mode) for mode in args.modes for name in args.contenders)]))
        measured = measure(names, found, args.rounds, folder)
    memory = {}
    for name in [] if args.no_memory else names:
        said = subprocess.check_output([sys.executable, *sys.argv, '--memory-of', *name], text=True)
        memory[name] = int(said.split()[-1])

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    print(f'{args.options.name}: batch {data["batch_size_per_gpu"]}, HR patch {data["gt_size"]}; {device}; '
          f'torch {torch.__version__}; {args.rounds} rounds')  # fmt: skip
    print(f'{"mode":9}{"":21}{"ms":>8}{"time":>8}{"in mode":>9}{"CPU":>8}{"in mode":>9}{"operations":>12}{"memory":>8}')

    def ratio(key: str, name: tuple[str, str], base: tuple[str, str]) -> str:
        if base not in measured[key]:
            return '-'
        return f'{median(a / b for a, b in zip(measured[key][name], measured[key][base])):.3f}'

    for name in names:
        same_mode = ('SRModel', name[1])
        cells = [f'{ratio("wall", name, stock):>8}{ratio("wall", name, same_mode):>9}']
        cells.append(f'{ratio("cpu", name, stock):>8}{ratio("cpu", name, same_mode):>9}')
        cells.append(f'{mean(measured["operations"][name]) / measured["operations"][stock][0]:12.3f}')
        cells.append(f'{memory[name] / memory[stock]:8.2f}' if memory else '')
        print(f'{name[1]:9}{name[0]:21}{1000 * median(measured["wall"][name]):8.1f}{"".join(cells)}')


if __name__ == '__main__':
    main()
