"""Pruning criteria: how much each weight is worth keeping.

A criterion is a function ``criterion(weights, masks, generator)`` that gives each weight a score; the weights with
the highest scores in the whole network survive. ``weights`` and ``masks`` (bool: still in the network) are mappings
by weight name; scores of weights outside their mask are ignored, and those of others must not be NaN. ``generator``
is a seeded ``torch.Generator`` on the CPU. Users add their own with ``@CRITERION_REGISTRY.register()`` and select it
with ``train.criterion``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable

import torch
from torch import Tensor

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.registry import Registry

Criterion = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], torch.Generator], Mapping[str, Tensor]]

CRITERION_REGISTRY = Registry('criterion')


def scores_of(
    criterion: Criterion, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], generator: torch.Generator
) -> Mapping[str, Tensor]:
    """The scores that ``criterion`` gives the weights.

    Raises:
        OptionError: there is not exactly one for each weight, or one is NaN, which would rank above all numbers; the
            text names the criterion and the weights.
    """
    scores = criterion(weights, masks, generator)
    for name in [*weights, *(name for name in scores if name not in weights)]:
        if name not in scores:
            fault = f'this one gives {name} none'
        elif name not in weights:
            fault = f'this one gives some to {name}, which is not prunable'
        elif scores[name].shape != weights[name].shape:
            fault = f'this one gives {name} {tuple(scores[name].shape)} instead of {tuple(weights[name].shape)}'
        elif (num_nan := int(scores[name][masks[name]].isnan().sum())) > 0:
            fault = f'this one gives NaN to {num_nan} of {name}'
        else:
            continue
        called = getattr(criterion, '__name__', repr(criterion))
        raise OptionError('train.criterion', called, f'a criterion that gives each weight a score ({fault})')
    return scores


@CRITERION_REGISTRY.register()
def global_magnitude(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """The weight's absolute value, compared over all layers (Han et al. 2015; Frankle & Carbin 2019)."""
    return {name: weight.abs() for name, weight in weights.items()}


@CRITERION_REGISTRY.register()
def layer_magnitude(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """The weight's absolute value, compared within its layer: every layer keeps the same share of its weights.

    The score is the weight's rank among the surviving weights of its layer, divided by their number.
    """

    def rank(weight: Tensor, mask: Tensor) -> Tensor:
        alive = weight[mask].abs()
        ranks = torch.empty_like(alive, dtype=torch.float64)
        order = torch.sort(alive, stable=True).indices
        ranks[order] = torch.arange(1, len(alive) + 1, dtype=torch.float64, device=weight.device) / max(1, len(alive))
        return torch.zeros_like(weight, dtype=torch.float64).masked_scatter_(mask, ranks)

    return {name: rank(weight, masks[name]) for name, weight in weights.items()}


@CRITERION_REGISTRY.register()
def lamp(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Layer-adaptive magnitude (LAMP, Lee et al. 2021): w^2 over the sum of u^2 of its layer's weights u >= w."""

    def score(weight: Tensor, mask: Tensor) -> Tensor:
        squares = weight[mask].double().square()
        ordered, order = torch.sort(squares, descending=True, stable=True)
        scores = torch.empty_like(squares)
        # A layer of zeros has nothing to keep: 0 / 0 is a score of 0.
        scores[order] = torch.nan_to_num(ordered / ordered.cumsum(0))
        return torch.zeros_like(weight, dtype=torch.float64).masked_scatter_(mask, scores)

    return {name: score(weight, masks[name]) for name, weight in weights.items()}


@CRITERION_REGISTRY.register()
def random(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A random score: the baseline that a criterion has to beat."""
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}
