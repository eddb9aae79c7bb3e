"""Stochastic self-distillation in one iteration: the larger network judges the small network's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mssr_basicsr.archs.feature_taps import ImageFinisher, record_features
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
        self._drawn: list[str] = []
        self._images = slice(None)
        self._features: dict[str, Tensor] = {}
        self._x: Tensor | None = None

    @torch.no_grad()
    def try_out(self, x: Tensor) -> None:
        """Compute the loss of the teacher's own features and image once, so that what cannot work fails now.

        Nothing of it is kept: what the teacher need not compute is only known when it is trained.

        Args:
            x: input of the network, (N, C, H, W).
        """
        trial = SelfDistillation(self.loss, self.teacher, self.taps)
        with trial.watching(self.teacher, x, 'trial'):
            image = self.teacher(x)
            trial.term(image, image)

    @contextmanager
    def watching(self, student: nn.Module, x: Tensor, seed: str) -> Iterator[None]:
        """While the context is open, keep features of ``student(x)``, at depths and of images drawn by ``seed``.

        Args:
            student: the small network.
            x: its input, (N, C, H, W).
            seed: the same seed draws the same depths and the same positions in the batch on every rank.
        """
        self._finisher.try_out(x)
        self._drawn, self._images = self.loss.sample_taps(self.taps, seed), self.loss.sample_images(len(x), seed)
        try:
            with record_features(student, self._drawn) as self._features:
                self._x = x[self._images]
                yield
        finally:
            self._features, self._x = {}, None

    def term(self, output: Tensor, gt: Tensor) -> Tensor | None:
        """The self-distillation loss of the iteration being watched, None if there is none.

        Args:
            output: the small network's images; not used.
            gt: the ground truth, (N, C, H, W).
        """
        x = self._x
        if x is None:
            return None
        features = {tap: self._features[tap][self._images] for tap in self._drawn}
        loss: Tensor = self.loss(self._finisher.finish(x, features), gt[self._images], lambda: self.teacher(x))
        return loss
