"""Using a scalable model: an ordinary network that grows and shrinks in place, from one file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.modes import acts_on_modes, weights_set
from mssr_basicsr.scalable.building import build_for, check_network
from mssr_basicsr.scalable.container import ScalableFile, Source
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.header import Header
from mssr_basicsr.scalable.placing import LevelledWeight
from mssr_basicsr.scalable.sections import Delta, decode_section
from mssr_basicsr.scalable.upscaling import Upscaler
from mssr_basicsr.sparse import ENGINES
from mssr_basicsr.sparse.network import accelerate


class ScalableModel:
    """The networks of one ``.mssr`` file, one of which is in memory at a time.

    ``model.network`` is the plain backbone, a ``torch.nn.Module`` in eval mode with the weights of ``model.level``; all
    others are zero. Move it, convert it or use it like any module; :meth:`expand` and :meth:`shrink` still work in
    place, but not while another thread uses the network. Several threads may upscale at the same time.

    Args:
        source: a path, or a binary stream positioned at the file's first byte. It is kept open for expanding;
            :meth:`close`, or leaving a ``with`` statement, closes a path. The network remains usable afterwards.
        level: the level to start at, 0 being the largest. Default: the largest in the file and within the budgets.
        max_bytes: how many bytes of the file to read at most.
        max_parameters: how many parameters to have at most, including those that are never pruned.
        network: the backbone, if you build it yourself; then BasicSR is not needed. All its weights and other
            parameters are overwritten, and it is put in eval mode.
        engine: ``auto``: on a CPU, outside training, convolutions take the sparse form where that is faster: they store
            what the level keeps and skip its zeros (docs/runtime.md). ``state_dict()`` is unaffected; moving or
            training the network makes them dense again. A network with a ``train`` of its own, which may merge weights,
            stays dense. ``torch``: all weights are dense.

    Raises:
        OptionError: there is no such engine.
        ValueError: both a level and a budget are given.
        OSError: the file cannot be opened.
        ScalableFileError: not a ``.mssr`` file, corrupted, incomplete up to this level, or over the budget at any
            level.
        MissingPackageError: BasicSR is not installed, and no ``network`` was given.
    """

    @torch.inference_mode(False)  # whose tensors could not be changed outside of it
    def __init__(
        self,
        source: Source,
        level: int | None = None,
        *,
        max_bytes: int | None = None,
        max_parameters: int | None = None,
        network: nn.Module | None = None,
        engine: str = 'auto',
    ) -> None:
        if engine not in ENGINES:
            raise OptionError('engine', engine, ', '.join(ENGINES))
        self.file = ScalableFile(source)
        try:
            self._level = self.header.smallest_level
            target = self._choose(level, max_bytes, max_parameters)
            self.network = network = self._prepare_network(network)
            self.weights: list[LevelledWeight] = []  #: the prunable ones, in the order of the header
            self._scales: tuple[Tensor, ...] = ()
            self._merges = acts_on_modes(network)
            sparse = engine == 'auto' and not self._merges  # a weight in sparse form could not be merged
            self._load_smallest(sparse)
            if sparse:
                accelerate(network)
            self.expand(target)
        except BaseException:
            self.close()
            raise
        #: Upscales images with the network as it is.
        self.upscaler = Upscaler(self.network, self.header.backbone, self.header.scale)

    def _prepare_network(self, network: nn.Module | None) -> nn.Module:
        """The given network, checked, or one built by BasicSR's code."""
        if network is None:
            return build_for(self.header, self.file.size or self.header.section(self._level).end)
        check_network(self.header, network)
        return network.train().eval()  # after which no layer is in sparse form, as another model may have left it

    @property
    def header(self) -> Header:
        """The file's header: backbone, levels, sizes, metrics; see :class:`Header`."""
        return self.file.header

    @property
    def level(self) -> int:
        """The level that the network is at; :meth:`expand` and :meth:`shrink` change it."""
        return self._level

    def __repr__(self) -> str:
        name, parameters = self.header.backbone['type'], self.header.num_parameters(self._level)
        levels = f'level {self._level} of 0 to {self.header.smallest_level}'
        return f'{type(self).__name__}({name} x{self.header.scale}, {levels}, {parameters:,} parameters)'

    def close(self) -> None:
        """Close the file if it was given as a path; the network remains usable."""
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
            if level not in present:
                raise self.file.cut_short(level)
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

    def _setting_weights(self) -> AbstractContextManager[None]:
        """The context in which the network's weights are set."""
        return weights_set(self.network) if self._merges else nullcontext()  # train mode ends the sparse form

    @torch.no_grad()
    def _load_smallest(self, sparse: bool) -> None:
        delta = self._read_section(self._level)
        self._scales = delta.scales
        with self._setting_weights():
            state = self.network.state_dict()
            for name, tensor in delta.others.items():
                state[name].copy_(tensor)
            del state  # what takes the sparse form lets go of its dense weight
            self.weights = [LevelledWeight(self.network, weight.name, sparse) for weight in self.header.weights]
            self._place(self._level, delta)

    @torch.inference_mode(False)
    def expand(self, level: int | None = None) -> None:
        """Grow in place to a larger level (default: by one), by reading only the sections in between.

        Weights already present keep their storage and their bits. If a section cannot be read, or this is interrupted,
        the network stays at the last level that was complete.

        Raises:
            ScalableFileError: the file does not have this level, or its section is corrupted.
            ValueError: the level is smaller than the current one.
        """
        target = self._level - 1 if level is None else level
        self.header.section(target)
        if target > self._level:
            raise ValueError(f'expand: level {target} is smaller than {self._level}; use shrink')
        with self._setting_weights():
            for next_level in range(self._level - 1, target - 1, -1):
                delta = self._read_section(next_level)
                try:
                    self._place(next_level, delta)
                    self._level = next_level
                except BaseException:
                    self._keep(self._level)
                    raise

    @torch.inference_mode(False)
    def shrink(self, level: int | None = None) -> None:
        """Shrink in place to a smaller level (default: by one): its weights stay, all others become zero.

        Also if this is interrupted, the network is at that level.

        Raises:
            ScalableFileError: there is no such level.
            ValueError: the level is larger than the current one.
        """
        target = self._level + 1 if level is None else level
        self.header.section(target)
        if target < self._level:
            raise ValueError(f'shrink: level {target} is larger than {self._level}; use expand')
        with self._setting_weights():
            try:
                self._keep(target)
            except BaseException:
                self._keep(target)
                raise

    @torch.no_grad()
    def _keep(self, level: int) -> None:
        """Set what ``level`` does not have to zero, which can be repeated."""
        for weight in self.weights:
            weight.remove(level)
        self._level = level

    def _read_section(self, level: int) -> Delta:
        """What ``level`` adds, read and checked in full, so that no part of a damaged section is placed."""
        frame = self.file.read_section(level)  # whose errors name the file and the level already
        try:
            return decode_section(frame, self.header, level)
        except ScalableFileError as error:
            raise ScalableFileError(f'{self.file.name}: level {level}: {error}') from error

    @torch.no_grad()
    def _place(self, level: int, delta: Delta) -> None:
        """Add what ``level`` has to the next smaller one, weight by weight."""
        for i, choice, stored in delta.values():
            self.weights[i].add(level, choice, stored, self._scales[i] if self._scales else None)

    def upscale(self, image: npt.NDArray[Any], tile: int | None = None, bgr: bool = False) -> npt.NDArray[Any]:
        """Upscale an image with the network at its current level; see :meth:`Upscaler.upscale`."""
        return self.upscaler.upscale(image, tile, bgr)
