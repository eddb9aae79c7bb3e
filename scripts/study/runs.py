"""What is run for docs/results.md: every training, as changes to one of the recipes in options/.

scripts/study/study.py does the runs; scripts/study/report.py tells what they gave.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = 'train_MSSR_EDSR_8x32_x2_291_{}.yml'
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
# Shared by all runs of the second edition.
SECOND_EDITION = {
    'train.ema_decay': 0.999,
    'val.metrics.psnr_rounded': {'type': 'calculate_psnr_published', 'crop_border': 2, 'round_y': True},
}
# Shared by the long trainings, with and without MSSR; at first they had no scale augmentation.
UNAUGMENTED = {**SECOND_EDITION, 'datasets.train.batch_size_per_gpu': 16, 'datasets.train.gt_size': 48}
LONG = {
    **UNAUGMENTED,
    'datasets.train.dataroot_gt': 'datasets/T91_BSDS200_augmented_x2/gt.lmdb',
    'datasets.train.dataroot_lq': 'datasets/T91_BSDS200_augmented_x2/lq_x2.lmdb',
}
# By MSSR, in the fast training mode.
FAST_MSSR = {**FAST, 'train.optim_g.fused': True}
LONG_MSSR = {**LONG, **FAST_MSSR}
UNAUGMENTED_MSSR = {**UNAUGMENTED, **FAST_MSSR}
# The choices that won; without self-distillation, from which kept weights gained nothing.
BEST_FORWARD = {'train.criterion': 'lamp', 'train.rewind': 'lr', 'train.ssd_opt': None}
LONG_ITER = 60000  # of each level, in both stages, of the table `long`; the smallest has twice as many
LONG_DENSE = 'experiments/long_forward_seed1/models/net_g_level0.pth'
UNAUGMENTED_DENSE = 'experiments/long_unaugmented_seed1/models/net_g_level0.pth'
SRVGG = {
    'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 32, 'num_conv': 10, 'upscale': 2,
    'act_type': 'prelu',
}  # fmt: skip
SRVGG_FP32 = {**SECOND_EDITION, 'train.optim_g.fused': True, 'network_g.backbone': SRVGG}
SRVGG_DENSE = 'experiments/srvgg_forward/models/net_g_level0.pth'

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. ``changes`` are to the options of its ``stage``, by their path in the YAML."""

    name: str
    table: str
    stage: str
    changes: Changes
    needs: tuple[str, ...] = ()  # files that other runs leave, under experiments/<name of the run>


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

    `main` keeps the weights at each pruning step and restarts the schedule. Small dense networks have as many
    iterations as the level of their size, or (`long`) as all levels up to it together. `one_shot` prunes the dense
    ticket at once (by LAMP: global magnitude would leave nothing of conv_last), `random` masks have the densities of
    main's layers; both train as long as main's level.
    """
    runs = [Run('main_forward', 'main', 'forward_lr', forward(LEVEL_ITER))]
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
    """Both stages for longer, by the choices that won, with EMA and scale augmentation; and what one would use instead.

    That is trained alike. `paper` is the paper's recipe. The small dense EDSR has as many iterations as the whole
    forward stage, and then as many as take its time. The dense ticket pruned in one shot (by LAMP, or at random) to the
    smallest level has those of all levels after it. `unaugmented` is the forward stage without scale augmentation.
    """
    each = [LONG_ITER] * (len(SPARSITY) - 1)
    with_smallest = [*each, 2 * LONG_ITER]
    runs = []
    for seed in (1, 2):
        start = f'long_forward_seed{seed}'
        tickets = {**forward(with_smallest, **BEST_FORWARD, **LONG_MSSR), 'manual_seed': seed}
        runs.append(Run(start, 'long', 'forward_lr', tickets))
        nested = {**backward(start, each, **TICKET_TEACHER, **LONG_MSSR), 'manual_seed': seed}
        runs.append(Run(f'long_backward_seed{seed}', 'long', 'backward', nested, (LATEST.format(start),)))
    tickets = {**forward(with_smallest, **BEST_FORWARD, **UNAUGMENTED_MSSR), 'manual_seed': 1}
    runs.append(Run('long_unaugmented_seed1', 'long', 'forward_lr', tickets))
    runs.append(Run('long_paper', 'long', 'forward', forward(with_smallest, **LONG_MSSR)))
    for name, times in (('long_dense_13k', 1), ('long_dense_13k_equal_time', 3)):
        runs.append(Run(name, 'long', 'forward', stock(sum(with_smallest) * times, edsr(8, 8), **LONG)))
    for name, criterion in (('long_one_shot', 'lamp'), ('long_random', 'random')):
        one_shot = {
            **BEST_FORWARD,
            **LONG_MSSR,
            'network_g.sparsity': [0, SPARSITY[-1]],
            'path.pretrain_network_g': LONG_DENSE,
            'train.first_level': 1,
            'train.criterion': criterion,
            'train.rewind_iter': 0,
        }
        runs.append(Run(name, 'long', 'forward', forward([sum(with_smallest[1:])], **one_shot), (LONG_DENSE,)))
    return runs


def x4() -> list[Run]:
    """The network of `main` at scale 4, by the choices that won, with LR patches of 18 x 18.

    The forward stage has the iterations of `main`, the backward stage 10,000 for each level.
    """
    scale: dict[str, Any] = {'scale': 4, 'network_g.backbone.upscale': 4, 'datasets.train.gt_size': 72}
    for dataset, name in (('train', 'T91_BSDS200'), ('val', 'Set5'), ('val_2', 'Set14'), ('val_3', 'BSD100')):
        scale[f'datasets.{dataset}.dataroot_gt'] = f'datasets/{name}_x4/gt.lmdb'
        scale[f'datasets.{dataset}.dataroot_lq'] = f'datasets/{name}_x4/lq_x4.lmdb'
    changes = {**SECOND_EDITION, **FAST, 'train.optim_g.fused': True, **scale}
    for metric in ('psnr', 'ssim', 'psnr_rounded'):
        changes[f'val.metrics.{metric}.crop_border'] = 4
    return both_stages('x4', LEVEL_ITER, [10000] * (len(SPARSITY) - 1), changes)


def srvgg() -> list[Run]:
    """A network that other programs open, SRVGGNetCompact, by the choices that won.

    The forward stage has the iterations of `main`, the backward stage 10,000 for each level.
    """
    return both_stages('srvgg', LEVEL_ITER, [10000] * (len(SPARSITY) - 1), SRVGG_FP32)


def trained() -> list[Run]:
    """From a trained network: the other levels for a tenth and a third of its iterations.

    It is the dense level of `long_unaugmented`, and they are trained like it, without scale augmentation.
    """
    runs = []
    for name, num_iter in (('trained_tenth', LONG_ITER // 10), ('trained_third', LONG_ITER // 3)):
        each = [num_iter] * (len(SPARSITY) - 1)
        start = {'path.pretrain_network_g': UNAUGMENTED_DENSE, 'train.first_level': 1, 'train.rewind_iter': 0}
        runs += both_stages(name, each, each, UNAUGMENTED_MSSR, start, (UNAUGMENTED_DENSE,), table='trained')
    return runs


def gan() -> list[Run]:
    """A GAN, from the dense level of `srvgg`: without a perceptual loss, whose network would have to be downloaded."""
    each = [2000] * len(SPARSITY)
    adversarial = {
        **SRVGG_FP32,
        'base_model_type': 'SRGANModel',
        'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 16, 'skip_connection': True},
        'train.gan_opt': {
            'type': 'GANLoss', 'gan_type': 'vanilla', 'real_label_val': 1.0, 'fake_label_val': 0.0, 'loss_weight': 0.1,
        },
        'train.optim_d': {'type': 'Adam', 'lr': 1e-4, 'weight_decay': 0, 'betas': [0.9, 0.99]},
        'train.net_d_iters': 1,
        'train.net_d_init_iters': 0,
        'train.optim_g.lr': 2e-4,
        'val.metrics.niqe': {'type': 'calculate_niqe', 'crop_border': 2},
    }  # fmt: skip
    return both_stages('gan', each, each[1:], adversarial, {'path.pretrain_network_g': SRVGG_DENSE}, (SRVGG_DENSE,))


def both_stages(
    name: str,
    forward_iter: list[int],
    backward_iter: list[int],
    shared: Changes,
    start: Changes = MappingProxyType({}),
    needs: tuple[str, ...] = (),
    table: str | None = None,
) -> list[Run]:
    """A forward stage by the best recipe, from ``start`` if given, and a backward stage with the tickets' images."""
    table = table or name
    last = LATEST.format(f'{name}_forward')
    tickets = forward(forward_iter, **{**BEST_FORWARD, **shared, **start})
    nested = backward(f'{name}_forward', backward_iter, **{**TICKET_TEACHER, **shared})
    return [
        Run(f'{name}_forward', table, 'forward_lr', tickets, needs),
        Run(f'{name}_backward', table, 'backward', nested, (last,)),
    ]


