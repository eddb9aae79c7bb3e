"""Tiles give what the whole image gives, whatever grid a network lays over it; where none would, there are no tiles."""

from __future__ import annotations

import io
from typing import Any, Callable

import numpy as np
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import network
from torch import Tensor, nn
from torch.nn import functional as F

from mssr_basicsr import ScalableModel, pack
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.scalable.architectures import ImageSpec
from mssr_basicsr.scalable.tiling import Tiling, TilingFinder
from mssr_basicsr.scalable.upscaling import Upscaler


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


class Gridded(nn.Module):
    """Between two convolutions, something that takes any size, but does not treat all places of it alike."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.middle = KINDS[kind]
        self.head, self.tail = convolution(3, 8), convolution(8, 12)
        self.down, self.further = convolution(8, 8, stride=2), convolution(8, 8, stride=2)
        self.wide = nn.Conv2d(8, 8, 7, 1, 3, padding_mode='reflect')

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.tail(self.middle(self, self.head(x))), 2)


def mirrored(net: Gridded, y: Tensor) -> Tensor:
    return net.wide(y)


def u_shaped(net: Gridded, y: Tensor) -> Tensor:
    """Two strides down, and up again to whatever size was there."""
    return y + F.interpolate(net.further(F.relu(net.down(y))), size=y.shape[2:], mode='nearest')


def pooled(net: Gridded, y: Tensor) -> Tensor:
    """As SAFMN: to an eighth, rounded down."""
    h, w = y.shape[2:]
    return y + F.interpolate(F.adaptive_max_pool2d(y, (h // 8, w // 8)), size=(h, w), mode='nearest')


def windowed(net: Gridded, y: Tensor) -> Tensor:
    """As its authors' SwinIR: what is not in whole windows of 8 is mirrored at the bottom and right edges."""
    h, w = y.shape[2:]
    y = F.pad(y, (0, -w % 8, 0, -h % 8), 'reflect')
    return (y + F.interpolate(F.avg_pool2d(y, 8), scale_factor=8))[..., :h, :w]


def placed(net: Gridded, y: Tensor) -> Tensor:
    """Each pixel depends on where in the image it is."""
    return y * torch.linspace(0, 1, y.shape[3])


KINDS: dict[str, Callable[[Gridded, Tensor], Tensor]] = {
    kind.__name__: kind for kind in (mirrored, u_shaped, pooled, windowed, placed)
}


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'Gridded': Gridded, 'Sums': Sums})


def model_of(kind: str) -> ScalableModel:
    return ScalableModel(io.BytesIO(pack(network({'type': 'Gridded', 'kind': kind}), 2)), level=0)


def picture(height: int, width: int) -> Any:
    return np.random.default_rng(0).random((height, width, 3), np.float32)


def difference(model: ScalableModel, image: Any, tile: int | None) -> float:
    """The largest between tiles and the whole image, in shares of the whole's range: no clipping hides it."""
    whole, tiled = model.upscale(image, tile=0), model.upscale(image, tile=tile)
    assert whole.std() > 0.01
    return float(np.abs(tiled - whole).max() / np.ptp(whole))


@pytest.mark.parametrize(
    ('kind', 'height', 'width'),
    [('mirrored', 60, 67), ('u_shaped', 60, 68), ('pooled', 64, 56), ('windowed', 64, 56), ('windowed', 61, 67)],
)
@pytest.mark.parametrize('tile', [8, 13, 21])
def test_tiles_follow_the_grid_of_the_network(kind: str, height: int, width: int, tile: int) -> None:
    model, image = model_of(kind), picture(height, width)
    assert len(model.upscaler._tiles(height, width, tile)) > 4
    assert difference(model, image, tile) < 1e-5


def squares(x: Tensor) -> Tensor:
    """The mean of each square of 8 x 8; the image is mirrored to whole ones, for which it must not be too small."""
    h, w = x.shape[2:]
    mirrored = F.pad(x, (0, -w % 8, 0, -h % 8), 'reflect')
    return F.interpolate(F.avg_pool2d(mirrored, 8), scale_factor=8)[..., :h, :w]


