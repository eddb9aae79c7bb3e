"""A convolution that stores only the weights it keeps, and no dense tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from mssr_basicsr.sparse.library import Kernel, kernel

Array = npt.NDArray[Any]

ABSENT = 255  #: in place of a level, of weights that are not there


class SparseConv2d(nn.Conv2d):
    """What :func:`make_sparse` makes of a convolution, in place: 7 bytes for each kept weight.

    These are its value (4), position (2) and level (1). It is still an ``nn.Conv2d``: training, another device, another
    dtype, loading a state dict, or reading :attr:`weight` turn it back into a dense one, in place; ``state_dict()``
    creates a dense weight. What the kernel does not support (gradients, other dtypes, NaN and infinity) torch computes
    with the dense weight, created for that call.
    """

    kept: Kept

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the dense layer that this becomes: whoever reads it may change it, as SPAN's forward does."""
        self.make_dense()
        return self.weight

    def _dense(self, values: Array) -> Tensor:
        return torch.from_numpy(values).view(self.out_channels, self.kept.in_channels, *self.kernel_size)

    def _created_weight(self) -> Tensor:
        return self._dense(self.kept.dense()[0])

    def forward(self, input: Tensor) -> Tensor:
        from mssr_basicsr.sparse.network import run_layer

        if isinstance(input, fx.Proxy):
            return self._conv_forward(input, self.weight, self.bias)  # by its name, not as a constant of the graph
        result = run_layer(self, input)
        return self._conv_forward(input, self._created_weight(), self.bias) if result is None else result

    @torch.inference_mode(False)
    def make_dense(self) -> None:
        """Become an ``nn.Conv2d`` with a dense weight; its weights' levels stay in :attr:`dense_levels`."""
        values, self.dense_levels = self.kept.dense()
        self._parameters = {'weight': nn.Parameter(self._dense(values)), **self._parameters}
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        del self.__dict__['kept']

    def train(self, mode: bool = True) -> SparseConv2d:
        if mode:
            self.make_dense()
        nn.Conv2d.train(self, mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseConv2d:
        probe = fn(torch.empty(0, dtype=torch.float32, device='cpu'))
        if (probe.dtype, probe.device.type) != (torch.float32, 'cpu'):
            self.make_dense()
        nn.Conv2d._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f'{prefix}weight'] = self._created_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.make_dense()
        nn.Conv2d._load_from_state_dict(self, *arguments)


class Kept:
    """Kept weights in the order and with the offsets of kernel.c, each with its level.

    Args:
        shape: of the dense weight, four numbers.
        values: of the flattened dense weight, float32.
        levels: of each of its elements, uint8; :data:`ABSENT` of what is not kept.
        using: the kernel whose tiles the offsets are for.
    """

    def __init__(self, shape: tuple[int, ...], values: Array, levels: Array, using: Kernel) -> None:
        self.out_channels, self.in_channels, self.kernel = shape[:3]
        self.block, self._using, self._shape = using.block, using, shape
        levels = self._by_block(levels, ABSENT)
        kept = np.flatnonzero(levels != ABSENT)
        run = self.block * self.kernel**2  # what one output channel has in one block
        self.values, self.levels = self._by_block(values, 0).take(kept), levels.take(kept)
        self.offsets = self._offsets().take(kept % run)
        self.starts = kept.searchsorted(np.arange(0, len(levels) + 1, run)).astype(np.int32)

    def dense(self) -> tuple[Array, Array]:
        """The values of the flattened dense weight, zero where nothing is kept, and the level of each."""
        k2, run = self.kernel**2, self.block * self.kernel**2
        offsets = self._offsets().astype(np.int64)  # torch.compile, which traces this, cannot compute with uint16
        places = np.zeros(offsets.max() + 1, np.int64)
        places[offsets] = np.arange(run)
        blocks = -(-self.in_channels // self.block)
        first = np.arange(self.out_channels) * self.in_channels * k2 + np.arange(blocks)[:, None] * run
        indices = first.ravel().repeat(np.diff(self.starts)) + places.take(self.offsets.astype(np.int64))
        numel = self.out_channels * self.in_channels * k2
        values, levels = np.zeros(numel, np.float32), np.full(numel, ABSENT, np.uint8)
        values[indices], levels[indices] = self.values, self.levels
        return values, levels

    def _by_block(self, elements: Array, filler: int) -> Array:
        """Elements of the weight in the kernel's order, which has block, output channel, and then the weight's own."""
        k2, blocks = self.kernel**2, -(-self.in_channels // self.block)
        filled = np.full((self.out_channels, blocks * self.block * k2), filler, elements.dtype)
        filled[:, : self.in_channels * k2] = elements.reshape(self.out_channels, -1)
        return filled.reshape(self.out_channels, blocks, -1).swapaxes(0, 1).ravel()

    def _offsets(self) -> Array:
        return _offsets(self.block, self.kernel, self._using.rows + 2, self._using.vectors + 2)

    def __reduce__(self) -> Any:
        # The order and the offsets are those of this processor's kernel: a copy may be for another one.
        return _kept_here, (self._shape, *self.dense())

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return self.values.nbytes + self.offsets.nbytes + self.levels.nbytes + self.starts.nbytes

    @property
    def count(self) -> int:
        """How many weights are kept."""
        return len(self.values)


@functools.cache
def _offsets(block: int, kernel: int, rows: int, vectors: int) -> Array:
    """Of each element of one output channel's weight for ``block`` channels: where in a tile of them it reads."""
    ci, ky, kx = np.unravel_index(np.arange(block * kernel**2), (block, kernel, kernel))
    margin = 1 - kernel // 2  # the tile has a pixel around it, which a 1x1 kernel does not look at
    offsets: Array = ((ci * rows + ky + margin) * vectors + kx + margin).astype(np.uint16)
    return offsets


def _kept_here(shape: tuple[int, ...], values: Array, levels: Array) -> Kept:
    using = kernel()
    if using is None:
        raise ValueError('the network was saved in sparse form, but the sparse runtime was not built here')
    return Kept(shape, values, levels, using)


def eligible(layer: nn.Module) -> bool:
    """Whether the kernel can run it: float32 on the CPU, 3x3 or 1x1, stride 1, one group, zeros around."""
    if kernel() is None or type(layer) not in (nn.Conv2d, SparseConv2d):
        return False
    assert isinstance(layer, nn.Conv2d)
    tensors = list(layer.parameters(recurse=False))
    return (
        layer.kernel_size in ((1, 1), (3, 3))
        and layer.padding in ('same', (layer.kernel_size[0] // 2,) * 2)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == 'zeros'
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and all((t.dtype, t.device.type) == (torch.float32, 'cpu') for t in tensors)
    )


def make_sparse(layer: nn.Conv2d, values: Array, levels: Array) -> None:
    """Turn a convolution into a :class:`SparseConv2d` in place, or give new weights to one that already is.

    Args:
        layer: one that is :func:`eligible`.
        values: of the flattened weight, float32.
        levels: the level of each, uint8; :data:`ABSENT` of what it does not keep.
    """
    using = kernel()
    assert using is not None
    kept = Kept((layer.out_channels, layer.in_channels, *layer.kernel_size), values, levels, using)
    layer.__dict__['kept'] = kept
    if not isinstance(layer, SparseConv2d):
        layer.__dict__.pop('dense_levels', None)
        del layer._parameters['weight']
        layer.__class__ = SparseConv2d
