"""Stochastic self-distillation in one iteration: the larger network judges the small network's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mssr_basicsr.archs.feature_taps import ImageFinisher, features_of, record_outputs
from mssr_basicsr.losses.ssd_loss import SSDLoss


class SelfDistillation:
    """Feeds the small network's features at random depths to its teacher and compares the resulting images.

    Args:
        loss: decides on the depths and on how the images are compared.
        teacher: the larger network, frozen and in eval mode.
        taps: names of the modules whose output features can be passed, shallowest first.
    """

    def __init__(self, loss: SSDLoss, teacher: nn.Module, taps: Sequence[str]) -> None:
        self.loss, self.teacher, self.taps = loss, teacher, taps
        self._finisher = ImageFinisher(teacher, taps)
        self._seed: str | None = None
        self._inputs: list[tuple[Any, ...]] = []  # of each forward pass
        self._autocast = False  # whether it was on there
        self._outputs: dict[str, list[Any]] = {}

    @contextmanager
    def watching(self, student: nn.Module, seed: str) -> Iterator[None]:
        """While the context is open, keep what :meth:`term` needs of the student's forward pass.

        Args:
            student: the small network.
            seed: the same seed draws the same depths and the same positions in the batch on every rank.
        """

        def keep(student: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
            self._inputs.append((*inputs, *others.values()))
            self._autocast = torch.is_autocast_enabled(next(student.parameters()).device.type)

        handle = student.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with record_outputs(student, self.taps) as self._outputs:
                self._seed, self._inputs = seed, []
                yield
        finally:
            handle.remove()
            self._seed, self._inputs, self._outputs = None, [], {}

    def term(self, gt: Tensor) -> Tensor | None:
        """The self-distillation loss of the forward pass that is being watched, None if none is.

        Args:
            gt: the ground truth, (N, C, H, W).

        Raises:
            OptionError: a tap did not run once, or did not return one tensor.
            TypeError: the network takes more than one input.
        """
        if self._seed is None:
            return None
        recorded = features_of(self._outputs)
        (inputs,) = self._inputs
        if len(inputs) != 1:
            raise TypeError(f'the network takes {len(inputs)} inputs')
        x: Tensor = inputs[0]
        images = self.loss.sample_images(len(x), self._seed)
        x, gt = x[images], gt[images]
        features = {tap: recorded[tap][images] for tap in self.loss.sample_taps(self.taps, self._seed)}
        with torch.autocast(x.device.type, torch.get_autocast_dtype(x.device.type), self._autocast):
            loss: Tensor = self.loss(self._finisher.finish(x, features), gt, lambda: self.teacher(x))
        return loss
