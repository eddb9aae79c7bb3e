"""Frozen weights: whatever an optimizer, its momentum, weight decay or an EMA does to them is undone, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.buffers import saved_buffers

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class FrozenWeights:
    """Remembers which of a network's parameters and buffers are currently frozen, and their values.

    Args:
        network: the backbone whose parameters to remember.
        trainable: a bool tensor for each prunable weight, True for the elements that train.
        others_train: whether all other parameters (biases, norms, ...) train, and buffers change with them.
    """

    def __init__(self, network: nn.Module, trainable: Mapping[str, Tensor], others_train: bool) -> None:
        self._values: dict[str, Tensor] = {}  # of parameters and buffers that are frozen as a whole
        if not others_train:
            self._values.update((name, buffer.clone()) for name, buffer in saved_buffers(network).items())
        # Of weights that train in part: integers whose bits are set where they train, and the frozen values' bits.
        self._trainable: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters():
            if name not in trainable:
                if not others_train:
                    self._values[name] = parameter.detach().clone()
            elif not trainable[name].all():  # otherwise there is nothing to keep or to do
                bits = _bits(parameter)
                self._trainable[name] = torch.where(trainable[name], bits.new_tensor(-1), bits.new_tensor(0))
                self._frozen[name] = bits & ~self._trainable[name]

    @torch.no_grad()
    def put_back(self, network: nn.Module) -> None:
        """Give what is frozen in ``network`` (the original, or its EMA) the remembered values."""
        own = {**dict(network.named_parameters()), **saved_buffers(network)}  # get_parameter() takes longer for each
        for name, values in self._values.items():
            own[name].copy_(values)
        for name, frozen in self._frozen.items():  # by bits, which takes a quarter of the time of torch.where
            _bits(own[name]).bitwise_and_(self._trainable[name]).bitwise_or_(frozen)


def _bits(parameter: Tensor) -> Tensor:
    """The memory of ``parameter`` as integers: a change of them is a change of it."""
    return parameter.detach().view(_INTEGERS[parameter.element_size()])
