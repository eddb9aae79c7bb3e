"""Stochastic self-distillation in one iteration: the larger network judges the small network's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mssr_basicsr.archs.feature_taps import ImageFinisher, features_of, record_outputs
from mssr_basicsr.archs.forward_pass import ForwardPass, only_pass, record_passes
from mssr_basicsr.foundation.modes import weights_set
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
        self._passes: list[ForwardPass] = []
        self._outputs: dict[str, list[Any]] = {}

    def load_teacher(self, weights: Mapping[str, Tensor]) -> None:
        """Give the teacher the ``weights`` of the next network to learn from."""
        with weights_set(self.teacher):
            self.teacher.load_state_dict(weights)
        self._finisher = ImageFinisher(self.teacher, self.taps)  # with other weights, other modules may be skipped

    @contextmanager
    def watching(self, student: nn.Module, seed: str) -> Iterator[None]:
        """While the context is open, keep what :meth:`term` needs of the student's forward pass.

        Args:
            student: the small network.
            seed: the same seed draws the same depths and the same positions in the batch on every rank.
        """
        with record_passes(student) as self._passes, record_outputs(student, self.taps) as self._outputs:
            self._seed = seed
            try:
                yield
            finally:
                self._seed, self._passes, self._outputs = None, [], {}

    def term(self, gt: Tensor) -> Tensor | None:
        """The self-distillation loss of the forward pass that is being watched; None without one, or once it is given.

        Args:
            gt: the ground truth, (N, C, H, W).

        Raises:
            OptionError: a tap did not run once, or did not return one tensor.
            RuntimeError, TypeError: the network does not run once, or its input is not one tensor.
        """
        if self._seed is None:
            return None
        seed, recorded, given = self._seed, features_of(self._outputs), only_pass(self._passes)
        self._seed = None
        self._outputs.clear()  # with gradient checkpointing, the taps will run again
        if len(given.inputs) != 1 or given.keywords:
            raise RuntimeError(f'the network takes {len(given.inputs) + len(given.keywords)} inputs')
        x = given.inputs[0]
        if not isinstance(x, Tensor):
            raise TypeError(f'the network takes a {type(x).__name__}, not a tensor')
        images = self.loss.sample_images(len(x), seed)
        x, gt = x[images], gt[images]
        features = {tap: recorded[tap][images] for tap in self.loss.sample_taps(self.taps, seed)}
        with given.precision():
            loss: Tensor = self.loss(self._finisher.finish(x, features), gt, lambda: self.teacher(x))
        return loss
