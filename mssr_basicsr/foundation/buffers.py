"""Buffers of networks: those that belong to what a network has learned, and trees of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """By name, the buffers in the network's state dict (running statistics, spectral norms): themselves, not copies.

    Others are caches, which may have another shape in each forward pass. This runs in each iteration, and takes less
    time than ``state_dict()``.
    """
    return {
        f'{place}.{name}' if place else name: buffer
        for place, module in network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


class BufferTree(nn.Module):
    """The root of a :func:`buffer_tree`; its repr is one line instead of a long list of empty modules."""

    def __repr__(self) -> str:
        return f'BufferTree of {sum(buffer.numel() for buffer in self.buffers()):,} elements'


def buffer_tree(tensors: Mapping[str, Tensor], persistent: bool = True) -> BufferTree:
    """A module whose buffers (or parameters) are the values of ``tensors``, with its keys as their dotted names.

    This lets tensors that belong to weights move with a network: to a device, into a state dict
    (``level_map.body.0.conv1.weight``) and back.
    """
    root = BufferTree()
    for name, tensor in tensors.items():
        *path, leaf = name.split('.')
        node: nn.Module = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            node.register_parameter(leaf, tensor)
        else:
            node.register_buffer(leaf, tensor, persistent)
    return root
