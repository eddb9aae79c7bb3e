"""Measure MSSR on Set5, Set14 and BSD100, x2, with an EDSR small enough to train on a CPU.

    python scripts/study/study.py data --images FOLDER   # FOLDER holds T91, BSDS200, Set5, Set14 and BSD100
    python scripts/study/study.py run main               # or the name of any run or table; see: study.py list
    python scripts/study/study.py list

Every run is a BasicSR training with the options of options/train_MSSR_EDSR_8x32_x2_291_*.yml (for the table `edsr_m`,
which needs a GPU: options/train_MSSR_EDSR_Mx2_291_*.yml) and the changes below. A run that was stopped continues from
its last save; a finished one is not repeated. Results are kept in docs/results.json, from which
scripts/study/report.py makes docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.archs import build_network

from mssr_basicsr.adapter.records import describe_level
from mssr_basicsr.foundation.saving import write_whole

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'scripts'))

import variants  # noqa: E402
from prepare_data import DataError, prepare  # noqa: E402
from training_logs import iteration_seconds, read_logs, wall_seconds  # noqa: E402

RESULTS = ROOT / 'docs' / 'results.json'
OPTIONS = 'train_MSSR_EDSR_{}_291_{}.yml'
SPARSITY = (0, 0.5, 0.75, 0.875, 0.9375)  # of the main table
LEVEL_ITER = [10000, 10000, 10000, 10000, 20000]  # the smallest level needs the longest training
CHOICES_SPARSITY = (0, 0.75, 0.9375)
CHOICES_ITER = 1000
LATEST = 'experiments/{}/models/net_g_latest.pth'  # what a run ends with
DENSE = 'experiments/main_forward/models/net_g_level0.pth'  # the dense ticket
RANDOM_MASKS = 'experiments/random_masks.pth'

TICKET_TEACHER = {'train.ticket_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'}}

# What is fastest on a processor with bf16 arithmetic.
FAST = {'train.precision': 'bf16', 'train.channels_last': True}
LONG_ITER = 60000  # of each level, in both stages, of the table `long`

# For glibc: memory that is freed stays with the process, which else gets it back page by page. On a CPU that takes a
# tenth to a fifth off an iteration of the 8x32 network, and off its validation; the results are the same bits. The pad
# alone would hold the threshold down, above which glibc gives each freed tensor back at once.
KEEP_FREED_MEMORY = {
    'MALLOC_TOP_PAD_': '100000000',
    'MALLOC_TRIM_THRESHOLD_': '1000000000',
    'MALLOC_MMAP_THRESHOLD_': '33554432',
}

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. ``changes`` are to the options of its ``network`` and ``stage``, by their path in the YAML."""

    name: str
    table: str
    stage: str
    changes: Changes
    needs: tuple[str, ...] = ()  # files that other runs leave, under experiments/<name of the run>
    network: str = '8x32_x2'


