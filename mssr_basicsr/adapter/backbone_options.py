"""Base model classes that read ``opt['network_g']`` find there what they would find without MSSR around it."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any


class BackboneOptions(OrderedDict):  # type: ignore[type-arg]
    """``network_g``, where a key that MSSR does not have is looked up in the backbone's options.

    ``opt['network_g']['window_size']``, as BasicSR's SwinIRModel reads it, is thus the backbone's. Iterating over the
    mapping, and so the arguments that the architecture gets, includes only its own keys.
    """

    def __missing__(self, key: str) -> Any:
        return super().__getitem__('backbone')[key]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except (KeyError, TypeError):  # TypeError: a backbone that is no mapping, which the architecture refuses
            return default


def show_backbone_options(opt: MutableMapping[str, Any]) -> None:
    """Let ``opt['network_g']``, if it is of type MSSR, show the backbone's options as well. Safe to call repeatedly."""
    network_opt = opt.get('network_g')
    if isinstance(network_opt, dict) and network_opt.get('type') == 'MSSR':
        opt['network_g'] = BackboneOptions(network_opt)


def install() -> None:
    """Let every model class of BasicSR see the backbone's options, whether it is extended by MSSR or a stock one."""
    from basicsr.models.base_model import BaseModel

    init = BaseModel.__init__
    if not getattr(init, 'shows_backbone_options', False):

        @functools.wraps(init)
        def __init__(self: Any, opt: MutableMapping[str, Any]) -> None:
            show_backbone_options(opt)
            init(self, opt)

        __init__.__dict__['shows_backbone_options'] = True
        BaseModel.__init__ = __init__  # type: ignore[method-assign]
