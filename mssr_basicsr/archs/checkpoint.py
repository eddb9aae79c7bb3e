"""Reading the checkpoint from which a ``.mssr`` file is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mssr_basicsr.adapter.option_files import read_yaml
from mssr_basicsr.adapter.records import LAST_CHECKPOINT, RECORDS
from mssr_basicsr.archs.mssr_arch import MSSR, is_plain, require_levels, require_nested
from mssr_basicsr.foundation.checkpoints import (
    CheckpointError,
    loaded_strictly,
    non_finite,
    read_checkpoint,
    state_dict_of,
)
from mssr_basicsr.foundation.checks import OptionError, first_line, require_int
from mssr_basicsr.scalable.architectures import check_scale
from mssr_basicsr.scalable.building import without_weight_files
from mssr_basicsr.scalable.packing import level_metrics


def load_checkpoint(
    checkpoint: str | os.PathLike[str], options: str | os.PathLike[str]
) -> tuple[MSSR, int, dict[str, Any]]:
    """The network in a checkpoint of the backward stage, its upscaling factor, and its levels' metrics where known.

    Args:
        checkpoint: a file saved by BasicSR. The EMA's weights are used if it has any. The metrics of
            ``net_g_latest.pth`` are those of the ``levels.json`` beside it, if there is one.
        options: the YAML that it was trained or tested with, of which ``network_g`` and ``scale`` are read. The
            upscaling factor is found by running the network on a small image; a different ``scale`` is an error.

    Raises:
        ValueError: a wrong option, or not a checkpoint of this network's backward stage; the text says which.
        OSError: a file cannot be read.
    """
    checkpoint, options = Path(checkpoint), Path(options)
    opt = read_yaml(options)
    network_opt = opt.get('network_g')
    if not isinstance(network_opt, dict) or network_opt.get('type') != 'MSSR':
        found = network_opt.get('type') if isinstance(network_opt, dict) else network_opt
        raise OptionError('network_g.type', found, f'MSSR, in {options}')
    scale = None if opt.get('scale') is None else require_int('scale', opt['scale'], 1)
    arguments = {key: value for key, value in network_opt.items() if key not in ('type', 'level')}
    if isinstance(arguments.get('backbone'), dict):
        arguments['backbone'] = without_weight_files(arguments['backbone'])
    network = MSSR(**arguments)
    try:
        loaded = read_checkpoint(checkpoint)
        state = state_dict_of(loaded, 'params_ema')
        if is_plain(state):
            raise CheckpointError(f'it is not of an MSSR network ({LAST_CHECKPOINT} of the backward stage is)')
        require_nested(loaded)
        require_levels(state, network.smallest_level)
        with loaded_strictly(state, network):
            network.load_state_dict(state)
        bad = non_finite(dict(network.backbone.named_parameters()))
        if bad:
            raise CheckpointError(f'{bad[0]} in it is not finite (NaN or infinity)')
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error
    scale = check_scale(network.backbone, network.backbone_options, scale)
    return network, scale, _metrics_beside(checkpoint)


def _metrics_beside(checkpoint: Path) -> dict[str, Any]:
    """The metrics in the ``levels.json`` beside a run's last checkpoint; empty if there is none.

    The records say what the run ended with, so they are not those of an earlier checkpoint.
    """
    records = checkpoint.with_name(RECORDS)
    if checkpoint.name != LAST_CHECKPOINT or not records.is_file():
        return {}
    try:
        return level_metrics(json.loads(records.read_text('utf-8')))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        allowed = f'the {RECORDS} that training writes, or no such file'
        raise ValueError(f'{records}: {first_line(error)}; allowed: {allowed}') from error
