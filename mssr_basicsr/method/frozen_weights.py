"""Frozen weights: what an optimizer, its momentum, weight decay or an EMA did to them is undone, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FrozenWeights:
    """Remembers which of a network's parameters do not train now, and their values.

    Args:
        network: the backbone whose parameters to remember.
        trainable: for each prunable weight a bool tensor, True for the elements that train.
        others_train: whether all other parameters (biases, norms, ...) train.
    """

    def __init__(self, network: nn.Module, trainable: Mapping[str, Tensor], others_train: bool) -> None:
        # A weight all of whose elements train needs neither a copy nor work in each iteration.
        self._trainable = {name: mask for name, mask in trainable.items() if not mask.all()}
        self._values = {
            name: parameter.detach().clone()
            for name, parameter in network.named_parameters()
            if name in self._trainable or (name not in trainable and not others_train)
        }

    @torch.no_grad()
    def put_back(self, network: nn.Module) -> None:
        """Give the frozen parameters of ``network`` (the one remembered, or its EMA) the remembered values."""
        for name, value in self._values.items():
            parameter = network.get_parameter(name)
            if name in self._trainable:
                parameter.copy_(torch.where(self._trainable[name], parameter, value))
            else:
                parameter.copy_(value)
