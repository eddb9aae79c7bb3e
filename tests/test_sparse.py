"""The sparse runtime gives the same results as torch on any input, and stores only what a level keeps."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import sysconfig
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import BACKBONES, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module

from mssr_basicsr import ScalableModel, pack
from mssr_basicsr.commands.main import main
from mssr_basicsr.sparse import network as sparse_network
from mssr_basicsr.sparse.graph import Segment, Step, plan, trace
from mssr_basicsr.sparse.layers import ABSENT, SparseConv2d, eligible, make_sparse
from mssr_basicsr.sparse.library import CONVOLUTION, NEAREST, SUM, kernel
from mssr_basicsr.sparse.network import accelerate, run_layer, runs_sparse

SHIPPED = Path(__file__).parents[1] / 'models' / 'EDSR_8x32_x2_291.mssr'
needs_kernel = pytest.mark.skipif(kernel() is None, reason='there was no compiler when it was installed')


def test_where_there_is_a_compiler_the_kernel_was_built() -> None:
    """Otherwise, a build that fails would only skip most tests in this file. setuptools asks for this compiler."""
    compiler = shlex.split(os.environ.get('CC') or sysconfig.get_config_var('CC') or 'cc')[0]
    if shutil.which(compiler) is None:
        pytest.skip(f'{compiler} is not there')
    assert kernel() is not None, 'install the package again: pip install -e .'


def sparsify(model: nn.Module, density: float, seed: int = 0, accelerated: bool = True) -> nn.Module:
    """The network after random weights of its convolutions were removed, dense; ``model`` itself becomes sparse."""
    random = np.random.default_rng(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and eligible(layer)]
    for layer in layers:
        layer.weight.data *= torch.from_numpy(random.random(layer.weight.shape) < density)
    dense = copy.deepcopy(model)
    for layer in layers:
        weight = layer.weight.detach().numpy().ravel()
        make_sparse(layer, weight, np.where(weight, 0, ABSENT).astype(np.uint8))
    if accelerated:
        accelerate(model)
    return dense


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-3)


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_convolutions_match_torch(data: st.DataObject) -> None:
    draw, sizes = data.draw, st.integers(1, 40)
    inputs, outputs, k = draw(sizes), draw(sizes), draw(st.sampled_from([1, 3]))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=draw(st.booleans())).eval()
    x = torch.randn(draw(st.integers(1, 2)), inputs, draw(st.integers(1, 30)), draw(st.integers(1, 90)))
    kind = draw(st.sampled_from(['plain', 'channels_last', 'transposed', 'strided']))
    if kind == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == 'transposed':
        x = x.transpose(2, 3)
    elif kind == 'strided':
        x = x[..., ::2, ::3]
    dense = sparsify(layer, draw(st.sampled_from([0, 0.06, 0.5, 1])), accelerated=False)
    threads = draw(st.sampled_from([1, 3]))
    torch.set_num_threads(threads)
    with torch.no_grad():
        found = run_layer(layer, x)  # type: ignore[arg-type]
        assert found is not None
        assert_close(found, dense(x))
    torch.set_num_threads(1)


class Chain(nn.Module):
    """What the runtime fuses, and what it must not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, 20, 3, padding=1) for i in (3, 20, 20))
        self.c, self.up = nn.Conv2d(60, 20, 1), nn.Conv2d(20, 36, 3, padding=1)
        self.prelu, self.leaky, self.relu = nn.PReLU(20), nn.LeakyReLU(0.2), nn.ReLU()
        self.shuffle, self.strided = nn.PixelShuffle(3), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.first(x * 2 - 1))
        y = self.a(x)
        z = self.relu(y) + y  # y is read twice
        z = self.relu(z * 0.5 + x) * 3 + z + z
        z = self.leaky(self.c(torch.cat((x, z, self.b(z)), 1)))
        z = nn.functional.interpolate(z, scale_factor=2, mode='nearest')
        z = z + z.mean(dim=(2, 3), keepdim=True)  # torch's, in the middle
        return self.strided(self.leaky(self.shuffle(self.up(z))))


