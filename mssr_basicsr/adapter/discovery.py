"""How BasicSR finds this plugin: ``import basicsr`` also registers it.

BasicSR imports no third-party packages by itself, and its stock ``basicsr/train.py`` is the script that users run. So
``mssr_basicsr.pth`` in site-packages puts a hook in front of ``sys.meta_path`` at every start of Python. Only when
something imports ``basicsr`` does the hook import this module and call :func:`find_basicsr`. The hook's code is in the
``.pth`` itself, because importing it from here would slow down every start of Python ten times as much.

``MSSR_BASICSR_DISCOVERY=0`` in the environment switches the hook off. Importing any package of the plugin, such as
``mssr_basicsr.archs``, registers it either way, by :func:`load_basicsr`.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable

#: The modules whose import registers the plugin's classes with BasicSR's registries.
REGISTERING = (
    'mssr_basicsr.archs.mssr_arch',
    'mssr_basicsr.data.paired_evaluation_dataset',
    'mssr_basicsr.losses.ssd_loss',
    'mssr_basicsr.metrics.published',
    'mssr_basicsr.models.mssr_model',
)

_registered = False


def load_basicsr() -> None:
    """Import BasicSR, made to work on current software, with the whole plugin registered.

    It makes no difference whether BasicSR has been imported before, or is being imported right now. Raises what
    ``import basicsr`` raises; an error in the plugin itself becomes a warning.
    """
    _attempt(_prepare)
    import basicsr

    # A BasicSR that is still being imported is completed first; the hook registers the plugin then.
    if not getattr(basicsr.__spec__, '_initializing', False):
        _register()


def find_basicsr(hook: Any, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
    """The spec of ``basicsr`` that Python would have found without ``hook``, or None.

    Importing it also registers the plugin, and then removes ``hook`` from ``sys.meta_path``.
    """
    finders = [finder for finder in sys.meta_path if finder is not hook and hasattr(finder, 'find_spec')]
    specs = (finder.find_spec('basicsr', path, target) for finder in finders)
    spec = next((spec for spec in specs if spec is not None), None)
    if spec is not None and spec.loader is not None:  # without: a mere folder called basicsr, somewhere on sys.path
        _attempt(functools.partial(_surround, spec.loader, hook))
    return spec


def _surround(loader: Any, hook: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        _attempt(_prepare)
        execute(module)
        # Only now: a spec may be looked up without being imported, and an import may fail and be tried again.
        if hook in sys.meta_path:
            sys.meta_path.remove(hook)
        _register()

    loader.exec_module = exec_module


def _prepare() -> None:
    from mssr_basicsr.adapter import compat

    compat.before_import()


def _register() -> None:
    global _registered
    if not _registered:
        _registered = True  # first, because the modules call load_basicsr() themselves
        _attempt(_repair)
        for name in REGISTERING:  # each by itself: a copy of BasicSR may lack what one of them needs
            _attempt(functools.partial(importlib.import_module, name), name)


def _repair() -> None:
    from mssr_basicsr.adapter import compat

    compat.after_import()


def _attempt(step: Callable[[], Any], part: str = 'the mssr_basicsr plugin') -> None:
    """If anything is wrong with a part of the plugin, BasicSR continues without it, and the user is told why."""
    try:
        step()
    except Exception as error:
        message = f'BasicSR continues without {part}: {type(error).__name__}: {error}'
        warnings.warn(message, RuntimeWarning, stacklevel=1)  # one place, so that Python says the same thing once
