"""One prunable weight of a network in use, which levels fill and clear, in dense or sparse form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mssr_basicsr.scalable.positions import Choice, Indices, choose
from mssr_basicsr.scalable.sections import scales_of_elements
from mssr_basicsr.sparse.layers import ABSENT, SparseConv2d, eligible, make_sparse
from mssr_basicsr.sparse.table import prefers_sparse

Values = npt.NDArray[np.float32]


class LevelledWeight:
    """Knows the level of each element; :meth:`add` and :meth:`remove` leave all other elements bit-identical.

    Args:
        network: the backbone.
        name: the weight's name in the state dict. All its elements are set to zero.
        sparse: whether the weight may take the sparse form where that is faster.
    """

    def __init__(self, network: nn.Module, name: str, sparse: bool) -> None:
        module_name, _, self._parameter = name.rpartition('.')
        self._module = network.get_submodule(module_name)
        if isinstance(self._module, SparseConv2d):
            self._module.make_dense()
        self._module.__dict__.pop('dense_levels', None)  # of another model, which used the network before
        self._sparse = sparse and self._parameter == 'weight'
        weight = self._module.get_parameter(self._parameter)
        weight.detach().zero_()
        self._numel = weight.numel()
        self._levels: npt.NDArray[np.uint8] = np.full(self._numel, ABSENT, np.uint8)
        self._settle()

    def levels(self) -> npt.NDArray[np.uint8]:
        """The level of each element of a dense weight; if it was in sparse form before, as that form had them."""
        brought: Any = self._module.__dict__.pop('dense_levels', None)
        if brought is not None:
            self._levels = brought
        return self._levels

    def add(self, level: int, choice: Choice, stored: Tensor, scales: Tensor | None) -> None:
        """Set the values and the level of some of the elements that no loaded level has.

        Args:
            level: the level being loaded.
            choice: which of these elements, by their order in the flattened weight.
            stored: their values, 1-D, as stored in the file.
            scales: for an I8 file, the factors of the values, one per output channel.
        """
        layer = self._module
        if isinstance(layer, SparseConv2d):
            if self._wants_sparse(layer.kept.count + len(stored)):
                dense, levels = layer.kept.dense()
                indices = self._choose(levels, level, choice)
                dense[indices] = self._values(indices, stored, scales)
                make_sparse(layer, dense, levels)
                return
            layer.make_dense()
        indices = self._choose(self.levels(), level, choice)
        _write(self._weight(), indices, torch.from_numpy(self._values(indices, stored, scales)))
        self._settle()

    def remove(self, level: int) -> None:
        """Set what ``level`` does not have to zero."""
        layer = self._module
        if isinstance(layer, SparseConv2d):
            dense, levels = layer.kept.dense()
            levels[levels < level] = ABSENT
            make_sparse(layer, dense, levels)
            return
        levels = self.levels()
        removed = np.flatnonzero(levels < level)
        _write(self._weight(), removed, torch.zeros(len(removed), dtype=torch.float32, device='cpu'))
        levels[removed] = ABSENT
        self._settle()

    def _choose(self, levels: npt.NDArray[np.uint8], level: int, choice: Choice) -> Indices:
        """The positions in the flattened weight of the chosen absent elements; sets their level."""
        indices = choose(np.flatnonzero(levels == ABSENT), choice)
        levels[indices] = level
        return indices

    def _values(self, indices: Indices, stored: Tensor, scales: Tensor | None) -> Values:
        values = stored.float()
        if scales is not None:
            values *= scales_of_elements(scales, indices, self._numel)
        return values.numpy()

    def _wants_sparse(self, count: int) -> bool:
        """Whether the sparse form is possible, and faster for ``count`` elements."""
        if not self._sparse or not eligible(self._module) or self._module.training:
            return False
        assert isinstance(self._module, nn.Conv2d)
        layer = self._module
        return prefers_sparse(layer.in_channels, layer.out_channels, layer.kernel_size[0], count / self._numel)

    def _settle(self) -> None:
        """Switch a dense weight to the sparse form if that is faster for its current elements."""
        levels = self.levels()
        if self._sparse and self._wants_sparse(int(np.count_nonzero(levels != ABSENT))):
            assert isinstance(self._module, nn.Conv2d)
            make_sparse(self._module, self._weight().detach().contiguous().view(-1).numpy(), levels)
            self._levels = np.empty(0, np.uint8)

    def _weight(self) -> Tensor:
        return self._module.get_parameter(self._parameter)


def _write(weight: Tensor, indices: Indices, values: Tensor) -> None:
    """Give the elements at ``indices`` of the flattened weight their values, in place."""
    # Not .data, whose changes no version counter sees: the sparse runtime would go on with what it has copied.
    data = weight.detach() if weight.is_contiguous() else weight.contiguous()  # channels_last, for one, is not
    data.view(-1).scatter_(0, torch.from_numpy(indices).to(data.device), values.to(data))
    if data.data_ptr() != weight.data_ptr():
        weight.copy_(data)
