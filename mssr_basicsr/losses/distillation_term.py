"""A distillation term added to the pixel loss, in the one place from which every BasicSR model class takes a loss."""

from __future__ import annotations

import inspect
from typing import Any, Callable, NamedTuple

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError


class _Result(NamedTuple):
    total: Tensor
    pixel: Tensor | None  # None without a pixel loss
    distilled: Tensor


class DistillationTerm:
    """One distillation term, which the pixel loss adds to its results.

    Each of BasicSR's model classes computes its losses within one method of its own. What they have in common is that
    they call ``cri_pix(output, gt)``: whatever is added there trains together with all other losses of the class.

    Args:
        option: the option under ``train`` that asks for the term, such as ``ssd_opt``; the log calls it ``l_ssd``.
        term: ``term(output, gt)`` is a scalar, or None where there is nothing to distil.
    """

    def __init__(self, option: str, term: Callable[..., Tensor | None]) -> None:
        self.option, self.term = option, term
        self.used = False  #: whether the pixel loss has been computed
        self._results: list[_Result] = []  # those of this iteration that have the term
        self._warned = False

    def add_to(self, pixel_loss: Any) -> nn.Module:
        """``pixel_loss``, which from now on adds the term to its results; without one, a loss that is the term alone.

        A loss that is a module stays itself: whatever it is called with, and whoever else has it.

        Raises:
            OptionError: when the loss is computed, if it does not return one tensor.
        """
        loss = pixel_loss if isinstance(pixel_loss, nn.Module) else _Function(pixel_loss)
        signature = inspect.signature(loss.forward)

        def add_term(loss: nn.Module, args: Any, kwargs: Any, pixel: Any) -> Tensor:
            if not isinstance(pixel, Tensor):
                allowed = f'a loss that returns one tensor, not a {type(pixel).__name__} (or no train.{self.option})'
                raise OptionError('train.pixel_opt', type(loss).__name__, allowed)
            if not torch.is_grad_enabled():  # nothing trains by this result, such as one that a class only logs
                return pixel
            given = signature.bind(*args, **kwargs)
            distilled = self.term(*[*given.args, *given.kwargs.values()][:2])
            self.used = True
            if distilled is None:
                return pixel
            total = distilled if pixel_loss is None else pixel + distilled
            self._results.append(_Result(total, None if pixel_loss is None else pixel, distilled))
            return total

        loss.register_forward_hook(add_term, with_kwargs=True)
        return loss

    def begin_iteration(self) -> None:
        """Forget the results so far, which are another iteration's."""
        self._results = []

    def split(self, loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of an iteration, with the term by itself: the pixel loss keeps the class's name for it.

        This also holds for the sum of several results. Of a loss in which the class uses them otherwise, the term
        remains a part, as a warning says.

        Args:
            loss_dict: what the model class logs, by name.
        """
        results, self._results = self._results, []
        if not results:
            return loss_dict
        pixel = {name: one.pixel for name, value in loss_dict.items() for one in results if value is one.total}
        added = [one for one in results if not any(value is one.total for value in loss_dict.values())]
        if added:  # as in l_pix = 0; l_pix += cri_pix(...)
            total, parts = _sum([one.total for one in added]), [one.pixel for one in added if one.pixel is not None]
            name = next((name for name, value in loss_dict.items() if _equal(value, total)), None)
            if name is not None:
                pixel[name] = _sum(parts) if parts else None
            elif not self._warned:
                self._warned = True
                get_root_logger().warning(
                    f'In the log, {self._name} is also a part of a loss in which the model class uses cri_pix.'
                )
        split = {name: pixel.get(name, value) for name, value in loss_dict.items()}
        split[self._name] = _sum([one.distilled for one in results])
        return {name: value for name, value in split.items() if value is not None}

    @property
    def _name(self) -> str:
        return f'l_{self.option.removesuffix("_opt")}'


class _Function(nn.Module):
    """A pixel loss that is a function; without one, it is zero."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        super().__init__()
        self.function = function

    def forward(self, output: Tensor, gt: Tensor, **kwargs: Any) -> Any:
        return output.sum() * 0 if self.function is None else self.function(output, gt, **kwargs)


def require_same_shape(option: str, image: Any, target: Any) -> None:
    """Raise OptionError for ``train.<option>`` if two images that a loss has compared differ in shape.

    A loss would repeat a model class's grey ground truth for each of the network's colours, and say nothing.
    """
    if isinstance(image, Tensor) and isinstance(target, Tensor) and image.shape != target.shape:
        allowed = (
            f'a model class that gives cri_pix images of the shape that the network returns (or no train.{option})'
        )
        raise OptionError(f'train.{option}', f'images of {tuple(image.shape)} and {tuple(target.shape)}', allowed)


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _equal(value: Any, total: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == total.shape and bool((value == total).all())