def forward(level_iter: list[int], **more: Any) -> Changes:
    """Options of a forward stage with these iterations of each level."""
    return {**schedule(level_iter), 'train.level_iter': level_iter, 'train.rewind_iter': level_iter[0] // 10, **more}


def backward(start: str, level_iter: list[int], **more: Any) -> Changes:
    """Options of a backward stage that starts from the run ``start``; iterations of each level in the order trained.

    It learns the ground truth alone; the recipe also its tickets' images.
    """
    return {
        **schedule(level_iter),
        'train.expansion.level_iter': level_iter,
        'train.ticket_opt': None,
        'path.pretrain_network_g': LATEST.format(start),
        **more,
    }


def stock(num_iter: int, network: Changes, **more: Any) -> Changes:
    """Options of a training with BasicSR's own SRModel."""
    return {**schedule([num_iter]), 'model_type': 'SRModel', 'network_g': network, **more}


def schedule(iterations: list[int]) -> Changes:
    """Cosine annealing over the shortest level, restarted in longer ones; validation and saving at each level's end."""
    period, restarts = min(iterations), max(iterations) // min(iterations)
    return {
        'train.total_iter': sum(iterations),
        'train.scheduler.periods': [period] * restarts,
        'train.scheduler.restart_weights': [1] * restarts,
        'val.val_freq': period,
        'logger.save_checkpoint_freq': min(period, 5000),
    }


def edsr(num_feat: int, num_block: int) -> Changes:
    """Options of a small dense EDSR by itself."""
    return {
        'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': num_feat, 'num_block': num_block, 'upscale': 2,
        'res_scale': 1, 'img_range': 255.0, 'rgb_mean': [0.4488, 0.4371, 0.4040],
    }  # fmt: skip


def main_table() -> list[Run]:
    """MSSR, and what one would use instead.

    `main` keeps the weights at each pruning step and restarts the schedule, `paper` rewinds them. Small dense networks
    have as many iterations as the level of their size, or (`long`) as all levels up to it together. `one_shot` prunes
    the dense ticket at once (by LAMP: global magnitude would leave nothing of conv_last), `random` masks have the
    densities of main's layers; both train as long as main's level.
    """
    runs = [
        Run('main_forward', 'main', 'forward_lr', forward(LEVEL_ITER)),
        Run('paper_forward', 'main', 'forward', forward(LEVEL_ITER)),
    ]
    nested = backward('main_forward', [15000] * (len(SPARSITY) - 1))
    for name, more in (('main_backward', {}), ('main_backward_teacher', TICKET_TEACHER)):
        runs.append(Run(name, 'main', 'backward', {**nested, **more}, (LATEST.format('main_forward'),)))
    for name, network, num_iter in (
        ('dense_13k', edsr(8, 8), LEVEL_ITER[-1]),
        ('dense_13k_long', edsr(8, 8), sum(LEVEL_ITER)),
        ('dense_26k', edsr(12, 7), LEVEL_ITER[-2]),
        ('dense_26k_long', edsr(12, 7), sum(LEVEL_ITER[:-1])),
    ):
        runs.append(Run(name, 'main', 'forward', stock(num_iter, network)))
    for level in range(1, len(SPARSITY)):
        one_shot = {
            'network_g.sparsity': [0, SPARSITY[level]],
            'path.pretrain_network_g': DENSE,
            'train.first_level': 1,
            'train.criterion': 'lamp',
            'train.rewind': 'lr',
            'train.rewind_iter': 0,
            'train.ssd_opt': None,
        }
        runs.append(Run(f'one_shot_{level}', 'main', 'forward', forward([LEVEL_ITER[level]], **one_shot), (DENSE,)))
    for level in range(1, len(SPARSITY)):
        random = {
            'model_type': 'SRModel',
            'network_g.level': level,
            'path.pretrain_network_g': RANDOM_MASKS,
        }
        needs = (DENSE, LATEST.format('main_forward'))
        runs.append(Run(f'random_{level}', 'main', 'forward', {**schedule([LEVEL_ITER[level]]), **random}, needs))
    return runs


def choices() -> list[Run]:
    """One change at a time, at a shorter schedule with fewer levels, two seeds each.

    Forward stages change the paper's recipe. Backward stages change ours, from the tickets of `rewind_lr`.
    """
    each = [CHOICES_ITER] * len(CHOICES_SPARSITY)
    # A weight that is kept has been trained in all levels before; rewound, it gets that many iterations here.
    # `rewind_lr_longer` is the kept one's answer: as many iterations of the whole run.
    equal_total = [CHOICES_ITER * (level + 1) for level in range(len(CHOICES_SPARSITY))]
    forwards: dict[str, Changes] = {
        'reference': forward(each),
        'rewind_lr': forward(each, **{'train.rewind': 'lr'}),
        'rewind_none': forward(each, **{'train.rewind': 'none'}),
        'rewind_weights_equal_total': forward(equal_total),
        'rewind_lr_longer': forward(equal_total, **{'train.rewind': 'lr'}),
        'ssd_off': forward(each, **{'train.ssd_opt': None}),
        'ssd_1': forward(each, **{'train.ssd_opt.num_depths': 1}),
        'ssd_all': forward(each, **{'train.ssd_opt.num_depths': 'all'}),
        'ssd_teacher': forward(each, **{'train.ssd_opt.target': 'teacher'}),
        'ssd_both': forward(each, **{'train.ssd_opt.target': 'both'}),
        'rewind_lr_ssd_off': forward(each, **{'train.rewind': 'lr', 'train.ssd_opt': None}),
        'layer_magnitude': forward(each, **{'train.criterion': 'layer_magnitude'}),
        'lamp': forward(each, **{'train.criterion': 'lamp'}),
        'random': forward(each, **{'train.criterion': 'random'}),
    }
    joint = {'model_type': 'JointModel', 'train.joint_iter': CHOICES_ITER, 'train.total_iter': sum(each)}
    backwards: dict[str, tuple[int, Changes]] = {
        'reference': (CHOICES_ITER, {}),
        'lr_1e-3': (CHOICES_ITER, {'train.optim_g.lr': 1e-3}),
        'lr_1e-2': (CHOICES_ITER, {'train.optim_g.lr': 1e-2}),
        'recover_rewind': (CHOICES_ITER, {'train.recover': 'rewind'}),
        'recover_zero': (CHOICES_ITER, {'train.recover': 'zero'}),
        'private_others': (CHOICES_ITER, {'model_type': 'PrivateOthersModel'}),
        'ticket_teacher': (CHOICES_ITER, TICKET_TEACHER),
        'joint': (CHOICES_ITER, joint),
        'longer': (3 * CHOICES_ITER, {}),
    }
    runs = []
    for seed in (1, 2):
        shared = {'network_g.sparsity': list(CHOICES_SPARSITY), 'manual_seed': seed}
        for name, changes in forwards.items():
            runs.append(Run(f'{name}_seed{seed}', 'choices', 'forward', {**changes, **shared}))
        start = f'rewind_lr_seed{seed}'
        for name, (num_iter, more) in backwards.items():
            changes = {**backward(start, [num_iter] * (len(each) - 1), **more), **shared}
            runs.append(Run(f'nested_{name}_seed{seed}', 'choices', 'backward', changes, (LATEST.format(start),)))
    return runs


def cost() -> list[Run]:
    """What cheaper training costs in quality, at the choices' schedule and with the paper's recipe, two seeds each.

    `fp32` is the choices' reference. The others are in bf16 and channels-last: as it is, with self-distillation of half
    of each batch, and with that at one depth.
    """
    kinds: dict[str, Changes] = {
        'fp32': {},
        'bf16': FAST,
        'batch_share': {**FAST, 'train.ssd_opt.batch_share': 0.5},
        'one_depth_batch_share': {**FAST, 'train.ssd_opt.batch_share': 0.5, 'train.ssd_opt.num_depths': 1},
    }
    shared = {**forward([CHOICES_ITER] * len(CHOICES_SPARSITY)), 'network_g.sparsity': list(CHOICES_SPARSITY)}
    return [
        Run(f'cost_{name}_seed{seed}', 'cost', 'forward', {**shared, **changes, 'manual_seed': seed})
        for seed in (1, 2)
        for name, changes in kinds.items()
    ]


def long() -> list[Run]:
    """Both stages for longer, by the choices that won: weights kept, LAMP, the tickets' images; in bf16, with EMA.

    Without self-distillation, of which kept weights gained nothing.
    """
    shared = {
        **FAST,
        'train.optim_g.fused': True,
        'datasets.train.batch_size_per_gpu': 16,
        'datasets.train.gt_size': 48,
        'train.ema_decay': 0.999,
    }
    each = [LONG_ITER] * len(SPARSITY)
    forward_only = {'train.criterion': 'lamp', 'train.rewind': 'lr', 'train.ssd_opt': None}
    runs = []
    for seed in (1, 2):
        start = f'long_forward_seed{seed}'
        runs.append(Run(start, 'long', 'forward_lr', {**forward(each, **forward_only, **shared), 'manual_seed': seed}))
        nested = {**backward(start, each[1:], **TICKET_TEACHER, **shared), 'manual_seed': seed}
        runs.append(Run(f'long_backward_seed{seed}', 'long', 'backward', nested, (LATEST.format(start),)))
    return runs


def edsr_m() -> list[Run]:
    """EDSR-M, as its recipes have it but for the weights, which are kept. For a GPU."""
    start = LATEST.format('edsr_m_forward')
    return [
        Run('edsr_m_forward', 'edsr_m', 'forward', {'train.rewind': 'lr'}, network='Mx2'),
        Run('edsr_m_backward', 'edsr_m', 'backward', {'path.pretrain_network_g': start}, (start,), 'Mx2'),
    ]


RUNS = {run.name: run for run in main_table() + choices() + cost() + long() + edsr_m()}


# ------------------------------ running ------------------------------ #


def options_of(run: Run) -> dict[str, Any]:
    """The whole YAML of a run."""
    options: dict[str, Any] = yaml.safe_load((ROOT / 'options' / OPTIONS.format(run.network, run.stage)).read_text())
    options['name'] = run.name
    for path, value in run.changes.items():
        *parents, key = path.split('.')
        part = options
        for parent in parents:
            part = part[parent]
        part[key] = value
    return options


def train(run: Run, again: bool = False) -> None:
    """Do a run, or what is left of it, and keep what it gave; ``again`` if its result is known but not its files."""
    if run.name in read_results() and not again:
        print(f'{run.name}: done already')
        return
    for file in map(Path, run.needs):
        if not file.is_file():
            train(RUNS[file.parts[1]], again=True)
    if run.changes.get('path.pretrain_network_g') == RANDOM_MASKS:
        write_random_masks()
    options = Path('experiments', f'{run.name}.yml')
    options.parent.mkdir(exist_ok=True)
    options.write_text(yaml.safe_dump(options_of(run), sort_keys=False))
    program = ['-m', 'mssr_basicsr.train']
    if hasattr(variants, run.changes.get('model_type', '')):
        program = [variants.__file__]
    command = [*program, '-opt', str(options), '--auto_resume']
    print('python', *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, env={**KEEP_FREED_MEMORY, **os.environ})
    keep(run)


def keep(run: Run) -> None:
    """Write what a finished run gave into docs/results.json; if it was run before, beside what it gave then."""
    experiment = Path('experiments', run.name)
    logs, levels = read_logs(experiment), experiment / 'models' / 'levels.json'
    seconds, data_seconds = iteration_seconds(logs)
    result = {
        'table': run.table,
        'command': f'python scripts/study/study.py run {run.name}',
        'changes': dict(run.changes),
        'seed': options_of(run)['manual_seed'],
        'iterations': options_of(run)['train']['total_iter'],
        'seconds': round(wall_seconds(logs)),
        'seconds_per_iteration': round(seconds, 4),
        'data_seconds_per_iteration': round(data_seconds, 4),
        'threads': torch.get_num_threads(),
        'levels': json.loads(levels.read_text()) if levels.is_file() else [record_of_stock(run, logs[-1])],
    }
    for record in result['levels']:
        record['evaluation'] = 'published'  # by the metrics that the options name; before, some had BasicSR's
    results = read_results()
    if run.stage == 'backward':  # what it is compared with; the forward stage may be run again some day
        tickets = results[Path(run.needs[0]).parts[1]]['levels']
        result['tickets'] = [{key: ticket[key] for key in ('level', 'metrics', 'evaluation')} for ticket in tickets]
    before = results.get(run.name)
    if before is not None:
        result['earlier'] = [*before.pop('earlier', []), before]
    results[run.name] = result
    write_whole(RESULTS, (json.dumps(results, indent=1) + '\n').encode())


def record_of_stock(run: Run, log: str) -> dict[str, Any]:
    """Of a network that BasicSR's own model trained: its parameters and last metrics, as in levels.json."""
    options = options_of(run)['network_g']
    network = build_network(options)
    if options['type'] == 'MSSR':
        network.load_state_dict(torch.load(LATEST.format(run.name), weights_only=True)['params'])
        parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
        record: Any = describe_level(network.get_level_map(), parameters, options['level'])
    else:
        record = {'level': 0, 'parameters': sum(parameter.numel() for parameter in network.parameters())}
    metrics: dict[str, dict[str, float]] = {}
    for dataset, lines in re.findall(r'Validation (\w+)\n((?:\t # .*\n)+)', log):
        metrics[dataset] = {name: float(value) for name, value in re.findall(r'# (\w+): ([\d.]+)', lines)}
    return {**record, 'metrics': metrics}


def write_random_masks() -> None:
    """The dense ticket with a level map that has, in each layer, main_forward's levels in random places."""
    state = torch.load(LATEST.format('main_forward'), weights_only=True)['params']
    dense = torch.load(DENSE, weights_only=True)['params']
    generator = torch.Generator().manual_seed(0)
    for name, levels in state.items():
        if name.startswith('level_map.'):
            order = torch.randperm(levels.numel(), generator=generator)
            state[name] = levels.flatten()[order].view_as(levels)
    state.update({f'backbone.{name}': weight for name, weight in dense.items()})
    torch.save({'params': state}, RANDOM_MASKS)


def read_results() -> dict[str, Any]:
    """What is known so far, by run."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


# ------------------------------ the command ------------------------------ #


def make_data(images: Path) -> None:
    """The LMDBs that the options name, under datasets/."""
    with tempfile.TemporaryDirectory() as folder:
        for source in ('T91', 'BSDS200'):
            for path in (images / source).iterdir():
                os.symlink(path.resolve(), Path(folder, path.name))
        prepare(folder, 'datasets/T91_BSDS200_x2', 2, 72, 32)
    for name in ('Set5', 'Set14', 'BSD100'):
        prepare(images / name, f'datasets/{name}_x2', 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('data', help='write datasets/').add_argument('--images', type=Path, required=True)
    commands.add_parser('list', help='every run, and whether it is done')
    run = commands.add_parser('run', help='do runs')
    run.add_argument('names', nargs='+', choices=sorted({*RUNS, *(run.table for run in RUNS.values())}), metavar='NAME')
    args = parser.parse_args(argv)
    if args.command == 'data':
        try:
            make_data(args.images)
        except (DataError, OSError) as error:
            sys.exit(f'study: {error}')
    elif args.command == 'list':
        done = read_results()
        for name, described in RUNS.items():
            print(f'{described.table:8} {name:32} {"done" if name in done else ""}')
    else:
        for described in RUNS.values():
            if described.name in args.names or described.table in args.names:
                train(described)


if __name__ == '__main__':
    main()
