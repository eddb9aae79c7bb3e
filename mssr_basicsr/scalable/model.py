"""A scalable model in use: an ordinary network that grows and shrinks in place, from one file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mssr_basicsr.scalable.building import build_for, check_network
from mssr_basicsr.scalable.container import Header, ScalableFile, Source
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.positions import Indices, choose
from mssr_basicsr.scalable.sections import Delta, decode_section, scales_of_elements
from mssr_basicsr.scalable.upscaling import Upscaler

_ABSENT = 255  # what the level map has for weights that are in no loaded level


class ScalableModel:
    """The networks of one ``.mssr`` file, of which one at a time is in memory.

    ``model.network`` is the plain backbone, a ``torch.nn.Module`` in eval mode with the weights of ``model.level``, all
    others being zero. Move it, convert it or use it as any module; :meth:`expand` and :meth:`shrink` go on in place.

    Args:
        source: a path, or a binary stream at the file's first byte. It is kept open to expand from; :meth:`close`, or
            leaving a ``with`` statement, closes a path, after which the network is as usable as before.
        level: the level to start at, 0 being the largest. Default: the largest that is there and within the budgets.
        max_bytes: the most bytes of the file to read.
        max_parameters: the most parameters to have, those that are never pruned included.
        network: the backbone, if you build it yourself: then nothing of BasicSR is needed. All its weights and all its
            other parameters are overwritten.

    Raises:
        ScalableFileError: no such file, corrupted, not there up to this level, or larger than the budget at any level.
    """

    def __init__(
        self,
        source: Source,
        level: int | None = None,
        *,
        max_bytes: int | None = None,
        max_parameters: int | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.file = ScalableFile(source)
        try:
            self._level = self.header.smallest_level
            target = self._choose(level, max_bytes, max_parameters)
            smallest = self.header.section(self._level)
            if network is None:
                network = build_for(self.header, self.file.size or smallest.end)
            else:
                check_network(self.header, network)
            self.network = network
            self._weights = [network.get_parameter(weight.name) for weight in self.header.weights]
            self._level_maps = [np.full(weight.numel, _ABSENT, np.uint8) for weight in self.header.weights]
            self._scales: tuple[Tensor, ...] = ()
            self._load_smallest()
            self.expand(target)
        except BaseException:
            self.close()
            raise
        #: Upscales images with the network as it is.
        self.upscaler = Upscaler(self.network, self.header.backbone, self.header.scale)

    @property
    def header(self) -> Header:
        """What the file says of itself: backbone, levels, sizes, metrics; see :class:`Header`."""
        return self.file.header

    @property
    def level(self) -> int:
        """The level that the network is at; :meth:`expand` and :meth:`shrink` change it."""
        return self._level

    def close(self) -> None:
        """Close the file if it was given as a path; the network stays."""
        self.file.close()

    def __enter__(self) -> ScalableModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose(self, level: int | None, max_bytes: int | None, max_parameters: int | None) -> int:
        header, present = self.header, self.file.available()
        if not present:
            raise self.file.cut_short(header.smallest_level)
        if level is not None:
            if max_bytes is not None or max_parameters is not None:
                raise ValueError('level, max_bytes, max_parameters: give a level or budgets, not both')
            header.section(level)
            return level
        fitting = [
            k
            for k in present
            if (max_bytes is None or header.section(k).end <= max_bytes)
            and (max_parameters is None or header.num_parameters(k) <= max_parameters)
        ]
        if not fitting:
            k = header.smallest_level
            raise ScalableFileError(
                f'{self.file.name}: the smallest level takes {header.section(k).end:,} bytes and has '
                f'{header.num_parameters(k):,} parameters, which is over the budget'
            )
        return min(fitting)

    @torch.no_grad()
    def _load_smallest(self) -> None:
        delta = self._read_section(self._level)
        self._scales = delta.scales
        state = self.network.state_dict()
        for name, tensor in delta.others.items():
            state[name].copy_(tensor)
        for weight in self.header.weights:
            state[weight.name].zero_()
        self._place(self._level, self._unpack(delta))

    def expand(self, level: int | None = None) -> None:
        """Grow in place to a larger level (default: by one), by reading only the sections in between.

        Weights that are there keep their storage and their bits. If a section cannot be read, the network stays at the
        last level that could.

        Raises:
            ScalableFileError: the file does not have this level, or it is corrupted there.
        """
        target = self._level - 1 if level is None else level
        self.header.section(target)
        if target > self._level:
            raise ValueError(f'expand: level {target} is smaller than {self._level}; use shrink')
        for next_level in range(self._level - 1, target - 1, -1):
            self._place(next_level, self._read_delta(next_level))
            self._level = next_level

    @torch.no_grad()
    def shrink(self, level: int | None = None) -> None:
        """Shrink in place to a smaller level (default: by one): its weights stay, those of larger ones become zero."""
        target = self._level + 1 if level is None else level
        self.header.section(target)
        if target < self._level:
            raise ValueError(f'shrink: level {target} is larger than {self._level}; use expand')
        for weight, levels in zip(self._weights, self._level_maps):
            removed = np.flatnonzero(levels < target)
            _write(weight, removed, torch.zeros(len(removed)))
            levels[removed] = _ABSENT
        self._level = target

    def _read_section(self, level: int) -> Delta:
        try:
            return decode_section(self.file.read_section(level), self.header, level)
        except ScalableFileError as error:
            raise ScalableFileError(f'{self.file.name}: level {level}: {error}') from error

    def _read_delta(self, level: int) -> Iterator[tuple[int, Indices, Tensor]]:
        """What ``level`` adds to the next smaller one, which must be loaded.

        Everything is read and checked before this returns. What it returns makes, for one weight after another, its
        number in the header, ascending indices of its flattened elements, and their values, float32 or as the file has
        them: no more than a weight's are in memory at a time.
        """
        return self._unpack(self._read_section(level))

    def _unpack(self, delta: Delta) -> Iterator[tuple[int, Indices, Tensor]]:
        for i, choice, values in delta.values():
            levels = self._level_maps[i]
            indices = choose((levels == _ABSENT).nonzero()[0], choice)
            if self._scales:
                values = values.float().mul_(scales_of_elements(self._scales[i], indices, levels.size))
            yield i, indices, values

    @torch.no_grad()
    def _place(self, level: int, delta: Iterable[tuple[int, Indices, Tensor]]) -> None:
        for i, indices, values in delta:
            self._level_maps[i][indices] = level
            _write(self._weights[i], indices, values)

    def upscale(self, image: npt.NDArray[Any], tile: int | None = None, bgr: bool = False) -> npt.NDArray[Any]:
        """Upscale an image with the network as it is; see :meth:`Upscaler.upscale`."""
        return self.upscaler.upscale(image, tile, bgr)


def _write(weight: Tensor, indices: Indices, values: Tensor) -> None:
    """Give the elements at ``indices`` of the flattened weight their values, in place."""
    data = weight.data if weight.is_contiguous() else weight.contiguous()  # channels_last, for one, is not
    data.view(-1).scatter_(0, torch.from_numpy(indices).to(data.device), values.to(data))
    if data.data_ptr() != weight.data_ptr():
        weight.copy_(data)
