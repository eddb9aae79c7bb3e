"""Toy data, toy options and real BasicSR runs for the tests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import yaml

import mssr_basicsr.models  # noqa: F401  (imports BasicSR with the plugin in it, before any test does)

TOY_EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 3, 'upscale': 2}
SPARSITY = [0, 0.5, 0.75]

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
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pairs: gt/ with four random 32 x 32 images, lq/ with their 16 x 16 versions."""
    folder = tmp_path_factory.mktemp('toy_data')
    rng = np.random.default_rng(0)
    for name in ('gt', 'lq'):
        (folder / name).mkdir()
    for i in range(4):
        image = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / 'gt' / f'{i}.png'), image)
        cv2.imwrite(str(folder / 'lq' / f'{i}.png'), cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))
    return folder


@pytest.fixture
def forward_opt(toy_data: Path) -> dict[str, Any]:
    """Options of a forward stage: levels 0, 1, 2 of the toy EDSR, 4 iterations each, SSD, EMA."""
    dataset = {
        'type': 'PairedImageDataset',
        'dataroot_gt': str(toy_data / 'gt'),
        'dataroot_lq': str(toy_data / 'lq'),
        'io_backend': {'type': 'disk'},
    }
    return {
        'name': 'forward',
        'model_type': 'MSSRForwardModel',
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': {
            'train': {
                'name': 'toy', **dataset, 'gt_size': 32, 'use_hflip': True, 'use_rot': True, 'num_worker_per_gpu': 0,
                'batch_size_per_gpu': 2, 'dataset_enlarge_ratio': 10, 'prefetch_mode': None,
            },
            'val': {'name': 'toyval', **dataset},
        },
        'network_g': {'type': 'MSSR', 'sparsity': list(SPARSITY), 'backbone': deepcopy(TOY_EDSR)},
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'level_iter': 4,
            'rewind_iter': 2,
            'total_iter': 12,
            'ema_decay': 0.9,
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'CosineAnnealingRestartLR', 'periods': [4], 'eta_min': 1e-5},
            'warmup_iter': -1,
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
            'ssd_opt': {'type': 'SSDLoss', 'num_depths': 2},
        },
        'val': {
            'val_freq': 4,
            'save_img': False,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True}},
        },
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 4, 'use_tb_logger': False},
    }  # fmt: skip


@pytest.fixture
def backward_opt(forward_opt: dict[str, Any]) -> dict[str, Any]:
    """Options of a backward stage that goes on where ``forward_opt`` ends, 3 iterations each level."""
    opt = deepcopy(forward_opt)
    opt.update(name='backward', model_type='MSSRBackwardModel')
    opt['path']['pretrain_network_g'] = 'experiments/forward/models/net_g_latest.pth'
    for key in ('level_iter', 'rewind_iter', 'ssd_opt'):
        del opt['train'][key]
    opt['train'].update(expansion={'type': 'SequentialExpansion', 'level_iter': 3}, total_iter=6)
    opt['val']['val_freq'] = 3
    opt['logger']['save_checkpoint_freq'] = 3
    return opt


Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(opt, *arguments)`` trains (or tests) through BasicSR's own pipeline and returns the experiment's folder."""
    monkeypatch.chdir(tmp_path)

    def run(opt: dict[str, Any], *arguments: str) -> Path:
        from basicsr.test import test_pipeline
        from basicsr.train import train_pipeline
        from basicsr.utils.logger import initialized_logger

        # BasicSR opens its log file once in a process, here there are several runs in one.
        initialized_logger.clear()
        logging.getLogger('basicsr').handlers.clear()
        yml = tmp_path / f'{opt["name"]}.yml'
        yml.write_text(yaml.safe_dump(opt, sort_keys=False))
        training = 'train' in opt
        with mock.patch.object(sys, 'argv', ['train.py', '-opt', str(yml), *arguments]):
            (train_pipeline if training else test_pipeline)(str(tmp_path))
        return tmp_path / ('experiments' if training else 'results') / opt['name']

    return run
