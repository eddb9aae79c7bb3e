"""The shipped options: each is accepted as is, and each backward stage continues where its forward stage ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from basicsr.models import build_model
from conftest import parsed, pruned_mssr, save_as_forward_stage

OPTIONS = Path(__file__).resolve().parent.parent / 'options'
FORWARD = {path.name: yaml.safe_load(path.read_text()) for path in sorted(OPTIONS.glob('*forward*.yml'))}
BACKWARD = {path.name: yaml.safe_load(path.read_text()) for path in sorted(OPTIONS.glob('*backward*.yml'))}


def build(recipe: str, folder: Path, **path: str) -> Any:
    opt = parsed(OPTIONS / recipe, folder)
    opt['path'].update(path)
    opt['num_gpu'] = min(opt['num_gpu'], 1)  # several need a launcher
    return build_model(opt)


@pytest.mark.parametrize('recipe', FORWARD)
def test_a_forward_recipe_is_accepted(recipe: str, tmp_path: Path) -> None:
    model = build(recipe, tmp_path)
    assert [training.level for training in model.plan.trainings] == list(
        range(len(FORWARD[recipe]['network_g']['sparsity']))
    )


@pytest.mark.slow
@pytest.mark.parametrize('recipe', BACKWARD)
def test_a_backward_recipe_continues_where_a_forward_one_ends(recipe: str, tmp_path: Path) -> None:
    start, network_g = (BACKWARD[recipe][key] for key in ('path', 'network_g'))
    (forward,) = [opt for opt in FORWARD.values() if f'/{opt["name"]}/' in start['pretrain_network_g']]
    assert forward['network_g'] == network_g
    pruned = pruned_mssr(**{key: value for key, value in network_g.items() if key != 'type'})
    save_as_forward_stage(pruned, tmp_path / 'start.pth')
    model = build(recipe, tmp_path, pretrain_network_g=str(tmp_path / 'start.pth'))
    assert [training.level for training in model.plan.trainings] == list(range(len(network_g['sparsity']) - 2, -1, -1))
