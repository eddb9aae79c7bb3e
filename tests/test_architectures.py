"""What is known about an architecture, and how the rest is detected."""

from __future__ import annotations

import io
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import BACKBONES, network
from torch import Tensor, nn
from torch.nn import functional as F

from mssr_basicsr import ScalableModel, pack, register_architecture
from mssr_basicsr.archs.feature_taps import find_feature_taps
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.scalable import architectures
from mssr_basicsr.scalable.architectures import ImageSpec, check_scale, find_image_spec, for_spandrel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


class Grey(nn.Module):
    """A network for grey images by others, whose options are called otherwise; it is in windows of 6."""

    def __init__(self, in_channels: int = 1, window: int = 6) -> None:
        super().__init__()
        self.window = window
        self.stem = nn.Conv2d(in_channels, 12, 3, 1, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU()) for _ in range(2)])
        self.norm = nn.BatchNorm2d(12)
        self.tail = nn.Conv2d(12, 9 * in_channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        assert h % self.window == 0
        x = self.stem(x).view(n, 12, h // self.window, self.window, w // self.window, self.window).view(n, 12, h, w)
        for block in self.blocks:
            x = x + block(x)
        return F.pixel_shuffle(self.tail(self.norm(x)), 3)


class Restless(Grey):
    """In eval mode, too, it draws random numbers and changes its tensors and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('runs', torch.zeros(()))
        self.size: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.size, self.runs = tuple(x.shape), self.runs + 1
        self.norm.running_mean += 1
        self.tail.bias.data += 1
        return super().forward(x + torch.rand(1, device=x.device))


class Clip(nn.Module):
    """A network for video: (N, T, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c, h, w = x.shape
        return F.interpolate(self.conv(x.transpose(1, 2)).transpose(1, 2).reshape(n * t, c, h, w), scale_factor=4)


@pytest.fixture(autouse=True)
def _registries_as_they_were() -> Iterator[None]:
    known = dict(architectures._KNOWN)
    registered = dict(ARCH_REGISTRY._obj_map)
    ARCH_REGISTRY.register(Grey)
    yield
    architectures._KNOWN.clear()
    architectures._KNOWN.update(known)
    ARCH_REGISTRY._obj_map = registered


@pytest.mark.parametrize('name', BACKBONES)
def test_registered_facts_match_what_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The facts that stand in the registry are true: running the network says the same without them."""
    built, options = build_network(deepcopy(BACKBONES[name])), BACKBONES[name]
    known = find_image_spec(built, options)
    assert known == ImageSpec(3, {'SwinIR': 8, 'RRDBNet': 2}.get(name, 1), 2)
    monkeypatch.setattr(architectures, '_KNOWN', {})
    assert find_image_spec(built, options) == known


def test_trunks() -> None:
    taps = {name: find_feature_taps(build_network(deepcopy(options))) for name, options in BACKBONES.items()}
    for name, options in BACKBONES.items():
        trunk = architectures.facts_about(name).trunk
        assert find_feature_taps(build_network(deepcopy(options)), trunk=trunk) == taps[name]
    assert find_feature_taps(Grey(), trunk='blocks') == ['blocks.0', 'blocks.1']


def test_an_unknown_network_for_grey_images_is_detected() -> None:
    built = network({'type': 'Grey', 'in_channels': 1})
    assert find_image_spec(built.backbone, {'type': 'Grey'}) == ImageSpec(1, 6, 3)
    model = ScalableModel(io.BytesIO(pack(built, 3)))
    assert (model.upscaler.channels, model.upscaler.multiple) == (1, 6)
    grey = np.random.default_rng(0).integers(0, 256, (7, 13), dtype=np.uint8)
    result = model.upscale(grey)
    assert result.shape == (21, 39)
    padded = np.pad(grey, ((0, 5), (0, 5)), 'reflect')
    with torch.no_grad():
        expected = model.network(torch.from_numpy(padded / np.float32(255))[None, None])[0, 0, :21, :39]
    assert np.array_equal(result, (expected.clip(0, 1) * 255).round().numpy().astype(np.uint8))


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
def test_detection_has_no_side_effects(device: str) -> None:
    built = Restless().to(device).train()
    built.blocks[0].eval()
    before, random = deepcopy(built.state_dict()), [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    find_image_spec(built, {'type': 'Restless'})
    assert [module.training for module in (built, built.blocks[0], built.norm)] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())
    assert built.size == ()
    assert all(map(torch.equal, [torch.get_rng_state(), *torch.cuda.get_rng_state_all()], random))


def test_what_users_register_is_used() -> None:
    asked = []

    def channels(options: Any) -> int:
        asked.append(options['in_channels'])
        return int(options['in_channels'])

    register_architecture(
        'Grey', channels=channels, multiple=lambda options: 12, trunk='blocks', spandrel=lambda state, options: {}
    )
    assert find_image_spec(Grey(), {'type': 'Grey', 'in_channels': 1}) == ImageSpec(1, 12, 3)
    assert asked == [1]
    assert for_spandrel({'conv.weight': torch.zeros(1)}, {'type': 'Grey'}) == {}
    assert network({'type': 'Grey'}).feature_taps == ['blocks.0', 'blocks.1']
    with pytest.raises(KeyError, match='an architecture called Grey is already registered'):
        register_architecture('Grey')


def test_an_error_names_what_cannot_be_detected() -> None:
    with pytest.raises(ValueError, match=r'Grey: found a network that upscales no image of 3 or 1 channels'):
        find_image_spec(Grey(in_channels=4), {'type': 'Grey'})
    with pytest.raises(ValueError, match=r'Clip: found a network .* \(not enough values to unpack.*register_architect'):
        find_image_spec(Clip(), {'type': 'Clip'})
    with pytest.raises(OptionError, match="--spandrel: found 'Grey'; allowed: RCAN, RRDBNet"):
        for_spandrel({}, {'type': 'Grey'})


def test_the_network_decides_its_scale() -> None:
    assert check_scale(Grey(), {'type': 'Grey'}, None) == 3
    with pytest.raises(OptionError, match='scale: found 2; allowed: 3, the factor by which the network upscales'):
        check_scale(Grey(), {'type': 'Grey'}, 2)
    assert check_scale(Clip(), {'type': 'Clip'}, 4) == 4  # of single images it takes none: it is taken at its word


def test_a_file_whose_scale_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mssr_basicsr.scalable import packing

    monkeypatch.setattr(packing, 'check_scale', lambda *_: None)
    for scale in (4, 10**9):  # by the latter, the image would take more memory than there is
        model = ScalableModel(io.BytesIO(pack(network(), scale)))
        with pytest.raises(OptionError, match=f'scale: found {scale}; allowed: 2, the factor'):
            model.upscale(np.zeros((4, 4, 3), np.uint8))
