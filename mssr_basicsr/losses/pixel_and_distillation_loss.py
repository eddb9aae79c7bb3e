"""A distillation term added to the pixel loss, in the one place from which every BasicSR model class takes a loss."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn


class PixelAndDistillationLoss(nn.Module):
    """The sum of the pixel loss and one distillation term; it takes the place of a model's ``cri_pix``.

    Each of BasicSR's model classes computes its losses within one method of its own. What they have in common is that
    they call ``cri_pix(output, gt)``: whatever is added there trains together with all other losses of the class.

    Args:
        pixel_loss: the loss that the YAML names, or None.
        option: the option under ``train`` that asks for the term, such as ``ssd_opt``; the log calls it ``l_ssd``.
        term: ``term(output, gt)`` is a scalar, or None where there is nothing to distil.
    """

    def __init__(
        self, pixel_loss: nn.Module | None, option: str, term: Callable[[Tensor, Tensor], Tensor | None]
    ) -> None:
        super().__init__()
        self.pixel_loss, self.option, self.term = pixel_loss, option, term
        self.used = False  #: whether it has been computed
        self._parts: dict[str, Tensor] = {}
        self._total: Tensor | None = None

    def forward(self, output: Tensor, gt: Tensor) -> Tensor:
        """The sum, a scalar.

        Args:
            output: the network's output images.
            gt: what the model class compares it with, of the same shape.
        """
        pixel = None if self.pixel_loss is None else self.pixel_loss(output, gt)
        distilled = self.term(output, gt)
        self.used = True
        named = (('pixel', pixel), (f'l_{self.option.removesuffix("_opt")}', distilled))
        self._parts = {name: part for name, part in named if part is not None}
        parts = list(self._parts.values())
        self._total = torch.stack(parts).sum() if parts else output.sum() * 0
        return self._total

    def split(self, loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of an iteration, with this one split into its parts: the pixel loss keeps the class's name for it.

        Args:
            loss_dict: what the model class logs, by name, including this sum if it was computed in this iteration.
        """
        split = {}
        for name, value in loss_dict.items():
            if value is self._total:
                split.update({name if part == 'pixel' else part: loss for part, loss in self._parts.items()})
            else:
                split[name] = value
        return split
