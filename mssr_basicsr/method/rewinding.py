"""Weight rewinding: weights that survive pruning return to their values from early in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def rewind_weights(network: nn.Module, rewind_point: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the backbone's surviving weights, and all parameters that are never pruned, to the rewind point.

    A pruned weight keeps the value that it was pruned with, from which the backward stage can recover it.

    Args:
        network: the backbone.
        rewind_point: the same architecture with the weights at ``rewind_iter`` of level 0's training.
        masks: bool tensors by name of the prunable weight, True for the survivors.
    """
    early = rewind_point.state_dict()
    for name, tensor in network.state_dict().items():
        tensor.copy_(torch.where(masks[name], early[name], tensor) if name in masks else early[name])
