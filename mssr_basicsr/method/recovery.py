"""Recovery: the values from which pruned weights start in the backward stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The abstract leaves the choice open; docs/training.md, "What the paper leaves open", has what was measured.
RECOVERY_STARTS = ('ticket', 'rewind', 'zero')


@torch.no_grad()
def recover_weights(
    weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor], start: str, rewind_point: Mapping[str, Tensor]
) -> None:
    """Set pruned weights, in place, to the values from which they start the backward stage.

    Args:
        weights: the prunable weights by name; a pruned one still has the value it was pruned with.
        pruned: bool tensors by name, True for weights that are not in the smallest level.
        start: ``ticket`` for the value the weight was pruned with, ``rewind`` for its value at the rewind point,
            ``zero``.
        rewind_point: the weights at the rewind point by name; needed for ``rewind`` only.
    """
    if start == 'ticket':
        return
    for name, weight in weights.items():
        value = rewind_point[name].to(weight) if start == 'rewind' else torch.zeros_like(weight)
        weight.copy_(torch.where(pruned[name], value, weight))