def test_what_is_mirrored_is_in_the_window_of_the_smallest_tile() -> None:
    """Squares depend on nothing beyond, but at the edges up to 7 rows are mirrored, of which the last tile has one."""
    tiling = TilingFinder(squares, ImageSpec(3, 1, 1), 1e-5).tiling_of(49, 61)
    assert tiling == Tiling(period=8, reach=8)
    assert [(span.start, span.window, span.inner) for span in tiling.spans(49, 20, 2)] == [
        (0, slice(0, 32), slice(0, 48)),
        (24, slice(16, 56), slice(16, 64)),
        (48, slice(40, 57), slice(16, 18)),
    ]


@pytest.mark.parametrize(
    ('kind', 'height', 'width', 'reason'),
    [
        ('placed', 60, 68, 'Gridded makes something else of a part of an image'),
        ('u_shaped', 60, 66, 'Gridded makes something else of a part of an image whose sides are no multiples of 4'),
        ('pooled', 61, 64, 'Gridded makes something else of a part of an image whose sides are no multiples of 8'),
    ],
)
def test_where_tiles_would_change_the_image_there_are_none(kind: str, height: int, width: int, reason: str) -> None:
    model = model_of(kind)
    with pytest.raises(OptionError, match=rf'tile: found 16; allowed: 0, since {reason}\.$'):
        model.upscale(picture(height, width), tile=16)
    assert (
        len(model.upscaler._tiles(20 * height + height, 20 * width + width, None)) == 1
    )  # large, and of the same rest


def test_images_of_a_network_with_a_large_head_are_upscaled() -> None:
    """It mirrors 3 pixels, so that it takes no image with fewer than 4 on a side."""
    image = picture(129, 131)
    assert difference(model_of('mirrored'), image, None) < 1e-5
    assert difference(model_of('mirrored'), image, 50) < 1e-5


class Sums(nn.Module):
    """Its smaller levels lack what gives it a grid: the mean of each square of 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.square, self.tail = convolution(3, 20), convolution(20, 20), convolution(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        pooled = F.interpolate(F.avg_pool2d(y, 4), scale_factor=4)
        return F.pixel_shuffle(self.tail(y + self.square(F.pad(pooled, (0, x.shape[3] % 4, 0, x.shape[2] % 4)))), 2)


@pytest.mark.parametrize('tile', [66, 512])
def test_a_tile_as_large_as_the_image_is_no_tile(tile: int) -> None:
    assert difference(model_of('u_shaped'), picture(61, 66), tile) == 0


class Skips(nn.Module):
    """Most of its image is the input; what it adds has a grid of 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        y = self.up(F.relu(self.down(F.pad(x, (0, -w % 4, 0, -h % 4), 'replicate'))))
        return x + 0.1 * y[..., :h, :w]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_coarse_dtype_hides_no_grid(dtype: torch.dtype) -> None:
    upscaler = Upscaler(Skips().eval().to(dtype), {'type': 'Skips'}, 1)
    whole, tiled = (upscaler.upscale(picture(40, 40), tile=tile) for tile in (0, 13))
    np.testing.assert_allclose(tiled, whole, atol=1e-6)


class Rewrites(nn.Module):
    """As SPAN, it writes some of its weights in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.passes = convolution(3, 12), convolution(3, 12), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.b.weight.data = self.a.weight.detach() * 2
        return F.pixel_shuffle(self.b(x), 2)


def test_what_a_network_writes_while_it_runs_makes_it_no_other_network() -> None:
    rewrites = Rewrites().eval()
    upscaler, passes = Upscaler(rewrites, {'type': 'Rewrites'}, 2), []
    for changes in (False, False, False, True):
        if changes:
            rewrites.a.weight.detach().mul_(3)
        before = rewrites.passes
        upscaler.upscale(picture(130, 130))
        passes.append(rewrites.passes - before)
    first, second, third, changed = passes
    assert second == third == 1 < changed <= first  # it is tried out for tiles once, and when it has changed


def test_a_level_may_have_a_grid_that_smaller_ones_lack() -> None:
    built = network({'type': 'Sums'})
    levels = built.get_level_map()
    levels['square.weight'].zero_()  # all its weights are in level 0 alone
    built.set_level_map(levels)
    nn.init.zeros_(built.backbone.square.bias)
    model, image = ScalableModel(io.BytesIO(pack(built, 2))), picture(60, 64)
    for level in (2, 0):
        model.shrink(2)
        model.expand(level)
        assert difference(model, image, tile=18) < 1e-5
