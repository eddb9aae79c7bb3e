"""One prunable weight of a network in use, which levels fill and empty: dense, or in the sparse form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mssr_basicsr.scalable.positions import Indices
from mssr_basicsr.sparse.layers import SparseConv2d, eligible, make_sparse
from mssr_basicsr.sparse.table import prefers_sparse

ABSENT = 255  #: the level of weights that are in no loaded level

Values = npt.NDArray[np.float32]


class LevelledWeight:
    """Knows the level of each element; :meth:`add` and :meth:`remove` keep all others as they are, bit for bit.

    Args:
        network: the backbone.
        name: of the weight in its state dict. All its elements become zero.
        sparse: whether the weight may take the sparse form, where that is faster.
    """

    def __init__(self, network: nn.Module, name: str, sparse: bool) -> None:
        module_name, _, self._parameter = name.rpartition('.')
        self._module = network.get_submodule(module_name)
        self._sparse = sparse and self._parameter == 'weight'
        weight = self._module.get_parameter(self._parameter)
        weight.data.zero_()
        self.numel = weight.numel()  #: of the dense weight
        self._levels: npt.NDArray[np.uint8] = np.full(self.numel, ABSENT, np.uint8)
        self._settle(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.uint8))

    def absent(self) -> Indices:
        """Indices into the flattened weight, ascending, of what no loaded level has."""
        if isinstance(self._module, SparseConv2d):
            absent = np.ones(self.numel, bool)
            absent[self._module.kept.flat()[0]] = False
            return np.flatnonzero(absent)
        return np.flatnonzero(self._dense_levels() == ABSENT)

    def add(self, level: int, indices: Indices, values: Values) -> None:
        """Give the elements at ``indices``, which are absent, their values and their level."""
        levels = np.full(len(indices), level, np.uint8)
        if not isinstance(self._module, SparseConv2d):
            self._dense_levels()[indices] = level
            _write(self._weight(), indices, torch.from_numpy(values))
            self._settle(*self._present())
            return
        found, old_values, old_levels = self._module.kept.flat()
        merged = np.concatenate([found, indices])
        order = np.argsort(merged, kind='stable')
        self._settle(
            merged[order],
            np.concatenate([old_values, values])[order],
            np.concatenate([old_levels, levels])[order],
        )

    def remove(self, level: int) -> None:
        """Take out what ``level`` does not have: it becomes zero."""
        if isinstance(self._module, SparseConv2d):
            indices, values, levels = self._module.kept.flat()
            stays = levels >= level
            self._settle(indices[stays], values[stays], levels[stays])
            return
        levels = self._dense_levels()
        removed = np.flatnonzero(levels < level)
        _write(self._weight(), removed, torch.zeros(len(removed)))
        levels[removed] = ABSENT
        self._settle(*self._present())

    def _settle(self, indices: Indices, values: Values, levels: npt.NDArray[np.uint8]) -> None:
        """Take the form, dense or sparse, that is the faster one for what is kept."""
        if not self._sparse or not eligible(self._module) or self._module.training:
            return
        assert isinstance(self._module, nn.Conv2d)
        layer = self._module
        density = len(indices) / self.numel
        is_sparse = isinstance(layer, SparseConv2d)
        wanted = prefers_sparse(layer.in_channels, layer.out_channels, layer.kernel_size[0], density)
        if is_sparse or wanted:
            make_sparse(layer, indices, values, levels)
            self._levels = np.empty(0, np.uint8)
        if isinstance(layer, SparseConv2d) and not wanted:
            layer.make_dense()

    def _present(self) -> tuple[Indices, Values, npt.NDArray[np.uint8]]:
        levels = self._dense_levels()
        indices = np.flatnonzero(levels != ABSENT)
        if not self._sparse or not eligible(self._module):
            return indices, np.empty(0, np.float32), levels[indices]
        weight = self._weight().detach().contiguous().view(-1).numpy()
        return indices, weight[indices], levels[indices]

    def _weight(self) -> Tensor:
        return self._module.get_parameter(self._parameter)

    def _dense_levels(self) -> npt.NDArray[np.uint8]:
        """The level of each element; a layer that was in the sparse form has brought it along."""
        brought: Any = self._module.__dict__.pop('dense_levels', None)
        if brought is not None:
            self._levels = brought
        return self._levels


def _write(weight: Tensor, indices: Indices, values: Tensor) -> None:
    """Give the elements at ``indices`` of the flattened weight their values, in place."""
    data = weight.data if weight.is_contiguous() else weight.contiguous()  # channels_last, for one, is not
    data.view(-1).scatter_(0, torch.from_numpy(indices).to(data.device), values.to(data))
    if data.data_ptr() != weight.data_ptr():
        weight.copy_(data)
