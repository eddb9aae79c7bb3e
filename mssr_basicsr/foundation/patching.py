"""Replacing a function of another package in place, permanently or temporarily."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable


def patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Make ``owner.name(...)`` call ``wrapper(<original>, ...)``; repeated calls have no further effect."""
    original = getattr(owner, name)
    applied: tuple[Callable[..., Any], ...] = getattr(original, 'mssr_basicsr_wrappers', ())
    if wrapper in applied:
        return

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patched.__dict__['mssr_basicsr_wrappers'] = (*applied, wrapper)
    setattr(owner, name, patched)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While the context is open, ``owner.name`` is ``value``.

    If ``owner`` does not have the attribute itself, but from its class or a base class, it does not have it afterwards.
    """
    missing = object()
    original = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if original is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
