"""The level map: which nested sub-network each prunable weight belongs to.

A level map gives every prunable weight one small integer, the highest level that still contains it. Level k's
mask is ``level_map >= k``, so the masks are nested by construction: no level map can violate this.

In this package a level map is a mapping from a weight's name to a uint8 tensor of the weight's shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LevelMap = Mapping[str, Tensor]


def num_kept(total: int, sparsity: float) -> int:
    """The number of weights that a level of this sparsity keeps of ``total`` prunable weights."""
    return round(total * (1 - sparsity))


def mask_of(level_map: LevelMap, level: int) -> dict[str, Tensor]:
    """Level ``level``'s mask: bool tensors, True where the weight is in the sub-network."""
    return {name: levels >= level for name, levels in level_map.items()}


def delta_of(level_map: LevelMap, level: int, smaller: int | None = None) -> dict[str, Tensor]:
    """The weights that ``level`` has and the sub-network ``smaller`` (default: the next one, ``level + 1``) lacks."""
    upper = level + 1 if smaller is None else smaller
    return {name: (levels >= level) & (levels < upper) for name, levels in level_map.items()}


def count(masks: Mapping[str, Tensor]) -> int:
    """The number of True elements in all masks together."""
    return sum(int(mask.sum()) for mask in masks.values())


def prune(level_map: LevelMap, scores: Mapping[str, Tensor], level: int, keep: int) -> dict[str, Tensor]:
    """Make sub-network ``level`` out of ``level - 1``: the iterative pruning step of the forward stage.

    Args:
        level_map: with the levels up to ``level - 1`` made; all weights of the last have a number >= ``level``.
        scores: for each weight a tensor of numbers, infinite ones included; higher scores are more worth keeping. They
            are ignored for weights that are not in level ``level - 1``.
        level: the level to make.
        keep: exactly how many weights it keeps over all layers; of equal scores, the first weight wins.

    Returns:
        The new level map. Weights that were in level ``level - 1`` and did not survive get the number ``level - 1``;
        all others keep theirs.
    """
    flat_map = torch.cat([levels.flatten() for levels in level_map.values()])
    flat_scores = torch.cat([scores[name].flatten().double() for name in level_map])
    alive = torch.nonzero(flat_map >= level).squeeze(1)
    ranking = torch.sort(flat_scores[alive], descending=True, stable=True).indices
    flat_map[alive[ranking[keep:]]] = level - 1
    sizes = [levels.numel() for levels in level_map.values()]
    return {name: flat.view_as(level_map[name]) for name, flat in zip(level_map, flat_map.split(sizes))}
