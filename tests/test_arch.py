"""The MSSR architecture on every supported backbone."""

from __future__ import annotations

import inspect
import pickle
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from threading import Event, Thread
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import BACKBONES, SPARSITY, TOY_EDSR, assert_same, pruned_mssr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import Merging, Normalised

from mssr_basicsr.archs.mssr_arch import MSSR, find_prunable
from mssr_basicsr.archs.recomputation import recomputed_within
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.losses.self_distillation import SelfDistillation
from mssr_basicsr.losses.ssd_loss import SSDLoss
from mssr_basicsr.method.level_map import mask_of, num_kept
from mssr_basicsr.models.distilling_model import frozen_copy

backbones = pytest.mark.parametrize('backbone', BACKBONES.values(), ids=BACKBONES.keys())


@backbones
def test_a_training_step_at_each_level(backbone: dict[str, Any]) -> None:
    """Weights in the level move; weights outside get a gradient of exactly zero, and Adam leaves every bit of them."""
    network = pruned_mssr(backbone)
    x, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 32, 32)
    for level in range(len(SPARSITY)):
        network.level = level
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        before = {name: weight.detach().clone() for name, weight in network.prunable_weights().items()}
        optimizer.zero_grad()
        (network(x) - gt).abs().mean().backward()
        optimizer.step()
        masks = mask_of(network.get_level_map(), level)
        moved = 0
        for name, weight in network.prunable_weights().items():
            assert weight.grad is not None
            assert (weight.grad[~masks[name]] == 0).all()
            assert torch.equal(weight[~masks[name]], before[name][~masks[name]])
            moved += int((weight[masks[name]] != before[name][masks[name]]).sum())
        assert moved > 0.5 * sum(int(mask.sum()) for mask in masks.values())


@backbones
def test_an_exported_level_loads_into_the_stock_backbone_and_gives_the_same_image(backbone: dict[str, Any]) -> None:
    network = pruned_mssr(backbone).eval()
    x = torch.rand(1, 3, 16, 16)
    outputs = []
    for level in range(len(SPARSITY)):
        network.level = level
        stock = build_network(backbone).eval()
        stock.load_state_dict(network.export(level), strict=True)
        with torch.no_grad():
            outputs.append(network(x))
            assert (stock(x) - outputs[-1]).abs().max() <= 1e-6
        kept = sum(int((weight != 0).sum()) for name, weight in network.export(level).items() if name in set(
            network.prunable_names
        ))  # fmt: skip
        total = sum(weight.numel() for weight in network.prunable_weights().values())
        assert kept == pytest.approx(num_kept(total, SPARSITY[level]), abs=total * 0.001)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize('kind', ['layer', 'buffer', 'weight'])
def test_a_backbone_that_merges_weights_in_eval_mode_merges_those_of_the_level(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the stock backbone does with the level's checkpoint; what it trains with has the same bits afterwards."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Merging', Merging)
    network, x = pruned_mssr({'type': 'Merging', 'kind': kind}), torch.rand(1, 3, 16, 16)

    def check(level: int) -> None:
        network.level = level
        stock = Merging(kind)
        stock.load_state_dict(network.export(level), strict=True)
        with torch.no_grad():
            assert torch.equal(network(x), stock.eval()(x))

    for level in (1, 2, 0):
        network.train()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.eval()
        check(level)
        check(1)  # in eval mode, without training in between
        network.prunable_weights()['narrow.weight'].data.mul_(2)  # as BasicSR's EMA, after which eval() is called
        network.eval()
        check(level)
        network.load_state_dict(before)
        check(level)
        network(x).sum().backward()
        assert network.get_parameter('body.0.0.weight').grad is not None
        after = network.train().prunable_weights()
        assert_same(after, {name: before[f'backbone.{name}'] for name in after})


class Checkpointing(nn.Module):
    """A toy network that can compute its blocks again in the backward pass, as SwinIR does with ``use_checkpoint``."""

    def __init__(self, checkpoint: Any = lambda block, x: block(x)) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.GELU()) for _ in range(3))
        self.tail = nn.Conv2d(3, 12, 3, 1, 1)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = self.checkpoint(block, x)
        return nn.functional.pixel_shuffle(self.tail(x), 2)


