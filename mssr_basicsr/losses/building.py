"""Building a loss from options in the YAML, which are checked."""

from __future__ import annotations

import inspect
from typing import Any

from basicsr.losses import build_loss
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from mssr_basicsr.foundation.checks import arguments_checked, find_registered, require_type


def build_checked_loss(option: str, found: Any, **defaults: Any) -> nn.Module:
    """The loss that ``option`` names by its value ``found``.

    Args:
        option: the option's name in the YAML, for errors.
        found: its value: the loss's options, with its type.
        defaults: for options that ``found`` does not have; those that the loss does not take are left out.

    Raises:
        OptionError: no such loss is registered with BasicSR, or it does not take these options.
    """
    require_type(option, found, LOSS_REGISTRY.keys(), 'the options of a loss, with its type')
    loss = find_registered(LOSS_REGISTRY, found['type'])
    taken = inspect.signature(loss).parameters
    found = {**{name: value for name, value in defaults.items() if name in taken}, **found}
    with arguments_checked(option, found, loss):
        return build_loss(found)  # type: ignore[no-any-return]
