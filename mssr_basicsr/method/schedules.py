"""Expansion schedules: at which levels the backward stage trains to grow the network back, and how long at each.

A schedule is a class that is built from the options under ``train.expansion`` and whose ``plan(delta_sizes)`` lists
what to train. Users add their own with ``@EXPANSION_REGISTRY.register()``, for example one that skips levels;
docs/extending.md has one whose iterations are proportional to the size of each delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from mssr_basicsr.foundation.checks import OptionError, arguments_checked, require_int, require_iterations, require_type
from mssr_basicsr.foundation.registry import Registry

EXPANSION_REGISTRY = Registry('expansion')


class LevelTraining(NamedTuple):
    """Training at ``level`` for ``num_iter`` iterations."""

    level: int
    num_iter: int


class ExpansionSchedule(Protocol):
    """The interface of a schedule."""

    def plan(self, delta_sizes: Sequence[int]) -> list[LevelTraining]:
        """The levels to train at, in order, decreasing from below K to 0.

        Each training recovers and trains the weights that its level has and the previous one lacks.

        Args:
            delta_sizes: for each level from 0 to K, how many weights it has that the next smaller one lacks; the last
                is the size of the smallest level.
        """


@EXPANSION_REGISTRY.register()
class SequentialExpansion:
    """The paper's schedule: level by level, from K - 1 to 0.

    Args:
        level_iter: iterations of each level: one number for all, or a list in the order in which levels are trained.
    """

    def __init__(self, level_iter: int | Sequence[int]) -> None:
        self.level_iter = level_iter

    def plan(self, delta_sizes: Sequence[int]) -> list[LevelTraining]:
        levels = range(len(delta_sizes) - 2, -1, -1)
        level_iter = require_iterations('train.expansion.level_iter', self.level_iter, len(levels))
        return [LevelTraining(level, num_iter) for level, num_iter in zip(levels, level_iter)]


def plan_expansion(options: Any, delta_sizes: Sequence[int]) -> list[LevelTraining]:
    """The plan of the schedule that ``options`` (``train.expansion``) name.

    Raises:
        OptionError: no such schedule, wrong arguments, or a plan whose levels do not decrease from below K to 0.
    """
    allowed = 'the options of a schedule, such as {type: SequentialExpansion}'
    require_type('train.expansion', options, EXPANSION_REGISTRY, allowed)
    arguments = dict(options)
    schedule_class = EXPANSION_REGISTRY.get(arguments.pop('type'))
    with arguments_checked('train.expansion', options, schedule_class):
        schedule: ExpansionSchedule = schedule_class(**arguments)
    plan = schedule.plan(delta_sizes)
    levels = [len(delta_sizes) - 1] + [training.level for training in plan]
    if levels[-1] != 0 or any(nxt >= level for level, nxt in zip(levels, levels[1:])):
        raise OptionError('train.expansion', levels[1:], f'a plan whose levels fall from below {levels[0]} down to 0')
    for i, training in enumerate(plan):
        require_int(f'train.expansion: iterations of training {i}', training.num_iter, 1)
    return plan
