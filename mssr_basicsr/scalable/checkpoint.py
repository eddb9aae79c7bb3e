"""Reading the checkpoint that a ``.mssr`` file is made of."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.utils.options import ordered_yaml

from mssr_basicsr.archs.mssr_arch import MSSR, is_plain
from mssr_basicsr.options import OptionError, require_int
from mssr_basicsr.scalable.errors import ScalableFileError
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
    network = MSSR(**network_opt)
    try:
        loaded = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise ScalableFileError(f'{checkpoint}: not a checkpoint that torch can read ({error})') from error
    if not isinstance(loaded, dict) or 'params' not in loaded or is_plain(loaded['params']):
        raise ScalableFileError(f'{checkpoint}: not an MSSR checkpoint (net_g_latest.pth of the backward stage is one)')
    if 'rewind' in loaded:
        raise ScalableFileError(
            f'{checkpoint}: of the forward stage; its levels are nested after the backward stage only'
        )
    try:
        network.load_state_dict(loaded['params_ema' if 'params_ema' in loaded else 'params'])
    except RuntimeError as error:
        raise ScalableFileError(f'{checkpoint}: not of the network_g in {options} ({error})') from error
    records = checkpoint.with_name('levels.json')
    known = json.loads(records.read_text()) if records.is_file() else []
    return network, require_int('scale', opt.get('scale'), 1), level_metrics(known)
