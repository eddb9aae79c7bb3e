"""Packages that only some functions need: imported on demand, with one clear error if they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingPackageError(ValueError):
    """A package is needed that is not installed; the text says which, what for, and how to get it."""


def require_basicsr(purpose: str) -> None:
    """Import BasicSR with the plugin registered: the only way for lower floors, which do without BasicSR, to reach it.

    Args:
        purpose: what it is needed for, as in the error message: ``to build EDSR``.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        import_module('mssr_basicsr.adapter.discovery').load_basicsr()
    except ImportError as error:
        raise MissingPackageError(f'{purpose}, basicsr is needed ({error}): pip install basicsr') from error


def optional_package(name: str, extra: str) -> Any:
    """The package ``name``, which ``pip install "mssr-basicsr[extra]"`` installs; MissingPackageError without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackageError(f'{name} is needed ({error}): pip install "mssr-basicsr[{extra}]"') from error
