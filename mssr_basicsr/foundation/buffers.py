"""The buffers of a network that belong to what it has learned: running statistics, spectral norms and the like."""

from __future__ import annotations

from torch import Tensor, nn


def saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """By name, the buffers that are in the network's state dict; the buffers themselves.

    Others are caches, which may have another shape in each forward pass.
    """
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    entries = network.state_dict().items()
    return {name: entry for name, entry in entries if name not in parameters and isinstance(entry, Tensor)}
