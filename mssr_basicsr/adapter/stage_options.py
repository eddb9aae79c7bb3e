"""The options that MSSR reads under ``train`` and ``val``, each declared once: with default, bounds and meaning.

BasicSR's own options and those of the base model class are unaffected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mssr_basicsr.foundation.checks import OptionError, option, require_bool, require_int, require_one_of
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.method.recovery import RECOVERY_STARTS

PRECISIONS = ('fp32', 'bf16')


def check_precision(name: str, found: Any) -> str:
    """``found``, one of :data:`PRECISIONS`; else OptionError."""
    if found == 'fp16':
        raise OptionError(name, found, 'bf16, fp32 (fp16 would need loss scaling; bf16 does not)')
    return require_one_of(name, found, PRECISIONS)


def _first_level(name: str, found: Any) -> int:
    return require_int(name, found, 0, 1)


def _one_of(allowed: Iterable[str]) -> Callable[[str, Any], str]:
    return lambda name, found: require_one_of(name, found, allowed)


@dataclass(frozen=True)
class StageOptions:
    """What both stages read under ``train``."""

    exact_resume: bool = option(
        'Whether a resumed run sees the same data and draws the same random numbers as an uninterrupted run. If '
        'false, the interrupted epoch starts over.',
        require_bool,
        True,
    )
    precision: str = option(
        "The precision of the networks in training: fp32, or bf16 by torch's autocast. Losses, parameters, gradients, "
        'optimizers, EMA and everything saved are always fp32; so is validation, unless val.precision is bf16.',
        check_precision,
        'fp32',
    )
    channels_last: bool = option(
        "Whether net_g and its teachers use torch's channels_last memory format in training. This is faster for most "
        'convolutional networks, but slower for some.',
        require_bool,
        False,
    )


@dataclass(frozen=True)
class ForwardOptions(StageOptions):
    """What the forward stage reads under ``train``."""

    level_iter: int | Sequence[int] | None = option(
        'Iterations of each trained level: one number for all, or a list with one per level; total_iter is their sum.'
    )
    first_level: int = option(
        '1 uses the trained network path.pretrain_network_g (its params_ema, unless there is none or path.param_key_g '
        'names other weights) as level 0 and as the rewind point, and starts by pruning it.',
        _first_level,
        0,
    )
    criterion: str = option(
        'Which weights are pruned: global_magnitude, layer_magnitude, lamp, random, or one of your own.',
        _one_of(CRITERION_REGISTRY),
        'global_magnitude',
    )
    rewind: str = option(
        'What happens to the weights that survive pruning: weights sets them to the rewind point (the paper); lr keeps '
        'them and restarts the learning-rate schedule (Renda et al. 2020); none keeps them and continues with the last '
        'learning rate of the first trained level (fine-tuning).',
        _one_of(('weights', 'lr', 'none')),
        'weights',
    )
    rewind_iter: int | None = option(
        "The iteration of level 0 whose weights are the rewind point, from 0 to level 0's iterations. Default: 10 % of "
        'these. With first_level: 1 leave it out: the rewind point is the given network.'
    )
    ssd_opt: Any = option(
        'Options of SSDLoss, the loss of stochastic self-distillation. Default: no self-distillation. The teacher of '
        "level k is level k - 1's ticket; level 0 has no teacher."
    )


@dataclass(frozen=True)
class BackwardOptions(StageOptions):
    """What the backward stage reads under ``train``."""

    expansion: Any = option(
        'Options of the expansion schedule, with its type: SequentialExpansion, or one of your own.'
    )
    recover: str = option(
        'What recovered weights start from: ticket (the value that a weight was pruned with), rewind (its value at the '
        'rewind point) or zero.',
        _one_of(RECOVERY_STARTS),
        'ticket',
    )
    ticket_opt: Any = option(
        "Options, with the type, of a loss that compares a level's output with its own ticket's; it is added to the "
        'pixel loss. The tickets are the net_g_level{k}.pth beside path.pretrain_network_g. Default: none.'
    )


@dataclass(frozen=True)
class ValidationOptions:
    """What validation in both stages, and testing, reads under ``val``."""

    precision: str = option(
        "The precision of the validated network: fp32, or bf16 by torch's autocast.", check_precision, 'fp32'
    )
