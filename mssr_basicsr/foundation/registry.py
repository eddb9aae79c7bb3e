"""Registries: users add functions and classes with a decorator and select them by name in their options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Registry:
    """Named functions or classes of one kind. It is used like BasicSR's registries, but does not need BasicSR.

    Args:
        kind: what is registered, for error messages: ``criterion``.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, Any] = {}

    def register(self, entry: Any = None) -> Any:
        """Register a function or a class under its own name: ``@registry.register()``, or ``registry.register(entry)``.

        Raises:
            KeyError: the name is taken.
        """
        if entry is None:
            return self.register
        name = entry.__name__
        if name in self._entries:
            raise KeyError(f'a {self._kind} called {name} is already registered')
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> Any:
        """What is registered as ``name``; KeyError if nothing is."""
        if name not in self._entries:
            raise KeyError(f'no {self._kind} is called {name}; registered: {", ".join(sorted(self._entries))}')
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
