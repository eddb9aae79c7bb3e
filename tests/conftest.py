"""Toy data, toy networks, toy options and real BasicSR runs for the tests."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable
from unittest import mock

# One thread in each test and in each process that it starts, whatever is set outside, since each core has tests of its
# own. torch and numpy read this when they are imported.
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import mssr_basicsr.models  # noqa: F401  (imports BasicSR with the plugin in it, before any test does)
from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.method.criteria import global_magnitude

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts' / 'checks'))

from toy import SPARSITY, TOY_EDSR, backward_options, forward_options, write_pairs

EXPORTS_ONNX = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 7)  # this torch's exporter can
needs_onnx_export = pytest.mark.skipif(not EXPORTS_ONNX, reason='torch is too old')

# Seconds after which a process hangs; a machine with other work to do takes several times as long as an idle one.
HANGING = 1200

# One small instance of each architecture that the plugin is shown to work on; 16 x 16 inputs.
BACKBONES: dict[str, dict[str, Any]] = {
    'EDSR': TOY_EDSR,
    'MSRResNet': {'type': 'MSRResNet', 'num_feat': 8, 'num_block': 3, 'upscale': 2},
    'RCAN': {
        'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_group': 3, 'num_block': 1,
        'squeeze_factor': 4, 'upscale': 2,
    },
    'RRDBNet': {
        'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 3, 'num_grow_ch': 4, 'scale': 2,
    },
    'SRVGGNetCompact': {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 3, 'upscale': 2},
    'SwinIR': {
        'type': 'SwinIR', 'upscale': 2, 'img_size': 16, 'window_size': 8, 'embed_dim': 8, 'depths': [2, 2, 2],
        'num_heads': [2, 2, 2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    },
}  # fmt: skip


def call(*command: str | Path, cwd: Path | None = None, expect: int = 0, **environment: str) -> str:
    """What a command prints on both channels; it ends with ``expect``, and has ``environment`` besides ours."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with process:
        try:
            said, _ = process.communicate(timeout=HANGING)
        except subprocess.TimeoutExpired as expired:  # which has bytes, even of a text
            printed = (expired.output or b'').decode(errors='replace')
            pytest.fail(f'{command} did not end within {HANGING} s. It printed:\n{printed}')
        finally:
            if process.poll() is None:  # not SIGKILL, after which torchrun could not end its ranks
                os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == expect, said
    return said


def parsed(yml: Path, folder: Path) -> dict[str, Any]:
    """The options in a file as BasicSR's ``train.py`` gets them; what it writes is to go below ``folder``."""
    from basicsr.utils.options import parse_options

    with mock.patch.object(sys, 'argv', ['train.py', '-opt', str(yml)]):
        opt, _ = parse_options(str(folder), is_train=True)
    return opt  # type: ignore[no-any-return]


def pruned_mssr(backbone: dict[str, Any], sparsity: Sequence[float] = tuple(SPARSITY), **options: Any) -> MSSR:
    """An MSSR network with all its levels, pruned by magnitude without training."""
    torch.manual_seed(0)
    network = MSSR(backbone, sparsity, **options)
    for level in range(1, len(sparsity)):
        network.prune(level, global_magnitude, torch.Generator())
    return network


def save_as_forward_stage(network: MSSR, checkpoint: Path) -> None:
    """Write what a forward stage ends with: the checkpoint and, beside it, each level's ticket."""
    torch.save({'params': network.state_dict()}, checkpoint)
    for level in range(len(network.sparsity)):
        torch.save({'params': network.export(level)}, checkpoint.with_name(f'net_g_level{level}.pth'))


def network(backbone: dict[str, Any] = TOY_EDSR, levels: int = 3, seed: int = 0, empty: tuple[int, ...] = ()) -> MSSR:
    """An MSSR network with random weights and level map, in which the levels ``empty`` add nothing."""
    torch.manual_seed(seed)
    built = MSSR(deepcopy(backbone), [k / levels for k in range(levels)])
    used = torch.tensor([k for k in range(levels) if k not in empty], dtype=torch.uint8)
    built.set_level_map({name: used[torch.randint(len(used), m.shape)] for name, m in built.get_level_map().items()})
    return built


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape), name
        one, other = (value.detach().flatten().view(torch.uint8) for value in (state[name], tensor))
        assert torch.equal(one, other), name


def contents(models: Path) -> dict[str, Any]:
    """All that a stage ended with, tensors as bytes."""
    found: dict[str, Any] = {'levels.json': json.loads((models / 'levels.json').read_text())}
    for path in [models / 'net_g_latest.pth', *models.glob('net_g_level*.pth')]:
        for key, state in torch.load(path, weights_only=True).items():
            for name, tensor in state.items():
                found[f'{path.name}/{key}/{name}'] = tensor.numpy().tobytes()
    return found


def forget_after(experiment: Path, iteration: int) -> None:
    """Remove the saves after ``iteration``."""
    for path in [*experiment.glob('training_states/*'), *experiment.glob('models/net_[gd]_*')]:
        number = path.stem.rpartition('_')[2]
        if number == 'latest' or (number.isdigit() and int(number) > iteration):
            path.unlink()


class Clips(list):  # type: ignore[type-arg]
    """What video validation asks of a data set."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        super().__init__(samples)
        self.opt = {'name': 'clips'}
        self.data_info = {'folder': ['000'] * 3}

    def __getitem__(self, index: Any) -> Any:  # BasicSR changes a sample's shapes
        return {'folder': '000', **deepcopy(super().__getitem__(index))}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def load_network(path: Path, key: str = 'params') -> MSSR:
    network = MSSR(TOY_EDSR, SPARSITY)
    network.load_state_dict(load(path)[key])
    return network


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """One thread, and the same random numbers whichever tests ran before: a test that fails does so again alone."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pairs: gt/ with four random 32 x 32 images, lq/ with their 16 x 16 versions."""
    folder = tmp_path_factory.mktemp('toy_data')
    write_pairs(folder)
    return folder


@pytest.fixture
def forward_opt(toy_data: Path) -> dict[str, Any]:
    """Options of a forward stage: levels 0, 1, 2 of the toy EDSR, 4 iterations each, SSD, EMA."""
    return forward_options(toy_data)


@pytest.fixture
def backward_opt(forward_opt: dict[str, Any]) -> dict[str, Any]:
    """Options of a backward stage that goes on where ``forward_opt`` ends, 3 iterations each level."""
    return backward_options(forward_opt)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that paths in tests are as short as they read."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


Run = Callable[..., Path]


@pytest.fixture
def run(here: Path) -> Iterator[Run]:
    """``run(opt, *arguments)`` trains (or tests) through BasicSR's own pipeline and returns the experiment's folder."""

    def run(opt: dict[str, Any], *arguments: str) -> Path:
        from basicsr.test import test_pipeline
        from basicsr.train import train_pipeline

        _forget_logger()  # BasicSR opens its log file once in a process, here there are several runs in one
        yml = here / f'{opt["name"]}.yml'
        yml.write_text(yaml.safe_dump(opt, sort_keys=False))
        training = 'train' in opt
        with mock.patch.object(sys, 'argv', ['train.py', '-opt', str(yml), *arguments]):
            (train_pipeline if training else test_pipeline)(str(here))
        return here / ('experiments' if training else 'results') / opt['name']

    yield run
    _forget_logger()  # it logs every network to what pytest had in place of stderr, which later tests have not


def _forget_logger() -> None:
    from basicsr.utils.logger import initialized_logger

    initialized_logger.clear()
    logging.getLogger('basicsr').handlers.clear()
    logging.getLogger('basicsr').setLevel(logging.NOTSET)
