"""Distillation terms in the loss of any of BasicSR's model classes, for either stage."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Callable

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from mssr_basicsr.foundation.bytecode import codes_in
from mssr_basicsr.foundation.checks import OptionError, first_line
from mssr_basicsr.losses.building import build_checked_loss
from mssr_basicsr.losses.distillation_term import DistillationTerm
from mssr_basicsr.models.nested_levels import NestedLevels


class DistillingModel(NestedLevels):
    """A mixin for any of BasicSR's model classes: one distillation term can be added to its pixel loss."""

    _train_opt: dict[str, Any]  # the YAML's train section, as it was before BasicSR took anything out of it
    _distillation: DistillationTerm | None = None  # what cri_pix adds to the pixel loss

    def networks_to_learn_from(self) -> list[nn.Module]:
        """Frozen networks from which the training distils images or features."""
        return []

    @contextmanager
    def distilling(self, current_iter: int) -> Iterator[None]:
        """The context in which iteration ``current_iter`` runs; it keeps what distillation needs from it."""
        yield

    def optimize_parameters(self, current_iter: int) -> None:  # type: ignore[override]  # as SRModel's
        if self._distillation is not None:
            self._distillation.begin_iteration()
        super().optimize_parameters(current_iter)

    def reduce_loss_dict(self, loss_dict: dict[str, Tensor]) -> dict[str, float]:
        """As in BasicSR, with the distillation term separate from the pixel loss."""
        if self._distillation is not None:
            loss_dict = self._distillation.split(loss_dict)
        reduced: dict[str, float] = super().reduce_loss_dict(loss_dict)
        return reduced

    def build_distillation_loss(self, key: str, found: Any) -> Any:
        """The loss that ``train.<key>`` names, or None. Its default weight, if it has one, is the pixel loss's."""
        if not found:
            return None
        weight = (self._train_opt.get('pixel_opt') or {}).get('loss_weight', 1.0)
        return build_checked_loss(f'train.{key}', found, loss_weight=weight).to(self.device)

    def distil_by(self, key: str, term: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Add the ``term`` that ``train.<key>`` asks for to the pixel loss; see :class:`DistillationTerm`.

        Raises:
            OptionError: in the first iteration, if the term cannot be computed.
        """

        def checked_term(*images: Tensor) -> Tensor | None:
            try:
                return term(*images)
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                no_memory = isinstance(error, torch.cuda.OutOfMemoryError) or 'not enough memory' in str(error)
                if distillation.used or no_memory or isinstance(error, OptionError):
                    raise
                both = f'{self.base_name} and {type(self.network.backbone).__name__}'
                allowed = f'nothing, since it cannot be computed with {both} ({first_line(error)})'
                raise OptionError(f'train.{key}', self._train_opt[key], allowed) from error

        self._distillation = distillation = DistillationTerm(key, checked_term)
        self.cri_pix = distillation.add_to(getattr(self, 'cri_pix', None))

    def _require_distillation(self) -> None:
        """Raise OptionError if the model class has not used ``cri_pix`` in an iteration and never names it."""
        term = self._distillation
        if term is not None and not term.used and not computes_pixel_loss(type(self)):
            allowed = f'nothing with {self.base_name}, which computes its loss without cri_pix'
            raise OptionError(f'train.{term.option}', self._train_opt[term.option], allowed)

    def _report_no_distillation(self) -> None:
        term = self._distillation
        if term is not None and not term.used:
            get_root_logger().warning(f'train.{term.option} has had no effect: cri_pix has not been computed.')


def computes_pixel_loss(model_class: type) -> bool:
    """Whether the code that trains a model class, or that of the classes it extends there, names ``cri_pix``.

    What prepares the training does not count: it may name a loss that it only creates or looks at.
    """
    for base in model_class.__mro__:
        if base.__module__.startswith('mssr_basicsr.'):
            continue
        functions = {name: inspect.unwrap(f) for name, f in vars(base).items() if inspect.isfunction(f)}
        codes = {name: f.__code__ for name, f in functions.items() if hasattr(f, '__code__')}
        for name in ('__init__', 'init_training_settings'):
            codes.pop(name, None)
        names = {name: {used for part in codes_in(code) for used in part.co_names} for name, code in codes.items()}
        if any('cri_pix' in used for used in names.values()):
            return True
        if 'optimize_parameters' in names and 'super' not in names['optimize_parameters']:
            return False
    return False


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy that does not train, in eval mode, for another network to learn from."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                # deepcopy refuses these, such as the weight that weight_norm computes anew in each forward pass.
                setattr(module, name, value.detach())
    return deepcopy(network).eval().requires_grad_(False)
