"""What a resumed run needs besides BasicSR's own ``.state``, and whether a state belongs to the run that resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from basicsr.utils import get_root_logger
from torch import Tensor

from mssr_basicsr.adapter.records import LevelRecord
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.method.schedules import LevelTraining

VERSION = 3  #: of :class:`RunState`; any other is refused


@dataclasses.dataclass
class RunState:
    """The entry ``mssr`` of a ``.state``. It consists of types that torch loads with ``weights_only``."""

    seed: int
    plan: Sequence[Sequence[int]]  #: (level, iterations) of all that the stage trains
    options: dict[str, Any]  #: by name, the options that decide about levels to come
    records: dict[int, LevelRecord]  #: by level
    untrained: list[str]  #: names of the parameters that a phase of the base class has switched off
    random_states: list[dict[str, Any]]  #: of each rank
    kept: list[dict[str, Any]]  #: of each rank, :func:`kept_between_iterations`
    version: int = VERSION
    num_batches: int | None = None  #: in an epoch; older states do not say, nor do scripts that do not tell


def kept_between_iterations(model: Any) -> dict[str, Any]:
    """Real-ESRGAN's pool of training pairs, its tensors on the CPU, and what its shape depends on; empty without one.

    The pool is what the class keeps in attributes whose names begin with ``queue_``, as tensors, numbers and texts.
    """
    pool = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in vars(model).items()
        if name.startswith('queue_') and name != 'queue_size' and isinstance(value, (Tensor, int, float, str))
    }
    return {**pool, 'options': _options_of_pool(model)} if pool else {}


def put_back_kept(model: Any, kept: Mapping[str, Any]) -> None:
    """Give ``model`` back what :func:`kept_between_iterations` returned, on its device.

    With another size of the pool, its pairs or the batches, the pool fills anew, as at the start of a run.
    """
    pool, options = dict(kept), _options_of_pool(model)
    kept_options = pool.pop('options', options)
    if kept_options != options:
        get_root_logger().warning(f'The pool of training pairs fills anew: it had {kept_options}, now {options}.')
        return
    for name, value in pool.items():
        setattr(model, name, value.to(model.device) if isinstance(value, Tensor) else value)


def _options_of_pool(model: Any) -> dict[str, Any]:
    opt, data = model.opt, model.opt['datasets']['train']
    of_data = {f'datasets.train.{key}': data.get(key) for key in ('batch_size_per_gpu', 'gt_size')}
    return {**{key: opt.get(key) for key in ('scale', 'queue_size', 'gt_size')}, **of_data}


def in_python_numbers(state: Any) -> Any:
    """``state`` with NumPy's numbers, which a scheduler may have, turned into Python's: torch loads no others.

    An array becomes a list, and stays one when the run is resumed.
    """
    if isinstance(state, (np.generic, np.ndarray)):
        return state.tolist()
    if isinstance(state, dict):
        plain = copy(state)  # of its own class: BasicSR's schedulers have a Counter
        plain.clear()
        for key, value in state.items():
            plain[in_python_numbers(key)] = in_python_numbers(value)
        return plain
    return type(state)(map(in_python_numbers, state)) if type(state) in (list, tuple) else state


def read_run_state(
    resume_state: Mapping[str, Any], path: str, model_type: str, begun: Sequence[LevelTraining], options: dict[str, Any]
) -> RunState:
    """MSSR's entry in a ``.state``; a warning names the options that have changed since it was saved.

    Args:
        resume_state: as loaded by BasicSR.
        path: its file, for errors.
        model_type: the model that resumes.
        begun: the levels that, by this run's plan, have been trained or begun by then.
        options: this run's, as in :attr:`RunState.options`.

    Raises:
        OptionError: it is from another kind of model, another version, or a run that began with another plan.
    """
    entry = resume_state.get('mssr')
    if entry is None:
        raise OptionError('path.resume_state', path, f'a state that {model_type} saved')
    if entry['version'] != VERSION:
        allowed = f'a state of version {VERSION}; this one has version {entry["version"]}: '
        raise OptionError('path.resume_state', path, allowed + 'resume it with the mssr-basicsr that saved it')
    state = RunState(**entry)
    began = [LevelTraining(*training) for training in state.plan[: len(begun)]]
    if began != list(begun):
        here, there = (
            ', '.join(f'{num_iter} iterations at level {level}' for level, num_iter in plan) for plan in (begun, began)
        )
        raise OptionError('path.resume_state', path, f'a state of a run that began with {here}; this one: {there}')
    changed = [
        f'{name}: the run began with {state.options[name]!r} and continues with {value!r}'
        for name, value in options.items()
        if state.options.get(name, value) != value  # an mssr-basicsr without the option has not saved it
    ]
    if changed:
        get_root_logger().warning('Options have changed. ' + '; '.join(changed) + '.')
    return state
