"""Toy data, and toy options of both stages, which take seconds on a CPU: the checks and the tests train on them."""

from __future__ import annotations

from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

TOY_EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 3, 'upscale': 2}
SPARSITY = [0, 0.5, 0.75]
# Real-ESRGAN's own, with a pool of four training pairs.
DEGRADATION = {
    'gt_size': 32, 'queue_size': 4, 'resize_prob': [0.2, 0.7, 0.1], 'resize_range': [0.5, 1.5],
    'gaussian_noise_prob': 0.5, 'noise_range': [1, 30], 'poisson_scale_range': [0.05, 3], 'gray_noise_prob': 0.4,
    'jpeg_range': [30, 95], 'second_blur_prob': 0.8, 'resize_prob2': [0.3, 0.4, 0.3], 'resize_range2': [0.5, 1.2],
    'gaussian_noise_prob2': 0.5, 'noise_range2': [1, 25], 'poisson_scale_range2': [0.05, 2.5],
    'gray_noise_prob2': 0.4, 'jpeg_range2': [30, 95], 'gt_usm': True, 'l1_gt_usm': True, 'percep_gt_usm': True,
    'gan_gt_usm': False,
}  # fmt: skip


class Normalised(nn.Module):
    """A toy network with batch normalisation, for BasicSR's registry."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.body(x), 2)


class Merging(nn.Module):
    """A toy network that computes in eval mode by one convolution what it trains as two, merged when it enters it.

    Args:
        kind: where the merged weight is: in a layer that does not train, as RepVGG's; in a buffer that is not saved;
            or in one of the two, which leaving eval mode undoes, as with LoRA.
    """

    def __init__(self, kind: str = 'layer') -> None:
        super().__init__()
        self.kind, self.merged = kind, False
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1)) for _ in range(3))
        self.wide, self.narrow = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(3, 12, 1)
        self.register_buffer('mean', torch.full((3, 1, 1), 0.5))  # always the same, so that no .mssr file has it
        if kind == 'layer':
            self.deploy = nn.Conv2d(3, 12, 3, 1, 1, bias=False).requires_grad_(False)
        elif kind == 'buffer':
            self.register_buffer('kernel', torch.zeros(12, 3, 3, 3), persistent=False)

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            narrow = nn.functional.pad(self.narrow.weight.data, (1, 1, 1, 1))
            if self.kind == 'weight':
                self.wide.weight.data += -narrow if mode else narrow
            elif not mode:
                merged = self.deploy.weight if self.kind == 'layer' else self.kernel
                merged.data = self.wide.weight.data + narrow
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        for block in self.body:
            x = x + block(x)
        if self.training:
            return nn.functional.pixel_shuffle(self.wide(x) + self.narrow(x), 2)
        merged = {'layer': 'deploy.weight', 'buffer': 'kernel', 'weight': 'wide.weight'}[self.kind]
        bias = self.wide.bias + self.narrow.bias
        return nn.functional.pixel_shuffle(nn.functional.conv2d(x, attrgetter(merged)(self), bias, padding=1), 2)


def write_pairs(folder: Path) -> None:
    """Four random 32 x 32 images in gt/, their 16 x 16 versions in lq/."""
    rng = np.random.default_rng(0)
    for name in ('gt', 'lq'):
        (folder / name).mkdir()
    for i in range(4):
        image = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / 'gt' / f'{i}.png'), image)
        cv2.imwrite(str(folder / 'lq' / f'{i}.png'), cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))


def forward_options(data: Path) -> dict[str, Any]:
    """A forward stage on the pairs in ``data``: levels 0, 1, 2 of the toy EDSR, 4 iterations each, SSD, EMA."""
    dataset = {
        'type': 'PairedImageDataset',
        'dataroot_gt': str(data / 'gt'),
        'dataroot_lq': str(data / 'lq'),
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
            'val': {'name': 'toyval', **deepcopy(dataset)},
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


def backward_options(forward: dict[str, Any]) -> dict[str, Any]:
    """A backward stage that goes on where ``forward`` ends, 3 iterations each level."""
    opt = deepcopy(forward)
    opt.update(name='backward', model_type='MSSRBackwardModel')
    opt['path']['pretrain_network_g'] = 'experiments/forward/models/net_g_latest.pth'
    for key in ('level_iter', 'rewind_iter', 'ssd_opt'):
        del opt['train'][key]
    opt['train'].update(expansion={'type': 'SequentialExpansion', 'level_iter': 3}, total_iter=6)
    opt['val']['val_freq'] = 3
    opt['logger']['save_checkpoint_freq'] = 3
    return opt


def add_discriminator(opt: dict[str, Any], base_model_type: str) -> None:
    """Train by ``opt`` with this model class, one that derives from SRGANModel."""
    opt['base_model_type'] = base_model_type
    opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
    opt['train']['optim_d'] = {'type': 'Adam', 'lr': 1e-3}
    opt['train']['gan_opt'] = {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1}


def add_degradation(opt: dict[str, Any]) -> None:
    """Degrade the images of ``opt``'s training set as Real-ESRGAN does; this needs :func:`register_kernels_dataset`."""
    opt.update(deepcopy(DEGRADATION))
    opt['datasets']['train'].update(type='ToyKernelsDataset', gt_size=32)


def register_kernels_dataset() -> None:
    """A data set of images and blur kernels, as BasicSR's RealESRGANDataset, which makes any image 400 x 400."""
    from basicsr.data.paired_image_dataset import PairedImageDataset
    from basicsr.utils.registry import DATASET_REGISTRY

    class ToyKernelsDataset(PairedImageDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            kernels = torch.from_numpy(np.random.rand(3, 21, 21).astype(np.float32))
            kernels /= kernels.sum((1, 2), keepdim=True)
            return {'gt': item['gt'], **dict(zip(('kernel1', 'kernel2', 'sinc_kernel'), kernels))}

    DATASET_REGISTRY.register(ToyKernelsDataset)
