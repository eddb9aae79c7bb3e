"""Refusing wrong options: one clear error that names the option, what was found and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, TypeVar

Options = TypeVar('Options')
_SUFFIX = '_basicsr'  # what BasicSR's registries may append to the names of its own classes


class OptionError(ValueError):
    """A wrong value of an option, in the YAML, on the command line or in a call.

    The text is ``<option>: found <value>; allowed: <what is allowed>.``
    """

    def __init__(self, option: str, found: object, allowed: str) -> None:
        found = dict(found) if isinstance(found, Mapping) else found
        super().__init__(f'{option}: found {found!r}; allowed: {allowed}.')


def option(help: str, check: Callable[[str, Any], Any] | None = None, default: Any = None) -> Any:
    """A field of an options dataclass: the one place where an option of the YAML is declared.

    Args:
        help: what the option does, for people.
        check: ``check(name, found)`` returns the option's value, or raises :class:`OptionError`. It also sees the
            default. Without a check, whoever uses the option checks it.
        default: the value if the YAML does not have the option.
    """
    return dataclasses.field(default=default, metadata={'help': help, 'check': check})


def read_options(declared: type[Options], section: str, found: Mapping[str, Any]) -> Options:
    """The options that the dataclass ``declared`` declares, taken out of ``found``, a section of the YAML.

    Raises:
        OptionError: a check rejects a value.
    """
    values = {}
    for field in dataclasses.fields(declared):  # type: ignore[arg-type]
        value, check = found.get(field.name, field.default), field.metadata['check']
        values[field.name] = value if check is None else check(f'{section}.{field.name}', value)
    return declared(**values)


def first_line(error: Exception) -> str:
    """The first line of an error's text (torch's have many), or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that ``name`` most likely misspells, None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, 0.75)), None)


def without_suffix(registered: Iterable[str]) -> list[str]:
    """The names in a registry of BasicSR's as a YAML has them, sorted."""
    return sorted({name[: -len(_SUFFIX)] if name.endswith(_SUFFIX) else name for name in registered})


def nearest_first(found: Any, registered: Iterable[str]) -> str:
    """The names in a registry of BasicSR's as a text, sorted; if ``found`` misspells one, that one comes first."""
    names = without_suffix(registered)
    nearest = closest(str(found), names)
    return ', '.join(names) if nearest is None else f'{nearest}; or else {", ".join(names)}'


def find_registered(registry: Any, name: Any) -> Any:
    """The class or function that one of BasicSR's registries has as ``name``, with or without its suffix; or None."""
    return next((registry.get(key) for key in (name, f'{name}{_SUFFIX}') if key in registry), None)


def require_one_of(option: str, found: Any, allowed: Iterable[str]) -> str:
    """``found``; :class:`OptionError` unless it is one of the names ``allowed``."""
    names = sorted(allowed)
    if found not in names:
        raise OptionError(option, found, ', '.join(names))
    return str(found)


def require_type(option: str, found: Any, names: Iterable[str], allowed: str) -> None:
    """Raise :class:`OptionError` unless ``found`` is a mapping of options whose ``type`` is one of ``names``."""
    if not isinstance(found, Mapping) or 'type' not in found:
        raise OptionError(option, found, allowed)
    require_one_of(f'{option}.type', found['type'], names)


def require_bool(option: str, found: Any) -> bool:
    """``found``; :class:`OptionError` unless it is true or false."""
    if not isinstance(found, bool):
        raise OptionError(option, found, 'true, false')
    return found


def is_number(found: Any) -> bool:
    """Whether ``found`` is an int or a float; true and false are none."""
    return isinstance(found, (int, float)) and not isinstance(found, bool)


def require_int(option: str, found: Any, low: int, high: float = float('inf'), note: str = '') -> int:
    """``found`` as an int; :class:`OptionError` unless it is a whole number (5e3 is one) in [low, high]."""
    whole = is_number(found) and math.isfinite(found) and found == int(found)
    if not whole or not low <= found <= high:
        bounds = f'a whole number of at least {low}' if high == float('inf') else f'a whole number from {low} to {high}'
        raise OptionError(option, found, bounds + note)
    return int(found)


def require_folder(option: str, found: Path) -> None:
    """Raise :class:`OptionError` unless ``found`` is a folder."""
    if not found.is_dir():
        raise OptionError(option, str(found), 'a folder of images')


def require_iterations(option: str, found: Any, num_levels: int) -> list[int]:
    """The iterations of each of ``num_levels`` levels: ``found`` is one whole number for all, or a list."""
    if not isinstance(found, (list, tuple)):
        return [require_int(option, found, 1, note=f', or a list of {num_levels}')] * num_levels
    if len(found) != num_levels:
        raise OptionError(option, found, f'a whole number, or a list of {num_levels} (one per trained level)')
    return [require_int(f'{option}[{i}]', num_iter, 1) for i, num_iter in enumerate(found)]


@contextmanager
def arguments_checked(option: str, found: Mapping[str, Any], built: Any) -> Iterator[None]:
    """Turn the TypeError of calling the class ``built`` with the arguments ``found`` into an OptionError.

    An argument that does not exist is named, with those that do.
    """
    try:
        yield
    except TypeError as error:
        parameters = inspect.signature(built).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [key for key in found if key not in ('type', *parameters)]
        if unknown and not takes_any:
            allowed = closest(unknown[0], parameters) or 'nothing'
            reason = f'{built.__name__} takes {", ".join(parameters) or "nothing"}'
            raise OptionError(f'{option}.{unknown[0]}', found[unknown[0]], f'{allowed} ({reason})') from error
        raise OptionError(option, found, f'the arguments of {built.__name__} ({error})') from error


def match_names(option: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The ``names`` (in their order) that match one of the shell-style ``patterns``.

    Raises:
        OptionError: ``patterns`` is not a list of strings, or one of them matches nothing; the text lists the names.
    """
    is_list = isinstance(patterns, (list, tuple))
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(option, patterns, 'a list of patterns such as ["body.*"]')
    for i, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(f'{option}[{i}]', pattern, 'a pattern that matches one of ' + ', '.join(names))
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
