"""The models that a YAML names: each stage, and testing, extends whatever model class the setup used before."""

from __future__ import annotations

import inspect
from typing import Any

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY

from mssr_basicsr.adapter.backbone_options import expose_backbone_options
from mssr_basicsr.adapter.unread_options import (
    refuse_numbers_as_strings,
    report_comparison_of_type,
    report_unread_options,
)
from mssr_basicsr.foundation.checks import OptionError, find_registered, nearest_first
from mssr_basicsr.models.backward_stage import BackwardStage
from mssr_basicsr.models.forward_stage import ForwardStage
from mssr_basicsr.models.levelwise_training import LevelwiseTraining
from mssr_basicsr.models.nested_levels import NestedLevels


@MODEL_REGISTRY.register()
def MSSRForwardModel(opt: dict[str, Any]) -> Any:
    """``base_model_type`` (default: SRModel) with :class:`ForwardStage`."""
    return build_extended(ForwardStage, 'MSSRForwardModel', opt)


@MODEL_REGISTRY.register()
def MSSRBackwardModel(opt: dict[str, Any]) -> Any:
    """``base_model_type`` (default: SRModel) with :class:`BackwardStage`."""
    return build_extended(BackwardStage, 'MSSRBackwardModel', opt)


@MODEL_REGISTRY.register()
def MSSRModel(opt: dict[str, Any]) -> Any:
    """``base_model_type`` (default: SRModel) with :class:`NestedLevels`: tests every level of one checkpoint."""
    return build_extended(NestedLevels, 'MSSRModel', opt)


def build_extended(stage: type[NestedLevels], name: str, opt: dict[str, Any]) -> Any:
    """A model of the class that ``opt['base_model_type']`` names, extended by ``stage``.

    Args:
        stage: the mixin.
        name: the name of the resulting class, as in ``model_type``.
        opt: the whole YAML, as parsed by BasicSR.

    Raises:
        OptionError: a class that cannot be extended, an option that is wrong, a stage that is asked to test, or
            MSSRModel that is asked to train.
    """
    trains = issubclass(stage, LevelwiseTraining)
    if trains and not opt['is_train']:
        raise OptionError('model_type', name, f'MSSRModel, which tests every level ({name} only trains)')
    if opt['is_train'] and not trains:
        raise OptionError('model_type', name, 'MSSRForwardModel, MSSRBackwardModel (it only tests)')
    base = find_base_model(opt.get('base_model_type', 'SRModel'))
    refuse_numbers_as_strings(opt)
    expose_backbone_options(opt)
    report_unread_options(opt, name, base)
    report_comparison_of_type(opt, base)
    return extend(stage, base, name)(opt)


def extend(stage: type[NestedLevels], base: type, name: str) -> type:
    """The class ``name``: ``base``, whose methods ``stage`` extends by cooperative ``super()`` calls."""
    return type(name, (stage, base), {'__doc__': f'{base.__name__} with {stage.__name__}.', '__module__': __name__})


def find_base_model(name: Any) -> type:
    """The model class that ``base_model_type`` names.

    Raises:
        OptionError: none is registered under that name, or it does not derive from BasicSR's SRModel.
    """
    allowed = nearest_first(name, [key for key, model in MODEL_REGISTRY if _can_be_extended(model)])
    model_class = find_registered(MODEL_REGISTRY, name)
    if model_class is None:
        allowed += '; to use another, import the package that registers it first, as its own train.py does'
        raise OptionError('base_model_type', name, allowed)
    if not _can_be_extended(model_class):
        reason = 'it is one of the MSSR models' if inspect.isfunction(model_class) else 'it is not an SRModel'
        raise OptionError('base_model_type', name, f'{allowed} ({name} cannot be extended: {reason})')
    return model_class  # type: ignore[no-any-return]


def _can_be_extended(model_class: Any) -> bool:
    return inspect.isclass(model_class) and issubclass(model_class, SRModel)
