"""The buffers of a network that belong to what it has learned: running statistics, spectral norms and the like."""

from __future__ import annotations

from torch import Tensor, nn


def saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """By name, the buffers that are in the network's state dict; the buffers themselves.

    Others are caches, which may have another shape in each forward pass. This runs in each iteration, and takes less
    time than ``state_dict()``.
    """
    return {
        f'{place}.{name}' if place else name: buffer
        for place, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
