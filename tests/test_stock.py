"""Stock BasicSR with the plugin installed: its own options work as before, and its own scripts run the plugin."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import basicsr.test
import basicsr.train
import pytest
import yaml
from conftest import TOY_EDSR, call

pytestmark = pytest.mark.slow

# Trains by the options in sys.argv and prints the pixel loss of each iteration, all bits of it.
LOSSES = """
import os, sys
import torch, torchvision.transforms
try:
    import torchvision.transforms.functional_tensor
except ModuleNotFoundError:  # BasicSR 1.4.2 alone would not be imported
    import torchvision.transforms._functional_tensor as successor
    sys.modules['torchvision.transforms.functional_tensor'] = successor
import basicsr.models.sr_model as sr_model
from basicsr.train import train_pipeline
from basicsr.utils.registry import ARCH_REGISTRY

print('plugin:', 'MSSR' in ARCH_REGISTRY)
optimize = sr_model.SRModel.optimize_parameters
def spy(model, current_iter):
    optimize(model, current_iter)
    print('loss', current_iter, model.log_dict['l_pix'].hex())
sr_model.SRModel.optimize_parameters = spy
train_pipeline(os.getcwd())
"""


@pytest.fixture
def stock_opt(forward_opt: dict[str, Any]) -> dict[str, Any]:
    """50 iterations of EDSR with the stock SRModel, EMA and validation included."""
    forward_opt.update(name='stock', model_type='SRModel', network_g=dict(TOY_EDSR))
    for key in ('level_iter', 'rewind_iter', 'ssd_opt'):
        del forward_opt['train'][key]
    forward_opt['train'].update(total_iter=50)
    forward_opt['train']['scheduler']['periods'] = [50]
    forward_opt['val']['val_freq'] = 25
    return forward_opt


def test_stock_training_gives_the_same_losses_bit_for_bit(stock_opt: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for plugin in ('0', '1'):
        folder = tmp_path / plugin
        folder.mkdir()
        (folder / 'stock.yml').write_text(yaml.safe_dump(stock_opt))
        command = [sys.executable, '-c', LOSSES, '-opt', 'stock.yml']
        said = call(*command, cwd=folder, MSSR_BASICSR_DISCOVERY=plugin)
        assert f'plugin: {plugin == "1"}' in said
        losses[plugin] = [line for line in said.splitlines() if line.startswith('loss')]
    assert len(losses['0']) == 50
    assert losses['0'] == losses['1']


def test_the_stock_scripts_train_and_test(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], tmp_path: Path
) -> None:
    """As in an unpacked sdist or a checkout: ``basicsr/train.py`` as a script, whose root is the folder above."""
    scripts = tmp_path / 'basicsr'
    scripts.mkdir()
    shutil.copy(basicsr.train.__file__, scripts / 'train.py')
    shutil.copy(basicsr.test.__file__, scripts / 'test.py')
    test_opt = {key: forward_opt[key] for key in ('scale', 'num_gpu', 'manual_seed', 'network_g', 'val')}
    test_opt.update(name='test', model_type='MSSRModel', datasets={'test_1': forward_opt['datasets']['val']})
    test_opt['path'] = {
        'pretrain_network_g': 'experiments/backward/models/net_g_latest.pth',
        'param_key_g': 'params_ema',
    }
    test_opt['val']['suffix'] = None
    for script, opt in (('train', forward_opt), ('train', backward_opt), ('test', test_opt)):
        (tmp_path / 'options.yml').write_text(yaml.safe_dump(opt))
        call(sys.executable, f'basicsr/{script}.py', '-opt', 'options.yml', cwd=tmp_path)
    trained = json.loads((tmp_path / 'experiments' / 'backward' / 'models' / 'levels.json').read_text())
    tested = json.loads((tmp_path / 'results' / 'test' / 'levels.json').read_text())
    assert [record['level'] for record in tested] == [0, 1, 2]
    assert [record['metrics'] for record in tested] == [record['metrics'] for record in trained]
