"""A distillation term beside the pixel loss, in the one place where any BasicSR model class takes a loss from."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn


class PixelAndDistillationLoss(nn.Module):
    """The sum of the pixel loss and one distillation term; it stands in a model's ``cri_pix``.

    BasicSR's model classes compute their losses within one method, each class its own. What they have in common is
    that they call ``cri_pix(output, gt)``: whatever is added there trains with all the losses that the class has.

    Args:
        pixel_loss: the loss that the YAML names, or None.
        name: the term's name in the log.
        term: ``term(output, gt)`` is a scalar, or None where there is nothing to distil.
    """

    def __init__(
        self, pixel_loss: nn.Module | None, name: str, term: Callable[[Tensor, Tensor], Tensor | None]
    ) -> None:
        super().__init__()
        self.pixel_loss, self.name, self.term = pixel_loss, name, term
        self._parts: dict[str, Tensor] = {}
        self._total: Tensor | None = None

    def forward(self, output: Tensor, gt: Tensor) -> Tensor:
        """The sum, a scalar.

        Args:
            output: the network's images.
            gt: what the model class compares them with, of the same shape.
        """
        pixel = None if self.pixel_loss is None else self.pixel_loss(output, gt)
        distilled = self.term(output, gt)
        named = (('pixel', pixel), (self.name, distilled))
        self._parts = {name: part for name, part in named if part is not None}
        parts = list(self._parts.values())
        self._total = torch.stack(parts).sum() if parts else output.sum() * 0
        return self._total

    def split(self, loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of an iteration with this one's parts apart: the pixel loss under the name that the class gives.

        Args:
            loss_dict: by name, what the model class logs; our sum is among it if it was computed in this iteration.
        """
        split = {}
        for name, value in loss_dict.items():
            if value is self._total:
                split.update({name if part == 'pixel' else part: loss for part, loss in self._parts.items()})
            else:
                split[name] = value
        return split
