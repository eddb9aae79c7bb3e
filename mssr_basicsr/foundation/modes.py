"""Networks that change when they enter eval mode, as RepVGG's do: they merge their branches into one convolution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def acts_on_modes(network: nn.Module) -> bool:
    """Whether a part of the network has a ``train`` or an ``eval`` of its own, by which it may change its weights."""
    kinds = {type(module) for module in network.modules()}
    return any(kind.train is not nn.Module.train or kind.eval is not nn.Module.eval for kind in kinds)


@contextmanager
def weights_set(network: nn.Module) -> Iterator[None]:
    """While the context is open, the weights of a network in eval mode may be set, as they are in training.

    It is in train mode meanwhile: a network that has merged weights undoes that before, and merges the new ones after.
    """
    if network.training:
        yield
        return
    with torch.no_grad():
        network.train()
    try:
        yield
    finally:
        with torch.no_grad():
            network.eval()
