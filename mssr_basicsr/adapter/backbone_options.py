"""Base model classes that read ``opt['network_g']`` find there what they would find without MSSR around it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any, Callable

_REQUIRED = object()


class BackboneOptions(OrderedDict):  # type: ignore[type-arg]
    """``network_g``, where a key that MSSR does not have is looked up in the backbone's options.

    ``opt['network_g']['window_size']``, as BasicSR's SwinIRModel reads it, is thus the backbone's, and so it is by
    ``get``, ``in``, ``pop`` and ``del``; what a model class sets there, and MSSR has no argument for, becomes the
    backbone's. Iterating over the mapping, and so the arguments that the architecture gets, includes only its own keys.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for key, value in dict(*args, **kwargs).items():
            super().__setitem__(key, value)  # as the YAML has it, for MSSR to refuse what is none of its arguments

    def __reduce__(self) -> Any:  # deepcopy, too, sets nothing by itself
        return type(self), (dict(self),)

    def copy(self) -> BackboneOptions:
        return type(self)(self)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._of_backbone()

    def __missing__(self, key: str) -> Any:
        return self._of_backbone()[key]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __setitem__(self, key: str, value: Any) -> None:
        if super().__contains__(key) or (key in _own_keys() and key not in self._of_backbone()):
            super().__setitem__(key, value)
        else:
            self._of_backbone()[key] = value

    def __delitem__(self, key: str) -> None:
        if super().__contains__(key):
            super().__delitem__(key)
        else:
            del self._of_backbone()[key]

    def pop(self, key: str, default: Any = _REQUIRED) -> Any:
        if key not in self and default is not _REQUIRED:
            return default
        value = self[key]
        del self[key]
        return value

    def _of_backbone(self) -> MutableMapping[str, Any]:
        backbone = super().get('backbone')
        return backbone if isinstance(backbone, MutableMapping) else {}  # anything else is refused by the architecture


def _own_keys() -> set[str]:
    from basicsr.utils.registry import ARCH_REGISTRY  # not before BasicSR itself is imported, which brings this module

    return {'type', *inspect.signature(ARCH_REGISTRY.get('MSSR')).parameters}


def is_mssr(opt: Mapping[str, Any]) -> bool:
    """Whether the YAML's ``network_g`` is of type MSSR."""
    network_opt = opt.get('network_g')
    return isinstance(network_opt, dict) and network_opt.get('type') == 'MSSR'


def expose_backbone_options(opt: MutableMapping[str, Any]) -> None:
    """Let ``opt['network_g']``, if it is of type MSSR, show the backbone's options as well. Safe to call repeatedly."""
    if is_mssr(opt):
        opt['network_g'] = BackboneOptions(opt['network_g'])


def with_backbone_options(init: Callable[..., None], model: Any, opt: MutableMapping[str, Any]) -> None:
    """Wraps ``BaseModel.__init__``: every model class, extended by MSSR or not, sees the backbone's options."""
    expose_backbone_options(opt)
    init(model, opt)