@pytest.mark.parametrize('distilled', [False, True])
def test_gradient_checkpointing_has_the_same_gradients(distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network does not say otherwise, whatever it calls torch's function; its teacher uses it as well."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Checkpointing', Checkpointing)
    x, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 32, 32)
    calls = []

    def counting(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: (calls.append(block), checkpoint(block, x))[1], x)  # one within another

    gradients = []
    for options in ({}, {'checkpoint': counting}):
        network = pruned_mssr({'type': 'Checkpointing', **options})
        network.level = 1
        distillation = SelfDistillation(SSDLoss('all'), frozen_copy(network.backbone), network.feature_taps)
        with distillation.watching(network.backbone, 'seed'):
            image = network(x)
            loss = (image - gt).abs().mean()
            if distilled:
                term = distillation.term(gt)
                assert term is not None
                loss = loss + term
            calls.clear()
            loss.backward(retain_graph=True)
            loss.square().backward()
            assert not (distilled and distillation._outputs)  # of what is computed again, nothing is kept
        gradients.append({name: weight.grad for name, weight in network.backbone.named_parameters()})
    assert calls  # blocks were computed again
    assert_same(gradients[1], gradients[0])


class RecomputedByItself(torch.autograd.Function):
    """As other packages' gradient checkpointing does it."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block, ctx.x = block, x.detach().requires_grad_()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            ctx.block(ctx.x).backward(gradient)
        return None, ctx.x.grad


def with_its_own_contexts(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), nullcontext()))  # type: ignore


@pytest.mark.parametrize('kind', [RecomputedByItself.apply, with_its_own_contexts])
def test_layers_that_run_again_without_their_masks_are_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Checkpointing', Checkpointing)
    network = MSSR({'type': 'Checkpointing', 'checkpoint': kind}, SPARSITY)
    expected = (
        "network_g.backbone: found 'Checkpointing'; allowed: a network whose layers run in its forward pass, and again "
        'only by torch.utils.checkpoint without contexts of its own.'
    )
    with network.refuse_unmasked_layers(), pytest.raises(OptionError) as error:
        network(torch.rand(1, 3, 16, 16).requires_grad_()).sum().backward()
    assert str(error.value) == expected


def test_checkpointing_is_torchs_own_again_after_threads() -> None:
    """DataParallel runs its copies in threads; whichever ends first, other networks find torch's defaults."""
    function = inspect.unwrap(checkpoint)
    before, first_is_in, second_is_in = function.__kwdefaults__, Event(), Event()
    inside = []

    def first() -> None:
        with recomputed_within(nullcontext, nn.Identity()):
            first_is_in.set()
            second_is_in.wait()

    def second() -> None:
        first_is_in.wait()
        with recomputed_within(nullcontext, nn.Identity()):
            second_is_in.set()
            one.join()
            inside.append(function.__kwdefaults__['use_reentrant'])

    one, other = Thread(target=first), Thread(target=second)
    for thread in (one, other):
        thread.start()
    for thread in (one, other):
        thread.join()
    assert inside == [False]
    assert function.__kwdefaults__ is before


def test_reentrant_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives it no context to be computed again in; at level 0 too, for the training to end at once."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Checkpointing', Checkpointing)
    network = MSSR({'type': 'Checkpointing', 'checkpoint': partial(checkpoint, use_reentrant=True)}, SPARSITY)
    expected = (
        "network_g.backbone: found 'Checkpointing'; allowed: a network that uses torch.utils.checkpoint without "
        'use_reentrant=True (the default of checkpoint_sequential).'
    )
    with pytest.raises(OptionError) as error:
        network(torch.rand(1, 3, 16, 16))
    assert str(error.value) == expected


def test_a_backbone_may_take_more_than_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, 1, 1)

        def forward(self, x: Tensor, noise: float, *, shift: float = 0) -> Tensor:
            return self.conv(x) * noise + shift

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Noisy', Noisy)
    network, x = pruned_mssr({'type': 'Noisy'}), torch.rand(1, 3, 8, 8)
    network.level = 1
    assert torch.equal(network(x, 0.5, shift=1), network(x, 1) * 0.5 + 1)


def test_attention_tables_norms_and_biases_are_never_prunable() -> None:
    network = MSSR(BACKBONES['SwinIR'], SPARSITY)
    assert {name.rpartition('.')[2] for name in network.prunable_names} == {'weight'}
    assert not any('norm' in name or 'table' in name for name in network.prunable_names)
    assert 'layers.0.residual_group.blocks.0.attn.qkv.weight' in network.prunable_names


def test_patterns_choose_what_is_prunable() -> None:
    network = MSSR(TOY_EDSR, SPARSITY, prunable=['body.*', 'conv_*'], unprunable=['conv_first.*'])
    assert 'body.0.conv1.weight' in network.prunable_names
    assert 'conv_last.weight' in network.prunable_names
    assert 'conv_first.weight' not in network.prunable_names
    assert 'upsample.0.weight' not in network.prunable_names


