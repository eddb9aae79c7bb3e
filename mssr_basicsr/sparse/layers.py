"""A convolution that holds the weights it keeps, and nothing dense beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mssr_basicsr.sparse.library import Kernel, kernel

Array = npt.NDArray[Any]


class SparseConv2d(nn.Conv2d):
    """What :func:`make_sparse` makes of a convolution, in place: 7 bytes for each kept weight.

    These are its value (4), where it is (2) and its level (1). It is still the ``nn.Conv2d`` that it was:
    :attr:`weight` and ``state_dict()`` make the dense weight anew, and training, another device, another dtype or
    loading a state dict turn it back into a dense one, in place. What the kernel does not take (gradients, other
    dtypes, NaN and infinity) torch computes with the dense weight.
    """

    kept: Kept

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, made at each call."""
        indices, values, _ = self.kept.flat()
        dense = torch.zeros(self.out_channels * self.kept.in_channels * self.kernel_size[0] ** 2)
        dense[torch.from_numpy(indices)] = torch.from_numpy(values)
        return dense.view(self.out_channels, self.kept.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        from mssr_basicsr.sparse.network import run_layer

        result = run_layer(self, input)
        return super().forward(input) if result is None else result

    def make_dense(self) -> None:
        """Become an ``nn.Conv2d`` with a dense weight; its weights' levels stay in :attr:`dense_levels`."""
        weight, (indices, _, levels) = self.weight, self.kept.flat()
        dense_levels = np.full(weight.numel(), 255, np.uint8)
        dense_levels[indices] = levels
        del self.kept
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        bias = self._parameters.pop('bias')
        self.register_parameter('weight', nn.Parameter(weight))
        self.register_parameter('bias', bias)
        self.dense_levels = dense_levels

    def train(self, mode: bool = True) -> SparseConv2d:
        if mode:
            self.make_dense()
        nn.Conv2d.train(self, mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseConv2d:
        probe = fn(torch.empty(0))
        if (probe.dtype, probe.device.type) != (torch.float32, 'cpu'):
            self.make_dense()
        nn.Conv2d._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f'{prefix}weight'] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.make_dense()
        nn.Conv2d._load_from_state_dict(self, *arguments)


class Kept:
    """Kept weights in the order and with the offsets of kernel.c, each with its level."""

    def __init__(self, shape: tuple[int, ...], indices: Array, values: Array, levels: Array, using: Kernel) -> None:
        self.out_channels, self.in_channels, self.kernel = shape[:3]
        self.block, self._using, self._shape = using.block, using, shape
        co, ci, ky, kx = (axis.astype(np.int32) for axis in np.unravel_index(indices, shape))
        order = np.lexsort((indices, co, ci // self.block))
        margin = 1 - self.kernel // 2  # the tile has a pixel around it, which a 1x1 kernel does not look at
        offsets = ((ci % self.block) * (using.rows + 2) + ky + margin) * (using.vectors + 2) + kx + margin
        self.values = np.ascontiguousarray(values[order], np.float32)
        self.offsets = np.ascontiguousarray(offsets[order], np.uint16)
        self.levels = np.ascontiguousarray(levels[order], np.uint8)
        blocks = -(-self.in_channels // self.block)
        counts = np.bincount((ci // self.block) * self.out_channels + co, minlength=blocks * self.out_channels)
        self.starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)

    def flat(self) -> tuple[Array, Array, Array]:
        """Indices into the flattened weight, ascending, and the values and levels there."""
        using = self._using
        runs = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        block, co = np.divmod(runs, self.out_channels)
        rest, kx = np.divmod(self.offsets.astype(np.int64), using.vectors + 2)
        ci, ky = np.divmod(rest, using.rows + 2)
        margin, k = 1 - self.kernel // 2, self.kernel
        ci = block * self.block + ci
        indices = ((co * self.in_channels + ci) * k + ky - margin) * k + kx - margin
        order = np.argsort(indices)
        return indices[order], self.values[order], self.levels[order]

    def __reduce__(self) -> Any:
        # The order and the offsets are those of this processor's kernel: a copy may be for another one.
        return _kept_here, (self._shape, *self.flat())

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.values.nbytes + self.offsets.nbytes + self.levels.nbytes + self.starts.nbytes

    @property
    def density(self) -> float:
        """The kept share of the weights."""
        return len(self.values) / max(1, self.out_channels * self.in_channels * self.kernel**2)


def _kept_here(shape: tuple[int, ...], indices: Array, values: Array, levels: Array) -> Kept:
    using = kernel()
    if using is None:
        raise ValueError('a network in the sparse form was saved, and here the sparse runtime was not built')
    return Kept(shape, indices, values, levels, using)


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


def make_sparse(layer: nn.Conv2d, indices: Array, values: Array, levels: Array) -> None:
    """Turn a convolution into a :class:`SparseConv2d` in place.

    Args:
        layer: one that is :func:`eligible`.
        indices: of the weights that it keeps, in the flattened weight, ascending.
        values: these weights.
        levels: the level of each, below 255.
    """
    using = kernel()
    assert using is not None
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    kept = Kept(shape, indices, values, levels, using)
    if not isinstance(layer, SparseConv2d):
        del layer._parameters['weight']
        layer.__dict__.pop('dense_levels', None)
        layer.__class__ = SparseConv2d
    assert isinstance(layer, SparseConv2d)
    layer.kept = kept
