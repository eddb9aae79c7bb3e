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
        self._frozen: dict[str, Tensor] = {}  # of weights that train in part, where they do not
        self._values: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters():
            if name not in trainable:
                if not others_train:
                    self._values[name] = parameter.detach().clone()
            elif not trainable[name].all():  # else there is nothing to keep, nor work in each iteration
                self._frozen[name] = ~trainable[name]
                self._values[name] = parameter.detach().clone()

    @torch.no_grad()
    def put_back(self, network: nn.Module) -> None:
        """Give the frozen parameters of ``network`` (the one remembered, or its EMA) the remembered values."""
        for name, values in self._values.items():
            parameter = network.get_parameter(name)
            if name in self._frozen:
                torch.where(self._frozen[name], values, parameter, out=parameter)
            else:
                parameter.copy_(values)