def test_backbones_that_cannot_be_pruned_are_refused() -> None:
    """One without a layer to prune, and one whose two layers share a weight."""
    sharing = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    sharing[1].weight = sharing[0].weight
    repeated = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1))] * 2)  # one layer under two names
    kept_from_training = nn.Sequential(nn.Conv2d(3, 3, 1)).requires_grad_(False)
    for layers, allowed in (
        (nn.ReLU(), 'with convolutions or linear layers that train'),
        (kept_from_training, 'with convolutions or linear layers that train'),
        (sharing, 'whose layers share no weights (0.weight is also 1.weight), or name it in unprunable'),
        (repeated, 'whose layers share no weights (0.0.weight is also 1.0.weight), or name it in unprunable'),
    ):
        with pytest.raises(OptionError) as error:
            find_prunable(layers, ['*'], [])
        assert str(error.value).endswith(f'; allowed: a network {allowed}.')


def test_shared_weights_and_those_that_do_not_train_are_left_alone() -> None:
    """A weight that two layers share would be pruned in one of them alone; colours are shifted by one that is given."""
    layers = nn.Sequential(nn.Conv2d(3, 3, 1).requires_grad_(False), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    assert find_prunable(layers, ['*'], []) == find_prunable(layers, ['*'], ['0.*']) == ['1.weight', '2.weight']
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), *[nn.Conv2d(3, 3, 1)] * 2)
    assert find_prunable(twice, ['*'], ['1.*']) == ['0.weight']


def test_options_may_be_left_out_as_in_basicsr() -> None:
    """By ``~`` in the YAML."""
    names = MSSR(TOY_EDSR, SPARSITY).prunable_names
    assert MSSR(TOY_EDSR, SPARSITY, prunable=None, unprunable=None, feature_taps=None).prunable_names == names


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
@pytest.mark.parametrize('package', [nn.utils, nn.utils.parametrizations])
@pytest.mark.parametrize('kind', ['weight_norm', 'spectral_norm'])
def test_backbones_that_compute_their_weights_are_refused(package: Any, kind: str) -> None:
    """Such a weight is made anew in each forward pass: a mask on it would be without effect, or not reach it."""
    computing = getattr(package, kind, None)
    if computing is None:
        pytest.skip(f'{package.__name__} has no {kind} in torch {torch.__version__}')
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), computing(nn.Conv2d(8, 8, 3)), computing(nn.Conv2d(8, 3, 3)))
    with pytest.raises(
        OptionError, match=r'network_g\.backbone: .*whose weights are parameters \(1\.weight is computed'
    ):
        find_prunable(layers, ['*'], [])
    assert find_prunable(layers, ['*'], ['1.*', '2.*']) == ['0.weight']


@pytest.mark.parametrize(
    ('changed', 'text'),
    [
        ({'conv_last.weight': torch.full((3, 8, 3, 3), torch.nan)}, 'gives NaN to 216 of conv_last.weight'),
        ({'conv_last.weight': torch.zeros(3)}, 'gives conv_last.weight (3,) instead of (3, 8, 3, 3)'),
        ({'conv_last.bias': torch.zeros(3)}, 'gives some to conv_last.bias, which is not prunable'),
        ({'conv_last.weight': None}, 'gives conv_last.weight none'),
    ],
)
def test_a_criterion_must_give_each_weight_a_score(changed: dict[str, Any], text: str) -> None:
    """NaN would rank highest: of a layer of zeros scored by 0 / 0, all weights would stay."""

    def wrong(weights: Any, masks: Any, generator: Any) -> dict[str, Tensor]:
        scores = {**{name: weight.abs() for name, weight in weights.items()}, **changed}
        return {name: score for name, score in scores.items() if score is not None}

    network = MSSR(TOY_EDSR, SPARSITY)
    with pytest.raises(OptionError) as error:
        network.prune(1, wrong, torch.Generator())
    found = "train.criterion: found 'wrong'; allowed: a criterion that gives each weight a score (this one "
    assert str(error.value) == f'{found}{text}).'


def test_in_eval_mode_masking_is_done_once_until_something_changes() -> None:
    network = pruned_mssr(TOY_EDSR).eval()
    network.level = 2
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        first = network(x)
        masked = network._masked_weights
        network(x)
        assert network._masked_weights is masked

        weight = network.prunable_weights()['conv_first.weight']
        weight.mul_(2)  # an optimizer's way of changing a weight
        second = network(x)
        assert not torch.equal(first, second)

        weight.data.mul_(0.5)  # BasicSR's EMA's way; its validation calls eval() before each image
        network.eval()
        assert torch.equal(network(x), first)

        network.level = 1
        assert not torch.equal(network(x), first)