def edsr_m() -> list[Run]:
    """The paper's size: EDSR-M by the recipe of `long`, at batch 8.

    Each level has a quarter of the iterations there; the smallest has three times as many, of which the last two thirds
    are one period of the schedule. `unaugmented` is the forward stage without scale augmentation.
    """
    each = [LONG_ITER // 4] * (len(SPARSITY) - 1)
    size = {
        'network_g.backbone.num_feat': 64,
        'network_g.backbone.num_block': 16,
        'datasets.train.batch_size_per_gpu': 8,
        'train.optim_g.lr': 1e-3,
    }
    # A larger network needs a smaller learning rate; the backward stage, again, a larger one.
    smallest = {'train.scheduler.periods': [each[0], 2 * each[0]], 'train.scheduler.restart_weights': [1, 1]}
    start = {'train.optim_g.lr': 5e-4, **smallest}
    with_smallest = [*each, 3 * each[0]]
    unaugmented = forward(with_smallest, **{**BEST_FORWARD, **UNAUGMENTED_MSSR, **size, **start})
    return [
        *both_stages('edsr_m', with_smallest, each, {**LONG_MSSR, **size}, start),
        Run('edsr_m_unaugmented_forward', 'edsr_m', 'forward_lr', unaugmented),
    ]


TABLES = (main_table, choices, cost, long, x4, srvgg, trained, gan, edsr_m)
RUNS = {run.name: run for table in TABLES for run in table()}


def options_of(run: Run) -> dict[str, Any]:
    """The whole YAML of a run."""
    options: dict[str, Any] = yaml.safe_load((ROOT / 'options' / OPTIONS.format(run.stage)).read_text())
    options['name'] = run.name
    for path, value in run.changes.items():
        *parents, key = path.split('.')
        part = options
        for parent in parents:
            part = part[parent]
        part[key] = copy.deepcopy(value)  # which later changes, and other runs, leave alone
    return options