@needs_kernel
@pytest.mark.parametrize('size', [(1, 1), (7, 40), (50, 130)])
def test_fused_graphs(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    sparse = Chain().eval()
    dense, x = sparsify(sparse, 0.3), torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_close(sparse(x), dense(x))


class Functional(nn.Module):
    """Activations and sizes by functions, whose arguments a trace shows in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.first(x))
        return self.last(nn.functional.interpolate(x, scale_factor=2)).relu()


@needs_kernel
def test_functions_run_on_the_kernel() -> None:
    sparse, x = Functional().eval(), torch.randn(1, 3, 9, 20)
    dense, traced = sparsify(sparse, 0.3), trace(sparse)
    assert traced is not None
    parts = plan(traced, runs_sparse)
    (segment,) = [part for part in parts if isinstance(part, Segment)]
    assert [step.kind for step in segment.steps] == [CONVOLUTION, NEAREST, CONVOLUTION]
    with torch.no_grad():
        assert_close(sparse(x), dense(x))


class Shifted(nn.Module):
    """Takes a number for each channel, or of another shape, out of the image and puts it back."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer('shift', torch.rand(shape))
        self.first, self.last = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first((x - self.shift) * 9).relu()) / 9 + self.shift


@needs_kernel
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (3, 1, 1), (1, 1, 1, 1), (1, 3, 7, 17), (17,)])
def test_shifts(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sparse = Shifted(shape).eval()
    dense, x = sparsify(sparse, 0.3), torch.rand(2, 3, 7, 17)
    with torch.no_grad():
        assert_close(sparse(x), dense(x))


class Odd(nn.Module):
    """Forwards that the runtime could take for what they are not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.up = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 20), (20, 3), (20, 12)))
        self.register_buffer('mean', torch.rand(1, 3, 1, 1))
        self.register_buffer('bytes', torch.ones(1, 3, 1, 1, dtype=torch.uint8))
        self.register_buffer('precise', torch.rand(1, 3, 1, 1, dtype=torch.float64))
        self.register_buffer('five', torch.rand(1, 1, 3, 1, 1))

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        y = self.a(x)
        if self.kind == 'rounded division':
            return self.b(torch.div(y * 50, 2, rounding_mode='floor'))
        if self.kind == 'alias':
            z = y
            y += 0.5
            return self.b(y + z)
        if self.kind == 'second argument':
            return self.b(y) * factor
        if self.kind == 'upsampled input':
            y = y * y.mean((2, 3), keepdim=True).sigmoid()
            return nn.functional.pixel_shuffle(self.up(y), 2) + nn.functional.interpolate(x, scale_factor=2)
        return self.b(y) - getattr(self, self.kind)  # type: ignore[no-any-return]


@needs_kernel
@pytest.mark.parametrize(
    'kind',
    ['rounded division', 'alias', 'second argument', 'upsampled input', 'mean', 'bytes', 'precise', 'five'],
)
def test_what_is_not_what_it_seems(kind: str) -> None:
    torch.manual_seed(0)
    sparse = Odd(kind).eval()
    dense = sparsify(sparse, 0.3)
    with torch.no_grad():
        for width in (16, 21, 16):
            x = torch.rand(2 if kind != 'five' else 1, 3, 9, width)
            found, expected = sparse(x), dense(x)
            assert found.dtype == expected.dtype
            assert_close(found, expected)
        sparse.mean = dense.mean = torch.rand(1, 3, 1, 1)  # another tensor than the one that was traced
        assert_close(sparse(x), dense(x))


class Mixes(nn.Module):
    """Computes something over all images of a batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm2d(20, track_running_stats=False)
        self.first, self.last = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 'mean':
            return x.mean() + self.last(self.first(x).relu())  # type: ignore[no-any-return]
        y = self.first(x)
        if self.kind == 'largest':
            y = y / y.abs().max()
        elif self.kind == 'of channels':
            y = y - y.mean((0, 2, 3), keepdim=True)
        elif self.kind == 'statistics':
            y = self.norm(y)
        elif self.kind == 'count':
            y = y * x.shape[0]
        return self.last(y.relu())  # type: ignore[no-any-return]


@needs_kernel
@pytest.mark.parametrize('kind', ['mean', 'largest', 'of channels', 'statistics', 'count', 'nothing'])
def test_a_network_that_mixes_the_images_of_a_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch runs such batches, but the kernel single images; that is found out once, even if the first are alike."""
    sparse, runs = Mixes(kind).eval(), []
    dense, image = sparsify(sparse, 0.3), torch.rand(1, 3, 9, 20)
    used, compared = sparse_network._run_parts, sparse_network._computes_the_same
    monkeypatch.setattr(sparse_network, '_run_parts', lambda *a: runs.append('image') or used(*a))
    monkeypatch.setattr(sparse_network, '_computes_the_same', lambda *a: runs.append('check') or compared(*a))
    with torch.no_grad():
        for batch in (image, torch.cat((image, image)), torch.cat((image, image * 0.3)), torch.rand(4, 3, 9, 20)):
            assert_close(sparse(batch), dense(batch))
    assert runs.count('check') == 2
    checked = 1 + 3  # images
    assert runs.count('image') == checked + (1 if kind != 'nothing' else 1 + 2 + 2 + 4)


@needs_kernel
def test_layers_in_train_mode_note_the_statistics_of_each_batch_once() -> None:
    sparse = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.Conv2d(20, 3, 3, padding=1)).eval()
    dense = sparsify(sparse, 0.3)
    with torch.no_grad():
        for model in (sparse, dense):
            model[1].train()
        for batch in (1, 2, 1):
            x = torch.rand(batch, 3, 9, 20)
            assert_close(sparse(x), dense(x))
    assert sparse[1].num_batches_tracked == dense[1].num_batches_tracked == 3
    assert_close(sparse[1].running_mean, dense[1].running_mean)


def steps_of(model: nn.Module) -> list[Step]:
    """The steps of a network that is one segment, around which torch computes nothing from an image."""
    traced = trace(model)
    assert traced is not None
    parts = plan(traced, runs_sparse)
    (segment,) = (part for part in parts if isinstance(part, Segment))
    assert {part.name for part in parts if isinstance(part, fx.Node)} <= {'x', 'mean', 'type_as', 'output'}
    return segment.steps


@needs_kernel
def test_networks_without_a_gap() -> None:
    edsr = ScalableModel(io.BytesIO(pack(network(), 2))).network
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in edsr.modules())
    kinds = [step.kind for step in steps_of(edsr)]
    assert kinds == [SUM] + [CONVOLUTION] * convolutions + [SUM]  # the mean colour is taken out, and put back
    compact = build_network({'type': 'SRVGGNetCompact', 'num_feat': 20, 'num_conv': 2, 'upscale': 2}).eval()
    sparsify(compact, 0.3)
    assert NEAREST in [step.kind for step in steps_of(compact)]


@needs_kernel
@pytest.mark.parametrize('name', sorted(BACKBONES))
def test_every_level_of_every_backbone(name: str) -> None:
    file = pack(network(BACKBONES[name]), 2)
    models = {engine: ScalableModel(io.BytesIO(file), 2, engine=engine) for engine in ('auto', 'torch')}
    assert any(isinstance(layer, SparseConv2d) for layer in models['auto'].network.modules())
    x = torch.rand(2, 3, 16, 24)
    for change in (lambda m: None, lambda m: m.expand(0), lambda m: m.shrink(1)):
        for model in models.values():
            change(model)
        with torch.no_grad():
            assert_close(models['auto'].network(x), models['torch'].network(x))
        states = [models[engine].network.state_dict() for engine in ('auto', 'torch')]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@needs_kernel
def test_8_bit_images_differ_in_less_than_one_pixel_in_ten_thousand() -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (25, 33, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (131, 99), interpolation=cv2.INTER_CUBIC)
    models = [ScalableModel(SHIPPED, 4, engine=engine) for engine in ('auto', 'torch')]
    for _ in range(4):
        one, other = (model.upscale(image).astype(np.int16) for model in models)
        steps = np.abs(one - other)
        assert steps.max() <= 1
        assert steps.any(axis=2).mean() < 1e-4
        for model in models:
            model.expand()


@needs_kernel
def test_memory_of_a_level() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1).eval()
    sparsify(conv, 0.0625, accelerated=False)
    assert isinstance(conv, SparseConv2d)
    assert conv.kept.nbytes <= 8 * len(conv.kept.values) + 8192
    assert 'weight' not in dict(conv.named_parameters())


def toy_model() -> ScalableModel:
    return ScalableModel(io.BytesIO(pack(network(), 2)), 2)


@needs_kernel
def test_torch_computes_what_the_runtime_does_not_support() -> None:
    model = toy_model()
    reference = ScalableModel(io.BytesIO(pack(network(), 2)), 2, engine='torch').network
    x = torch.rand(1, 3, 9, 10)
    for value in (torch.nan, torch.inf):
        broken = x.clone()
        broken[0, 1, 4, 4] = value
        with torch.no_grad():
            assert torch.equal(model.network(broken).isnan(), reference(broken).isnan())
    image = x.clone().requires_grad_()
    model.network(image).sum().backward()
    assert image.grad is not None
    with pytest.raises(RuntimeError):
        model.network(x.double())
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.network(x[:, :2])
    assert_close(model.network.double()(x.double()), reference.double()(x.double()))
    model.expand(0)  # dense since it is double
    reference = ScalableModel(io.BytesIO(pack(network(), 2)), 0, engine='torch').network
    assert_close(model.network(x.double()), reference.double()(x.double()))


@needs_kernel
def test_training_makes_it_dense_and_levels_still_work() -> None:
    model = toy_model()
    before = model.network.state_dict()
    model.network.train()
    assert not any(isinstance(layer, SparseConv2d) for layer in model.network.modules())
    assert {name for name, _ in model.network.named_parameters()} == set(before)
    model.expand(0)
    model.shrink(2)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


@needs_kernel
@pytest.mark.parametrize('trained', [False, True])
def test_a_network_can_be_given_to_another_model(trained: bool) -> None:
    used = toy_model().network  # sparse
    if trained:
        used.train()
    file = pack(network(seed=1), 2)
    again = ScalableModel(io.BytesIO(file), network=used)
    fresh = ScalableModel(io.BytesIO(file))
    for level in (0, 1, 2):
        again.shrink(level)
        fresh.shrink(level)
        state = fresh.network.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again.network.state_dict().items())


@needs_kernel
def test_changed_weights_are_noticed() -> None:
    model, x = toy_model(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = model.network(x)
        model.network.conv_last.bias += 255.0
        assert_close(model.network(x), before + 1)
        state = {key: value * 0 for key, value in model.network.state_dict().items()}
        model.network.load_state_dict(state)
        assert_close(model.network(x), model.network.mean.expand(1, 3, 16, 16))


@needs_kernel
@pytest.mark.parametrize(('layer', 'name'), [(0, 'weight'), (0, 'bias'), (1, 'weight'), (2, 'bias'), (3, 'weight')])
def test_changes_through_data_are_noticed(layer: int, name: str) -> None:
    """They have no version: of a small convolution that stays dense, a slope for all channels, and slopes for each."""
    sparse, x = (
        nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.PReLU(), nn.Conv2d(20, 20, 3, padding=1)),
        torch.rand(1, 3, 9, 20),
    )
    sparse.append(nn.PReLU(20)).eval()
    dense = copy.deepcopy(sparse)
    weight = sparse[2].weight.detach().numpy().ravel()
    make_sparse(sparse[2], weight, np.zeros(len(weight), np.uint8))
    accelerate(sparse)
    assert runs_sparse(sparse[0])
    with torch.no_grad():
        before = sparse(x)
        for model in (sparse, dense):
            getattr(model[layer], name).data.mul_(3)
        expected = dense(x)
        assert (expected - before).abs().max() > 0.01
        assert_close(sparse(x), expected)


def replace_last(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.conv_last = nn.Conv2d(model.conv_last.in_channels, 3, 3, padding=1)


def drop_block(model: nn.Module) -> None:
    model.body[0] = nn.Identity()


def scale_block(model: nn.Module) -> None:
    model.body[0].res_scale = 0.5


class Halves:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def other_forward(kind: str) -> Callable[[nn.Module], None]:
    """A change of one block alone, which then has a forward besides that of its class."""

    def change(model: nn.Module) -> None:
        block = model.body[0]
        block.forward = {
            'function': lambda x: x / 2,
            'method': types.MethodType(lambda self, x: x / 2, block),
            'partial': functools.partial(torch.mul, 0.5),
            'object': Halves(),
        }[kind]

    return change


def hook_block(model: nn.Module) -> None:
    model.body[0].register_forward_hook(lambda module, inputs, output: output / 2)


@needs_kernel
@pytest.mark.parametrize(
    'change',
    [
        replace_last,
        drop_block,
        scale_block,
        hook_block,
        *map(other_forward, ['function', 'method', 'partial', 'object']),
    ],
)
def test_a_changed_network_is_noticed(change: Callable[[nn.Module], None]) -> None:
    """Whether it is changed before its first run or after."""
    before, after, x = toy_model(), toy_model(), torch.rand(1, 3, 20, 30)
    dense = ScalableModel(io.BytesIO(pack(network(), 2)), 2, engine='torch')
    with torch.no_grad():
        unchanged = after.network(x)
        for model in (before, after, dense):
            change(model.network)
        expected = dense.network(x)
        assert not torch.allclose(unchanged, expected, atol=1e-4)
        assert_close(before.network(x), expected)
        assert_close(after.network(x), expected)


@pytest.fixture
def scaled() -> nn.Module:
    """A network whose class, and its block's, are of this test alone, which may change them."""

    class Block(nn.Module):
        gain, shift = 1.0, None

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(20, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.activated(self.a(x)) * self.gain * getattr(self, 'factor', 1.0)
            return self.b(y if self.shift is None else y + self.shift)

        def activated(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Conv2d(3, 20, 3, padding=1), Block(), nn.Conv2d(20, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.block(self.first(x)))

    return Scaled().eval()


@needs_kernel
@pytest.mark.parametrize(
    'change',
    [
        lambda net: setattr(net.block, 'gain', 0.5),
        lambda net: setattr(net.block, 'shift', torch.ones(1, 20, 1, 1)),
        lambda net: setattr(net.block, 'factor', 0.5),
        lambda net: setattr(net.block, 'activated', net.block.a.forward),
    ],
    ids=['a number', 'a tensor', 'a default', 'a method'],
)
def test_an_attribute_that_hides_that_of_the_class_is_noticed(
    scaled: nn.Module, change: Callable[[nn.Module], None]
) -> None:
    """Of the attributes that a module had at its first run, none has changed."""
    dense, x = sparsify(scaled, 0.3), torch.rand(1, 3, 9, 20)
    with torch.no_grad():
        unchanged = scaled(x)
        for model in (scaled, dense):
            change(model)
        expected = dense(x)
        assert (expected - unchanged).abs().max() > 1e-3
        assert_close(scaled(x), expected)


@needs_kernel
@pytest.mark.parametrize(
    ('of', 'name', 'value'),
    [
        ('block', 'forward', lambda self, x: x),
        ('block', 'activated', lambda self, x: x),
        ('block', 'gain', 0.5),
        ('', 'forward', lambda self, x: self.first(x)),
    ],
)
def test_a_changed_class_is_noticed(scaled: nn.Module, of: str, name: str, value: Any) -> None:
    """Also that of the network itself, of which an accelerated network has a subclass."""
    dense, x = sparsify(scaled, 0.3), torch.rand(1, 3, 9, 20)
    with torch.no_grad():
        unchanged = scaled(x)
        setattr(type(dense.get_submodule(of)), name, value)
        expected = dense(x)
        assert unchanged.shape != expected.shape or (expected - unchanged).abs().max() > 1e-3
        for _ in range(2):
            assert_close(scaled(x), expected)


class Computes(nn.Module):
    """Computes something besides the image at each call, which must not be taken for a constant of the network."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer('gate', torch.tensor(0.7))
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 20), (20, 20), (20, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 'constant':
            x = x - torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1)
        x = self.a(x)
        if self.kind == 'reparametrised':  # as SPAN does it, in eval mode
            self.b.weight.data.copy_(self.c.weight.mean() * self.b.weight)
        if self.kind == 'weight':  # of the sparse form, which has no dense one
            x = nn.functional.pad(x, (1, 1, 1, 1), mode='replicate')
            return self.c(nn.functional.conv2d(x, self.b.weight, self.b.bias))
        factor: Any = {'number': self.gate.item, 'tensor': lambda: self.gate * 2}.get(self.kind, lambda: 1)()
        return self.c(self.b(x) * factor)


@needs_kernel
@pytest.mark.parametrize('kind', ['constant', 'weight', 'reparametrised', 'number', 'tensor'])
def test_what_a_forward_computes_anew_is_no_constant(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'Computes': Computes})
    file = pack(network({'type': 'Computes', 'kind': kind}), 1)
    models = [ScalableModel(io.BytesIO(file), 2, engine=engine) for engine in ('auto', 'torch')]
    assert any(isinstance(layer, SparseConv2d) for layer in models[0].network.modules())

    def assert_same_images() -> None:
        for size in (9, 17, 9):
            x = torch.rand(1, 3, size, 20)
            assert_close(*(model.network(x) for model in models))

    with torch.no_grad():
        assert_same_images()
        for model in models:
            model.expand()
        assert_same_images()
        for model in models:
            model.network.gate.mul_(3)
        assert_same_images()


@needs_kernel
def test_a_tensor_that_has_become_none_is_no_longer_that_of_the_trace() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean: torch.Tensor | None = torch.full((1, 3, 1, 1), 0.4)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x if self.mean is None else x - self.mean)

    sparse, x = Centred().eval(), torch.rand(1, 3, 9, 20)
    dense = sparsify(sparse, 0.5)
    with torch.no_grad():
        assert_close(sparse(x), dense(x))
        sparse.mean = dense.mean = None
        assert_close(sparse(x), dense(x))


@needs_kernel
@pytest.mark.parametrize('register', [module.register_module_forward_hook, module.register_module_forward_pre_hook])
def test_hooks_of_all_modules_are_called(register: Callable[[Any], Any]) -> None:
    network, x, called = toy_model().network, torch.rand(1, 3, 20, 30), []
    with torch.no_grad():
        expected = network(x)
        handle = register(lambda layer, *_: called.append(layer))
        try:
            assert_close(network(x), expected)
        finally:
            handle.remove()
    assert set(called) == set(network.modules())


@needs_kernel
@pytest.mark.slow
def test_compiled_and_transformed_networks() -> None:
    """torch.compile, vmap and derivatives in forward mode give what they give of the dense network."""
    sparse, x = toy_model().network.requires_grad_(False), torch.rand(2, 3, 8, 8)
    dense = ScalableModel(io.BytesIO(pack(network(), 2)), engine='torch').network.requires_grad_(False)
    assert any(isinstance(layer, SparseConv2d) for layer in sparse.modules())
    dense.load_state_dict(sparse.state_dict())
    uses: list[Callable[[nn.Module], Any]] = [
        lambda net: torch.compile(net, backend='eager')(x),
        lambda net: torch.func.vmap(net)(x[:, None]),
        lambda net: torch.func.jvp(net, (x,), (torch.ones_like(x),)),
        lambda net: tangent(net, x),
    ]
    for use in uses:
        torch.testing.assert_close(use(sparse), use(dense))


@needs_kernel
def test_torchs_own_traces_have_the_weights_by_their_names() -> None:
    """Such a graph can be trained, like that of the dense network."""
    file, x = pack(network(BACKBONES['MSRResNet']), 2), torch.rand(1, 3, 8, 8)
    sparse, dense = (ScalableModel(io.BytesIO(file), 2, engine=engine).network for engine in ('auto', 'torch'))
    assert any(isinstance(layer, SparseConv2d) for layer in sparse.modules())
    traced, expected = fx.symbolic_trace(sparse), fx.symbolic_trace(dense)
    assert set(dict(traced.named_parameters())) == set(dict(expected.named_parameters()))
    assert_close(traced(x), expected(x))


@needs_kernel
def test_functional_calls_of_a_network_that_was_made_dense() -> None:
    model, x = toy_model().network, torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected, state = model(x), model.state_dict()
        model.train().eval()  # dense, since torch would not find a weight to put another in its place
        assert_close(torch.func.functional_call(model, state, x), expected)


def tangent(net: nn.Module, x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@needs_kernel
def test_torchs_defaults_do_not_matter() -> None:
    model, x = toy_model(), torch.rand(1, 3, 20, 30)
    with torch.no_grad():
        expected = model.network(x)
        try:
            torch.set_default_dtype(torch.float16)
            assert torch.equal(model.network(x), expected)
            model.network.float()
            torch.set_default_dtype(torch.float32)
            with torch.device('meta'):
                assert torch.equal(model.network(x), expected)
                model.network.float()
        finally:
            torch.set_default_dtype(torch.float32)
    assert any(isinstance(layer, SparseConv2d) for layer in model.network.modules())


@needs_kernel
def test_inference_mode() -> None:
    """What is loaded or grown in inference mode is like what is loaded outside."""
    data, image = pack(network(), 2), np.random.default_rng(0).integers(0, 255, (12, 14, 3), np.uint8)
    expected = [ScalableModel(io.BytesIO(data), level).upscale(image) for level in (1, 2)]
    with torch.inference_mode():
        model = ScalableModel(io.BytesIO(data), 2)
        assert np.array_equal(model.upscale(image), expected[1])
        model.expand(0)
    model.shrink(1)
    assert np.array_equal(model.upscale(image), expected[0])


class Twice(nn.Module):
    """A network in a network, each of which runs on the runtime by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Functional(), nn.Conv2d(3, 20, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@needs_kernel
def test_a_network_in_a_network() -> None:
    sparse, x = Twice().eval(), torch.rand(1, 3, 9, 20)
    dense = sparsify(sparse, 0.3)
    accelerate(sparse.first)

    def run() -> bool:
        with torch.no_grad():
            assert_close(sparse(x), dense(x))
            assert_close(sparse.first(x), dense.first(x))
        return True

    assert true_in_a_child(run)  # a thread that waits for itself would hang


class Notes(nn.Module):
    """Writes down the size of each image, also where the class has a default, and a function."""

    height = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.size = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 3, 3, padding=1), (0, 0)
        self.again: Callable[[], torch.Tensor] = lambda: torch.ones(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.size = tuple(x.shape)
        self.height, self.width, self.again = x.shape[-2], x.shape[-1], lambda: self.forward(x)
        return self.b(self.a(x).relu())


@needs_kernel
def test_what_a_forward_writes_down_is_no_change_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, traces = Notes().eval(), []
    dense = sparsify(sparse, 0.3)
    monkeypatch.setattr('mssr_basicsr.sparse.network.trace', lambda network: traces.append(1) or trace(network))
    with torch.no_grad():
        for size in (8, 9, 8, 10):
            x = torch.rand(1, 3, size, size)
            assert_close(sparse(x), dense(x))
            sparse(x * torch.nan)  # which torch computes
    assert len(traces) == 1


@needs_kernel
def test_nothing_keeps_a_network_alive() -> None:
    """Neither a graph that was traced nor the programs of single layers, which run by themselves in other networks."""
    traced, alone = toy_model().network, toy_model().network.conv_last
    traced.act = (lambda kept: lambda x: kept(x))(traced)  # a function that holds the network
    with torch.no_grad():
        traced(torch.rand(1, 3, 20, 30))
        assert run_layer(alone, torch.rand(1, alone.in_channels, 20, 30)) is not None
    gone = [weakref.ref(traced), weakref.ref(alone)]
    del traced, alone
    gc.collect()
    assert [module() for module in gone] == [None, None]


@needs_kernel
def test_copies_and_pickles() -> None:
    model, x = toy_model(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = model.network(x)
        for copied in (copy.deepcopy(model.network), pickle.loads(pickle.dumps(model.network))):
            assert torch.equal(copied(x), expected)


def true_in_a_child(run: Callable[[], bool]) -> bool:
    """Whether it ends, with True, in a process that is forked."""
    child = os.fork()
    if child == 0:
        failed = True
        try:
            signal.alarm(60)  # a child that hangs is one that fails
            failed = not run()
        except BaseException:
            traceback.print_exc()
        finally:  # so that it does not become a second pytest
            os._exit(failed)
    return os.waitpid(child, 0)[1] == 0


@needs_kernel
def test_from_several_threads_and_after_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = toy_model(), {}
    images = [torch.rand(1, 3, 20 + i, 30) for i in range(4)]

    def run(i: int) -> None:
        with torch.no_grad():
            found[i] = [model.network(images[i]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(2)
    with torch.no_grad():
        for i, image in enumerate(images):
            expected = model.network(image)
            assert all(torch.equal(result, expected) for result in found[i])

    def run_in_child() -> bool:
        torch.set_num_threads(1)  # torch's own pool does not survive a fork
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)  # the kernel's threads do
        with torch.no_grad():
            return torch.equal(model.network(images[0]), found[0][0])

    assert true_in_a_child(run_in_child)


@needs_kernel
@pytest.mark.skipif('ATEN_CPU_CAPABILITY' in os.environ, reason='torch is told what to take the processor for')
def test_the_widest_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes the processor for what torch takes it for."""
    monkeypatch.delenv('MSSR_SIMD', raising=False)
    found = kernel.__wrapped__()  # not the one that is kept for the other tests
    assert found is not None
    assert found.simd == {'AVX512': 'avx512', 'AVX2': 'avx2'}.get(torch.backends.cpu.get_cpu_capability(), 'plain')


@needs_kernel
@pytest.mark.parametrize('simd', ['avx2', 'plain'])
def test_narrower_vectors(simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used, names = kernel(), ['avx512', 'avx2', 'plain']
    assert used is not None
    if names.index(simd) < names.index(used.simd):
        pytest.skip(f'this processor has {used.simd}')
    monkeypatch.setenv('MSSR_SIMD', simd)
    kernel.cache_clear()
    try:
        narrower = kernel()
        assert narrower is not None
        assert narrower.simd == simd
        test_fused_graphs((50, 130))
        test_fused_graphs((7, 40))
        monkeypatch.setenv('MSSR_SIMD', 'mmx')
        kernel.cache_clear()
        with pytest.raises(ValueError, match="MSSR_SIMD: found 'mmx'; allowed: "):
            kernel()
    finally:
        monkeypatch.undo()
        kernel.cache_clear()


def test_engines(capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="engine: found 'fast'; allowed: auto, torch"):
        ScalableModel(io.BytesIO(pack(network(), 2)), engine='fast')
    file = tmp_path / 'model.mssr'
    file.write_bytes(pack(network(), 2))
    monkeypatch.setattr('mssr_basicsr.sparse.library._FILE', tmp_path / 'none.so')
    kernel.cache_clear()
    try:
        assert main(['info', str(file)]) == 0
        assert 'engine: torch (the sparse runtime was not built here)' in capsys.readouterr().out
        model = ScalableModel(file)
        assert not any(isinstance(layer, SparseConv2d) for layer in model.network.modules())
        with torch.no_grad():
            assert model.network(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)
    finally:
        kernel.cache_clear()


@pytest.mark.slow
def test_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    file = tmp_path / 'model.mssr'
    file.write_bytes(pack(network(), 2))
    command = ['benchmark', str(file), '--size', '24x16', '--threads', '1', '--rounds', '1']
    assert main([*command, '--json']) == 0
    levels = json.loads(capsys.readouterr().out)['levels']
    assert [row['level'] for row in levels] == [0, 1, 2]
    assert levels[0]['sparse_layers'] == []
    assert bool(levels[2]['sparse_layers']) == (kernel() is not None)
    assert all(row['milliseconds'] > 0 and row['times_faster'] > 0 for row in levels)
    if kernel() is not None:
        assert levels[2]['weight_bytes'] < levels[0]['weight_bytes']
    assert main(command) == 0
    assert 'speed-up' in capsys.readouterr().out
    assert main(['benchmark', str(file), '--size', '24']) == 1
    assert "--size: found '24'; allowed: width x height" in capsys.readouterr().err


@needs_kernel
def test_a_level_that_adds_to_a_dense_layer_alone_is_seen() -> None:
    """A program has the weights of small dense layers in an order of its own, which it then has to make anew."""
    packed = network({'type': 'SRVGGNetCompact', 'num_feat': 16, 'num_conv': 2, 'upscale': 2})
    random = np.random.default_rng(0)
    for i, levels in enumerate(packed.get_level_map().values()):
        shares = random.random(levels.shape)
        found = np.where(shares < 0.95, 2, np.where(shares < 0.98, 1, 0)) if i == 0 else np.where(shares < 0.2, 2, 0)
        levels.copy_(torch.from_numpy(found))
    file, image = pack(packed, 2), random.random((20, 24, 3)).astype(np.float32)
    model = ScalableModel(io.BytesIO(file), 2)
    assert [isinstance(layer, SparseConv2d) for layer in model.network.body if isinstance(layer, nn.Conv2d)][:2] == [
        False,
        True,
    ]
    model.upscale(image)
    model.expand(1)
    expected = ScalableModel(io.BytesIO(file), 1, engine='torch').upscale(image)
    np.testing.assert_allclose(model.upscale(image), expected, atol=1e-6)
