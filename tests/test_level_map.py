"""Level maps and pruning, by hand and as properties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mssr_basicsr.foundation.buffers import buffer_tree
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import count, delta_of, mask_of, num_kept, prune


def test_a_level_map_by_hand() -> None:
    """Six weights in two layers, pruned by magnitude to three, then to one."""
    weights = {'a': torch.tensor([0.1, -0.9, 0.3]), 'b': torch.tensor([[-0.2], [0.6], [0.5]])}
    scores = {name: weight.abs() for name, weight in weights.items()}
    level_map = {name: torch.full_like(weight, 2, dtype=torch.uint8) for name, weight in weights.items()}

    level_map = prune(level_map, scores, 1, keep=3)
    assert level_map['a'].tolist() == [0, 2, 0]
    assert level_map['b'].tolist() == [[0], [2], [2]]

    level_map = prune(level_map, scores, 2, keep=1)
    assert level_map['a'].tolist() == [0, 2, 0]
    assert level_map['b'].tolist() == [[0], [1], [1]]

    assert mask_of(level_map, 1)['b'].tolist() == [[False], [True], [True]]
    assert delta_of(level_map, 1)['b'].tolist() == [[False], [True], [True]]
    assert delta_of(level_map, 0, smaller=2)['b'].tolist() == [[True], [True], [True]]
    assert [count(mask_of(level_map, level)) for level in range(3)] == [6, 3, 1]


def test_ties_go_to_the_first_weight_and_the_count_is_exact() -> None:
    level_map = {'a': torch.full((4,), 1, dtype=torch.uint8)}
    pruned = prune(level_map, {'a': torch.ones(4)}, 1, keep=2)
    assert pruned['a'].tolist() == [1, 1, 0, 0]


def test_infinite_scores_rank_as_numbers_and_those_of_pruned_weights_not_at_all() -> None:
    level_map = {'a': torch.tensor([0, 2, 2, 2, 0], dtype=torch.uint8)}
    scores = {'a': torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf, torch.nan])}
    assert prune(level_map, scores, 2, keep=2)['a'].tolist() == [0, 2, 2, 1, 0]


@pytest.mark.parametrize('criterion', ['global_magnitude', 'layer_magnitude', 'lamp', 'random'])
@pytest.mark.parametrize('seed', range(3))
def test_masks_are_nested_and_of_the_requested_size(criterion: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {'a': (5, 7), 'b': (3, 2, 3, 3), 'c': (11,)}
    level_map = {name: torch.full(shape, 4, dtype=torch.uint8) for name, shape in shapes.items()}
    total = sum(levels.numel() for levels in level_map.values())
    before = mask_of(level_map, 0)
    for level, sparsity in enumerate([0.3, 0.55, 0.8, 0.95], start=1):
        weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        scores = CRITERION_REGISTRY.get(criterion)(weights, mask_of(level_map, level), generator)
        level_map = prune(level_map, scores, level, num_kept(total, sparsity))
        mask = mask_of(level_map, level)
        assert count(mask) == num_kept(total, sparsity)
        assert all((mask[name] <= before[name]).all() for name in shapes)
        before = mask
    assert [count(mask_of(level_map, level)) for level in range(5)] == [
        num_kept(total, sparsity) for sparsity in (0, 0.3, 0.55, 0.8, 0.95)
    ]


def test_layer_magnitude_keeps_the_same_share_of_every_layer() -> None:
    weights = {'small': torch.linspace(0.001, 0.01, 10), 'large': torch.linspace(1, 10, 10)}
    masks = {name: torch.ones(10, dtype=torch.bool) for name in weights}
    level_map = {name: torch.full((10,), 1, dtype=torch.uint8) for name in weights}
    scores = CRITERION_REGISTRY.get('layer_magnitude')(weights, masks, torch.Generator())
    level_map = prune(level_map, scores, 1, keep=8)
    assert {name: int(mask.sum()) for name, mask in mask_of(level_map, 1).items()} == {'small': 4, 'large': 4}


def test_lamp_by_hand() -> None:
    """w^2 over the sum of the squares not smaller than it: of 1, 2, 3 that is 1/14, 4/13, 9/9. The masked 9 is out."""
    weights = {'a': torch.tensor([2.0, -1.0, 9.0, 3.0])}
    masks = {'a': torch.tensor([True, True, False, True])}
    scores = CRITERION_REGISTRY.get('lamp')(weights, masks, torch.Generator())['a']
    assert scores[masks['a']].tolist() == pytest.approx([4 / 13, 1 / 14, 1.0])


def test_random_scores_come_from_the_seed() -> None:
    weights = {'a': torch.zeros(8)}
    masks = {'a': torch.ones(8, dtype=torch.bool)}
    one, same, other = (
        CRITERION_REGISTRY.get('random')(weights, masks, torch.Generator().manual_seed(seed))['a'] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_buffer_tree_keeps_the_names() -> None:
    tensors = {'body.0.weight': torch.ones(2), 'body.1.weight': torch.zeros(3), 'weight': torch.ones(1)}
    assert buffer_tree(tensors).state_dict().keys() == tensors.keys()
    assert not buffer_tree(tensors, persistent=False).state_dict()


def test_frozen_weights_are_restored_bit_for_bit_whatever_overwrote_them() -> None:
    layer = nn.Linear(4, 1)
    kept = torch.tensor([[-0.0, float('nan'), 1e-42, 3.0]])  # 1e-42 is no normal float
    layer.weight.data.copy_(kept)
    frozen = FrozenWeights(layer, {'weight': torch.tensor([[False, False, False, True]])}, others_train=False)
    bias, version = layer.bias.detach().clone(), layer.weight._version
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[float('inf'), 5.0, float('nan'), -7.0]]))
        layer.bias.add_(1)
    frozen.put_back(layer)
    assert layer.weight.view(torch.int32)[0, :3].tolist() == kept.view(torch.int32)[0, :3].tolist()
    assert layer.weight[0, 3] == -7.0 and torch.equal(layer.bias, bias)
    assert layer.weight._version > version + 1  # what keeps masked weights sees the change


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_frozen_weights_of_any_dtype_are_restored(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 1).to(dtype)
    kept = layer.weight.detach().clone()
    frozen = FrozenWeights(layer, {'weight': torch.tensor([[True, False, True]])}, others_train=True)
    with torch.no_grad():
        layer.weight.fill_(9)
    frozen.put_back(layer)
    assert layer.weight.tolist() == [[9, kept[0, 1].item(), 9]]
