"""Bad training data: the error names it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import Run

from mssr_basicsr.foundation.checks import OptionError


@pytest.fixture
def data(toy_data: Path, tmp_path: Path, forward_opt: dict[str, Any]) -> Path:
    """A copy of the toy data, which ``forward_opt`` then trains on."""
    folder = tmp_path / 'data'
    shutil.copytree(toy_data, folder)
    for dataset in forward_opt['datasets'].values():
        dataset.update(dataroot_gt=str(folder / 'gt'), dataroot_lq=str(folder / 'lq'))
    return folder


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('damaged', ['gt', 'lq'])
def test_a_corrupt_image_is_named_with_its_pair(
    damaged: str, workers: int, data: Path, forward_opt: dict[str, Any], run: Run
) -> None:
    for name in ('0', '1', '2', '3'):
        (data / damaged / f'{name}.png').write_bytes(b'\x89PNG, cut short')
    forward_opt['datasets']['train']['num_worker_per_gpu'] = workers
    with pytest.raises(ValueError, match=r'datasets\.train: cannot read ') as caught:
        run(forward_opt)
    files = [(str(data / 'lq' / f'{i}.png'), str(data / 'gt' / f'{i}.png')) for i in range(4)]
    assert any(lq in str(caught.value) and gt in str(caught.value) for lq, gt in files)


def test_a_corrupt_image_in_the_validation_set(data: Path, forward_opt: dict[str, Any], run: Run) -> None:
    shutil.copytree(data, data.with_name('val'))
    for name in ('gt', 'lq'):
        forward_opt['datasets']['val'][f'dataroot_{name}'] = str(data.with_name('val') / name)
    (data.with_name('val') / 'lq' / '2.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'datasets\.val: cannot read .*lq/2\.png'):
        run(forward_opt)


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_an_empty_folder_is_refused_before_training(
    phase: str, tmp_path: Path, forward_opt: dict[str, Any], run: Run
) -> None:
    for name in ('gt', 'lq'):
        (tmp_path / 'empty' / name).mkdir(parents=True)
        forward_opt['datasets'][phase][f'dataroot_{name}'] = str(tmp_path / 'empty' / name)
    with pytest.raises(OptionError, match=rf'datasets\.{phase}: found .*empty/gt.*; allowed: folders or LMDBs that'):
        run(forward_opt)
    assert not list(tmp_path.glob('experiments/forward/models/*'))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'found nothing; allowed: a mapping'),
        ('- name', 'found a list'),
        ('name: x\n\tscale: 2', 'line 2; allowed'),
    ],
)
def test_a_yaml_that_holds_no_options_is_named(text: str, message: str, tmp_path: Path) -> None:
    from basicsr.utils.options import parse_options

    yml = tmp_path / 'net.yml'
    yml.write_text(text)
    with mock.patch.object(sys, 'argv', ['train.py', '-opt', str(yml)]), pytest.raises(ValueError) as caught:
        parse_options(str(tmp_path))
    assert str(caught.value).startswith(f'{yml}: ')
    assert message in str(caught.value)


def test_the_network_decides_the_scale_before_training(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['network_g']['backbone']['upscale'] = 4
    with pytest.raises(OptionError, match=r'scale: found 2; allowed: 4, the factor by which the network upscales'):
        run(forward_opt)
