"""The plan of a stage: the levels that it trains, the iterations of each, and where in the plan an iteration is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from basicsr.utils import get_root_logger

from mssr_basicsr.foundation.checks import OptionError, require_int
from mssr_basicsr.method.schedules import LevelTraining

# What restarts at each level, with what it means until it is over. One of the first two that lasts as long as a level
# makes the training of that level pointless; the other two leave most of it, and may be meant.
_POINTLESS = {
    'net_d_init_iters': 'until then only the discriminator trains',
    'tsa_iter': 'until then only the TSA module trains',
}
_DOUBTFUL = {
    'fix_flow': 'until then the flow network does not train',
    'warmup_iter': "until then the learning rate is below the schedule's",
}


class TrainingPlan:
    """The levels that a stage trains, one by one.

    Args:
        trainings: in order.
    """

    def __init__(self, trainings: Sequence[LevelTraining]) -> None:
        self.trainings = list(trainings)

    @property
    def first(self) -> LevelTraining:
        return self.trainings[0]

    @property
    def last(self) -> LevelTraining:
        return self.trainings[-1]

    def before(self, training: LevelTraining) -> LevelTraining | None:
        """The one before ``training``, None if it is the first."""
        index = self.trainings.index(training)
        return self.trainings[index - 1] if index > 0 else None

    def locate(self, current_iter: int) -> tuple[LevelTraining, int]:
        """The training of the run's iteration ``current_iter`` (from 1), and the iteration within it (from 1).

        After the end of the run: its last training, and the last iteration of that.
        """
        step = current_iter
        for training in self.trainings:
            if step <= training.num_iter:
                return training, step
            step -= training.num_iter
        return self.last, self.last.num_iter

    def begun(self, current_iter: int) -> list[LevelTraining]:
        """The trainings that have begun or are finished after ``current_iter`` iterations."""
        return self.trainings[: self.trainings.index(self.locate(current_iter)[0]) + 1]

    def check(self, opt: Mapping[str, Any], scheduled: Sequence[LevelTraining]) -> None:
        """Raise OptionError unless the YAML's iterations, validations and learning-rate schedule fit the plan.

        Args:
            opt: the whole YAML.
            scheduled: the trainings in which the learning rate follows the YAML's schedule.
        """
        train_opt = opt['train']
        iterations = [training.num_iter for training in self.trainings]
        if train_opt.get('total_iter') != sum(iterations):
            parts = ' + '.join(f'{training.num_iter} at level {training.level}' for training in self.trainings)
            raise OptionError('train.total_iter', train_opt.get('total_iter'), f'{sum(iterations)} ({parts})')
        if opt.get('val') is not None and 'debug' not in opt['name']:  # --debug sets a val_freq of its own
            val_freq = require_int('val.val_freq', opt['val'].get('val_freq'), 1)
            if any(num_iter % val_freq for num_iter in iterations):
                allowed = f"a divisor of each level's iterations, {iterations}, to validate each level at its end"
                raise OptionError('val.val_freq', val_freq, allowed)
        for key in ('print_freq', 'save_checkpoint_freq'):
            require_int(f'logger.{key}', opt['logger'].get(key), 1)
        iterations_scheduled = [training.num_iter for training in scheduled]
        _check_phases(train_opt, min(iterations), min(iterations_scheduled))
        _check_schedule(train_opt.get('scheduler') or {}, iterations_scheduled)


def _check_phases(train_opt: Mapping[str, Any], shortest: int, shortest_scheduled: int) -> None:
    """Refuse a phase of the model class after which a level has no iterations left, or warn of it."""
    for key, meaning in {**_POINTLESS, **_DOUBTFUL}.items():
        num_iter, below = train_opt.get(key), shortest_scheduled if key == 'warmup_iter' else shortest
        if not isinstance(num_iter, (int, float)) or num_iter < below:
            continue
        reason = f'{below}, the iterations of the shortest level: it restarts at each level, and {meaning}'
        if key in _POINTLESS:
            raise OptionError(f'train.{key}', num_iter, f'a number below {reason}')
        get_root_logger().warning(f'train.{key}: {num_iter} is not below {reason}.')


def _check_schedule(scheduler: Mapping[str, Any], iterations: Sequence[int]) -> None:
    """Refuse a learning-rate schedule that ends before a level does; warn if the rate does not come down in a level.

    It does not if the schedule is longer than any level, as a stock YAML's is, which is for the whole training; nor if
    levels have different lengths and a shorter one ends within a period, or before a milestone.
    """
    longest, periods = max(iterations), scheduler.get('periods')
    if periods is not None and sum(periods) < longest:
        allowed = f'periods that add up to {longest} or more (the schedule is for one level)'
        raise OptionError('train.scheduler.periods', periods, allowed)
    ends = {'periods': list(accumulate(periods or [])), 'milestones': scheduler.get('milestones') or []}
    for key, iteration in ends.items():
        beyond = [end for end in iteration if end > longest]
        if beyond:
            get_root_logger().warning(
                f'train.scheduler.{key}: no level reaches iteration {beyond[0]}: the schedule restarts at each level, '
                f'and the longest has {longest} iterations.'
            )
    for num_iter in sorted({*iterations} - {longest}):
        late = [end for end in ends['milestones'] if num_iter < end <= longest]
        if periods is not None and num_iter not in ends['periods']:
            late += [min(end for end in ends['periods'] if end > num_iter)]
        if late:
            get_root_logger().warning(
                f'train.scheduler: a level ends after {num_iter} iterations, before the learning rate has come down at '
                f'iteration {late[0]}: the schedule restarts at each level, and these have {list(iterations)}.'
            )
