"""What a training script of BasicSR does before there is a model, for MSSR networks and on current software."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Callable

from mssr_basicsr.adapter import cpu
from mssr_basicsr.adapter.backbone_options import is_mssr
from mssr_basicsr.foundation.checks import OptionError, first_line
from mssr_basicsr.foundation.patching import patch

NUM_BATCHES = 'num_batches'  #: of an epoch: what :func:`train_to_total_iter` adds to the training set's options


def prepare_script(parse_options: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps ``parse_options``: functions of the training script that calls it get the fixes below.

    ``basicsr/train.py`` usually runs as ``__main__``, where no import hook can replace its functions. But it parses its
    options before it looks for a state to resume from and before it creates the data loaders.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and 'load_resume_state' not in frame.f_globals:
        frame = frame.f_back
    if frame is not None:
        script = sys.modules[frame.f_globals['__name__']]
        patch(script, 'load_resume_state', keep_param_keys)
        patch(script, 'load_resume_state', cpu.load_resume_state_on_cpu)
        patch(script, 'load_resume_state', name_unreadable_state)
        patch(script, 'load_resume_state', resume_where_saved)
        if hasattr(script, 'create_train_val_dataloader'):
            patch(script, 'create_train_val_dataloader', train_to_total_iter)
    return parse_options(*args, **kwargs)


def resume_where_saved(load_resume_state: Callable[..., Any], opt: dict[str, Any]) -> Any:
    """Wraps ``load_resume_state``: with an MSSR network, ``--auto_resume`` looks where the run saves its states.

    BasicSR looks in ``experiments`` in the current folder, which need not be where it saves them; there it still looks
    if there are none. It does not read a ``path.resume_state`` of the YAML then, which is taken out, so that a new run
    is known as one.
    """
    if not (is_mssr(opt) and opt['auto_resume']):
        return load_resume_state(opt)
    paths = opt['path']
    asked, paths['resume_state'] = paths.get('resume_state'), None
    saved = [path for path in Path(paths['training_states']).glob('*.state') if path.stem.isdigit()]
    if saved:
        paths['resume_state'] = str(max(saved, key=lambda path: int(path.stem)))
    state = load_resume_state({**opt, 'auto_resume': not saved})
    if asked and paths['resume_state'] != asked:
        instead = f'continues from {paths["resume_state"]}' if state else 'begins anew'
        warnings.warn(f'path.resume_state: {asked} is not used: with --auto_resume the run {instead}.', stacklevel=2)
    return state


def name_unreadable_state(load_resume_state: Callable[..., Any], opt: dict[str, Any]) -> Any:
    """Wraps ``load_resume_state``: the error about a state that torch cannot read names the file."""
    try:
        return load_resume_state(opt)
    except Exception as error:
        allowed = f'a complete training state ({first_line(error)})'
        raise OptionError('path.resume_state', opt['path'].get('resume_state'), allowed) from error


def keep_param_keys(load_resume_state: Callable[..., Any], opt: dict[str, Any]) -> Any:
    """Wraps ``load_resume_state``: with an MSSR network, a network that is not resumed keeps its ``param_key``.

    BasicSR changes every ``params_ema`` to ``params``, as in the run's own files, though other networks, such as a
    teacher, are read from the same file as before.
    """
    keys = {key: value for key, value in opt['path'].items() if key.startswith('param_key')}
    state = load_resume_state(opt)
    if is_mssr(opt):
        resumed = resumed_networks(opt)
        opt['path'].update(
            {key: value for key, value in keys.items() if key.replace('param_key', 'network') not in resumed}
        )
    return state


def resumed_networks(opt: Mapping[str, Any]) -> list[str]:
    """The networks, such as ``network_g``, that BasicSR loads from what the run has saved; none in a new run."""
    paths = opt['path']
    if not paths.get('resume_state'):
        return []
    ignored = paths.get('ignore_resume_networks') or []
    return [key for key in opt if key.startswith('network_') and key not in ignored]


def train_to_total_iter(
    create_train_val_dataloader: Callable[..., Any], opt: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Wraps ``create_train_val_dataloader``: an MSSR network is trained for all of ``total_iter``.

    BasicSR counts an incomplete batch at an epoch's end, which its loader drops, so it plans too few epochs where they
    are short. An epoch without any batch is an OptionError. The number of batches is kept in ``opt`` for
    :func:`mssr_basicsr.adapter.resuming.epoch_to_resume`.
    """
    from basicsr.utils import get_root_logger

    created = create_train_val_dataloader(opt, *args, **kwargs)
    if not is_mssr(opt):
        return created
    train_loader, train_sampler, val_loaders, total_epochs, total_iters = created
    train_opt, num_batches = opt['datasets']['train'], len(train_loader)
    if num_batches == 0:
        allowed = (
            f'a larger one: an epoch has {len(train_sampler)} images for each process, a batch '
            f'{train_loader.batch_size}, and BasicSR drops an incomplete batch'
        )
        raise OptionError('datasets.train.dataset_enlarge_ratio', train_opt.get('dataset_enlarge_ratio', 1), allowed)
    train_opt[NUM_BATCHES] = num_batches
    needed = math.ceil(total_iters / num_batches)
    if needed > total_epochs:
        get_root_logger().info(f'Total epochs: {needed}; complete batches in each: {num_batches}.')
    return train_loader, train_sampler, val_loaders, max(needed, total_epochs), total_iters
