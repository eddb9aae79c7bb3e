"""Running a network without a lasting effect on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def attributes_kept(network: nn.Module) -> Iterator[None]:
    """While the context is open, modules may assign attributes; afterwards they have those that they had before.

    Their classes, too, are what they were: a layer in sparse form may have become a dense one.
    """
    before = [(module, type(module), dict(vars(module))) for module in network.modules()]
    try:
        yield
    finally:
        for module, own_class, attributes in before:
            if type(module) is not own_class:
                module.__class__ = own_class
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """While the context is open, the network may run and change its mode; afterwards it is as it was before.

    Some networks change their weights when they enter eval mode or train mode, or while they run. Whatever they note of
    this in attributes, such as that convolutions have been merged, is restored together with the weights.
    """
    modules = [(module, module.training, dict(module._buffers)) for module in network.modules()]
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*network.parameters(), *network.buffers())]
    try:
        with attributes_kept(network):
            yield
    finally:
        for module, mode, buffers in modules:
            module.training = mode  # a scripted module does not have it among its attributes
            for name, buffer in buffers.items():  # another tensor may have taken its place
                setattr(module, name, buffer)
        with torch.no_grad():
            for tensor, values in tensors:
                if not torch.equal(tensor, values):  # a tensor that is written to counts as changed
                    tensor.copy_(values)
