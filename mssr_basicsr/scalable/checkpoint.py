"""Reading the checkpoint that a ``.mssr`` file is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from basicsr.utils.options import ordered_yaml

from mssr_basicsr.archs.mssr_arch import MSSR, is_plain
from mssr_basicsr.foundation.checkpoints import CheckpointError, read_checkpoint, require_same_entries, state_dict_of
from mssr_basicsr.foundation.checks import OptionError, require_int
from mssr_basicsr.scalable.building import without_weight_files
from mssr_basicsr.scalable.packing import level_metrics


def load_checkpoint(checkpoint: Path, options: Path) -> tuple[MSSR, int, dict[str, Any]]:
    """The network in a checkpoint of the backward stage, its upscaling factor, and its levels' metrics where known.

    Args:
        checkpoint: as BasicSR saved it; of its EMA if there is one. ``levels.json`` beside it has the metrics.
        options: the YAML that it was trained or tested with: ``network_g`` and ``scale`` are read.

    Raises:
        ValueError: a wrong option, or not a checkpoint of this network's backward stage; the text says which.
        OSError: a file cannot be read.
    """
    opt = yaml.load(options.read_text('utf-8'), Loader=ordered_yaml()[0])
    network_opt = dict(opt.get('network_g') or {})
    if network_opt.pop('type', None) != 'MSSR':
        raise OptionError('network_g.type', (opt.get('network_g') or {}).get('type'), f'MSSR, in {options}')
    network_opt.pop('level', None)
    if isinstance(network_opt.get('backbone'), dict):
        network_opt['backbone'] = without_weight_files(network_opt['backbone'])
    network = MSSR(**network_opt)
    try:
        loaded = read_checkpoint(checkpoint)
        state = state_dict_of(loaded, 'params_ema')
        if is_plain(state):
            raise CheckpointError('it is of no MSSR network (net_g_latest.pth of the backward stage is one)')
        if 'rewind' in loaded:
            raise CheckpointError('it is of the forward stage; the levels are nested after the backward stage only')
        require_same_entries(state, network.state_dict())
        network.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error
    records = checkpoint.with_name('levels.json')
    known = json.loads(records.read_text()) if records.is_file() else []
    return network, require_int('scale', opt.get('scale'), 1), level_metrics(known)