def test_eval_mode_with_gradients_still_has_them() -> None:
    network = pruned_mssr(TOY_EDSR).eval()
    network.level = 1
    network(torch.rand(1, 3, 16, 16)).sum().backward()
    assert network.prunable_weights()['conv_first.weight'].grad is not None


def test_its_checkpoint_and_a_stock_one_both_load() -> None:
    network = pruned_mssr(TOY_EDSR)
    other = MSSR(TOY_EDSR, SPARSITY, level=2)
    other.load_state_dict(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), network.state_dict().values()))

    stock = build_network(TOY_EDSR)
    dense = MSSR(TOY_EDSR, SPARSITY)
    dense.load_state_dict(stock.state_dict())
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(dense(x), stock(x))


@pytest.mark.parametrize('version', [1, 2])
def test_a_plain_checkpoint_says_how_old_its_parts_are(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch normalisation of version 1 had no counters; one of version 2 without them is incomplete, as for torch."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Normalised', Normalised)
    stock, network = Normalised(), MSSR({'type': 'Normalised'}, SPARSITY)
    state = stock.state_dict()
    del state['body.1.num_batches_tracked']
    state._metadata['body.1']['version'] = version
    for loading in (stock, network):
        with pytest.raises(RuntimeError, match='num_batches_tracked') if version == 2 else nullcontext():
            loading.load_state_dict(state, strict=True)


def test_a_level_that_the_checkpoint_lacks_is_refused() -> None:
    """Or a small network would be asked for, and the dense one silently given."""
    stock = build_network(TOY_EDSR).state_dict()
    network = MSSR(TOY_EDSR, SPARSITY, level=2)
    with pytest.raises(OptionError, match=r'network_g\.level: found 2; .* keeps 6768 of 6768 .* asks for 1692'):
        network.load_state_dict(stock)
    with pytest.raises(OptionError, match=r'network_g\.level: found 2'):
        MSSR(TOY_EDSR, SPARSITY, level=2)(torch.rand(1, 3, 16, 16))


def test_the_state_dict_holds_the_level_map_and_the_backbones_names() -> None:
    network = pruned_mssr(TOY_EDSR)
    stock = build_network(TOY_EDSR).state_dict()
    state: dict[str, Tensor] = network.state_dict()
    assert {name[len('backbone.') :] for name in state if name.startswith('backbone.')} == stock.keys()
    maps = {name: tensor for name, tensor in state.items() if name.startswith('level_map.')}
    assert {tensor.dtype for tensor in maps.values()} == {torch.uint8}
    assert len(maps) + len(stock) == len(state)


@backbones
def test_parameters_have_the_backbones_names_and_order(backbone: dict[str, Any]) -> None:
    """A model class chooses by them what trains and how fast."""
    network, stock = MSSR(backbone, SPARSITY), build_network(backbone)
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in network.named_parameters('net')] == [
        f'net.{name}' for name, _ in stock.named_parameters()
    ]
    assert list(network.named_parameters(recurse=False)) == []  # which DDP asks each module for
    for name, parameter in network.named_parameters():
        assert network.get_parameter(name) is parameter is network.backbone.get_parameter(name)


class Knowing(nn.Module):
    """It tells a model class which of its parameters are to have no weight decay."""

    level = 'its own'

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, 1, 1)
        self.decay = 1

    def no_weight_decay(self) -> set[str]:
        return {'body.bias'}


def test_what_mssr_does_not_have_is_the_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in copies, which exist for a moment without a backbone."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Knowing', Knowing)
    network = MSSR({'type': 'Knowing'}, SPARSITY)
    for one in (network, deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert one.no_weight_decay() == {'body.bias'}
        assert one.body is one.backbone.body
        assert one.level == 0
        assert not hasattr(one, 'head') and not hasattr(one, '__len__')
        one.decay, one.note = 3, 'new'
        assert (one.backbone.decay, one.decay, one.note) == (3, 3, 'new') and not hasattr(one.backbone, 'note')
    with pytest.raises(AttributeError, match="'Knowing' object has no attribute 'head'"):
        _ = network.head
    assert not hasattr(MSSR.__new__(MSSR), 'body')


def test_a_copy_for_data_parallel_masks_too() -> None:
    """DataParallel's copies have plain tensors where the network has parameters."""
    network = pruned_mssr(TOY_EDSR)
    network.level = 2
    x = torch.rand(1, 3, 16, 16)
    expected = network(x)
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter * 1)
    assert torch.equal(replicas[network](x), expected)
