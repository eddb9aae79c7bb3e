"""Feature taps, the larger network that finishes images, and the loss on them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from conftest import BACKBONES, TOY_EDSR
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mssr_basicsr.archs.feature_taps import ImageFinisher, find_feature_taps, record_features
from mssr_basicsr.losses.ssd_loss import SSDLoss

EXPECTED_TAPS = {
    'EDSR': ['body.0', 'body.1', 'body.2'],
    'MSRResNet': ['body.0', 'body.1', 'body.2'],
    'RCAN': ['body.0', 'body.1', 'body.2'],
    'RRDBNet': ['body.0', 'body.1', 'body.2'],
    'SRVGGNetCompact': ['body.1', 'body.3', 'body.5', 'body.7'],
    'SwinIR': ['layers.0', 'layers.1', 'layers.2'],
}


@pytest.mark.parametrize('name', BACKBONES)
def test_taps_are_found_and_what_features_replace_is_not_computed(name: str) -> None:
    network = build_network(BACKBONES[name]).eval()
    taps = find_feature_taps(network)
    assert taps == EXPECTED_TAPS[name]

    x = torch.rand(2, 3, 16, 16)
    finisher = ImageFinisher(network, taps)
    with torch.no_grad(), record_features(network, taps) as features:
        image = network(x)
    row, blocks = taps[0].split('.')[0], network.get_submodule(taps[0].split('.')[0])
    with_weights = [f'{row}.{i}' for i, block in blocks.named_children() if has_layers(block)]
    finisher.finish(x, taps[0], features[taps[0]])  # the first use tries out what can be left out
    for tap in taps:
        with FlopCounterMode(display=False) as counter:
            finished = finisher.finish(x, tap, features[tap])
        assert torch.allclose(finished, image, rtol=1e-4, atol=1e-5)
        operations = {module.partition('.')[2] for module in counter.get_flop_counts()}
        depth = int(tap.split('.')[1])
        expected = [block for block in with_weights if int(block.split('.')[1]) > depth]
        assert [block for block in with_weights if block in operations] == expected


def has_layers(module: nn.Module) -> bool:
    return any(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in module.modules())


class DenselyUsed(nn.Module):
    """A trunk all of whose blocks' outputs are used at the end: none of them may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return torch.stack(features).sum(0)


def test_what_is_still_needed_is_computed() -> None:
    network = DenselyUsed().eval()
    taps = find_feature_taps(network)
    assert taps == ['blocks.0', 'blocks.1', 'blocks.2']
    x, features = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        image = ImageFinisher(network, taps).finish(x, 'blocks.1', features)
        expected = network.blocks[0](x) + features + network.blocks[2](features)
    assert torch.allclose(image, expected)


def test_gradients_reach_the_features_and_not_the_larger_network() -> None:
    network = build_network(TOY_EDSR).eval().requires_grad_(False)
    student = deepcopy(network).requires_grad_(True)
    taps = find_feature_taps(network)
    x = torch.rand(1, 3, 16, 16)
    with record_features(student, ['body.1']) as features:
        student(x)
    ImageFinisher(network, taps).finish(x, 'body.1', features['body.1']).sum().backward()
    has_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert 'body.1.conv2.weight' in has_gradient
    assert 'conv_first.weight' in has_gradient
    assert not any(name.startswith(('body.2', 'upsample', 'conv_last')) for name in has_gradient)
    assert all(parameter.grad is None for parameter in network.parameters())


def ssd_loss(**options: Any) -> SSDLoss:
    return SSDLoss(**options)


def test_the_loss_by_hand() -> None:
    images = [torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.7)]
    gt, teacher = torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 0.9)
    values = {
        target: ssd_loss(target=target, loss_weight=2.0)(images, gt, lambda: teacher).item()
        for target in ('gt', 'teacher', 'both')
    }
    # |0.5 - 1| and |0.7 - 1|, |0.5 - 0.9| and |0.7 - 0.9|: their means, times the weight 2
    assert values == pytest.approx({'gt': 2 * 0.4, 'teacher': 2 * 0.3, 'both': 2 * 0.35})


def test_the_teachers_image_is_not_made_where_it_is_not_needed() -> None:
    def teacher() -> Tensor:
        raise AssertionError

    ssd_loss(target='gt')([torch.zeros(1, 1, 2, 2)], torch.zeros(1, 1, 2, 2), teacher)


def test_depths_come_from_the_seed_alone() -> None:
    taps = [f'body.{i}' for i in range(8)]
    loss = ssd_loss(num_depths=2)
    drawn = [loss.sample_taps(taps, f'seed, iteration {i}') for i in range(200)]
    assert drawn == [loss.sample_taps(taps, f'seed, iteration {i}') for i in range(200)]
    assert all(len(set(depths)) == 2 and depths == sorted(depths) for depths in drawn)
    assert {tap for depths in drawn for tap in depths} == set(taps)
    assert ssd_loss(num_depths='all').sample_taps(taps, 'any') == taps
