"""The examples of docs/extending.md, verbatim: each is registered and used in a training."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
from conftest import SPARSITY, TOY_EDSR, Run

from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.method.level_map import mask_of
from mssr_basicsr.method.schedules import EXPANSION_REGISTRY
from mssr_basicsr.scalable import architectures

DOCUMENT = Path(__file__).resolve().parents[1] / 'docs' / 'extending.md'


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the document's Python registers, for one test: it goes into copies of the registries' entries."""
    for registry in (CRITERION_REGISTRY, EXPANSION_REGISTRY):
        monkeypatch.setattr(registry, '_entries', dict(registry._entries))
    for registry in (ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY):
        monkeypatch.setattr(registry, '_obj_map', dict(registry._obj_map))
    monkeypatch.setattr(architectures, '_KNOWN', dict(architectures._KNOWN))
    module = types.ModuleType('my_extensions')
    monkeypatch.setitem(sys.modules, 'my_extensions', module)
    _, *blocks = re.findall(
        r'```python\n(.*?)```', DOCUMENT.read_text('utf-8'), re.DOTALL
    )  # the first starts a training
    for block in blocks:
        exec(compile(block, str(DOCUMENT), 'exec'), module.__dict__)


def test_criterion_loss_base_model_and_schedule_train(
    run: Run, forward_opt: dict[str, Any], backward_opt: dict[str, Any]
) -> None:
    forward_opt['base_model_type'] = backward_opt['base_model_type'] = 'NoisyInputModel'
    forward_opt['train'].update(criterion='magnitude_per_output_channel', noise_sigma=0.02)
    forward_opt['train']['ssd_opt']['criterion'] = {'type': 'GradientLoss'}
    run(forward_opt)
    backward_opt['train']['expansion'] = {'type': 'ProportionalExpansion', 'total_iter': 6}
    backward_opt['val']['val_freq'] = 2
    models = run(backward_opt) / 'models'
    # Of the weights, half are recovered for level 0 and a quarter for level 1: 4 and 2 of the 6 iterations.
    records = json.loads((models / 'levels.json').read_text())
    assert [record.get('iterations') for record in records] == [4, 2, None]


def test_the_criterion_removes_a_channel_of_zeros() -> None:
    network = MSSR(TOY_EDSR, SPARSITY)
    with torch.no_grad():
        network.prunable_weights()['conv_first.weight'][0] = 0
    network.prune(1, CRITERION_REGISTRY.get('magnitude_per_output_channel'), torch.Generator())
    assert not mask_of(network.get_level_map(), 1)['conv_first.weight'][0].any()


def test_an_architecture_trains_and_its_trunk_is_tapped(run: Run, forward_opt: dict[str, Any]) -> None:
    forward_opt['network_g']['backbone'] = {'type': 'TinyNet'}
    models = run(forward_opt) / 'models'
    assert (models / 'net_g_level2.pth').is_file()
