"""Nothing in the YAML is silently ignored: neither misspelt options nor options that the model class never reads.

The code tells which options it reads. BasicSR's model classes look up options by name where they need them, some only
in a later phase of training; but every name occurs in their code as a string. A name that occurs nowhere is not read.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

from basicsr.utils import get_root_logger

from mssr_basicsr.adapter.stage_options import BackwardOptions, ForwardOptions
from mssr_basicsr.foundation.checks import OptionError, closest

# YAML reads 1e-4 as a string: a number with an exponent needs a point, 1.0e-4.
_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+')
_NAMES = ('name', 'suffix', 'type')  # their values are words, whatever they look like

_UTILITIES = ('utils.options', 'utils.misc', 'utils.logger', 'utils.dist_util')

#: MSSR's own options under ``train``, by the stage that reads them.
STAGE_OPTIONS = {
    'MSSRForwardModel': {field.name for field in dataclasses.fields(ForwardOptions)},
    'MSSRBackwardModel': {field.name for field in dataclasses.fields(BackwardOptions)},
}


def refuse_numbers_as_strings(options: Any, path: str = '') -> None:
    """Raise OptionError for a number that YAML has read as a string, such as ``1e-4``; it says what to write."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            if key not in _NAMES:
                refuse_numbers_as_strings(value, f'{path}.{key}' if path else str(key))
    elif isinstance(options, (list, tuple)):
        for i, value in enumerate(options):
            refuse_numbers_as_strings(value, f'{path}[{i}]')
    elif isinstance(options, str) and _NUMBER.fullmatch(options):
        raise OptionError(path, options, f'a number; YAML reads this as a string, write !!float {options}')


def report_unread_options(opt: Mapping[str, Any], model_type: str, base: type) -> None:
    """Report every option at the top level of the YAML and under ``train`` that nothing reads.

    Args:
        opt: the whole YAML.
        model_type: the MSSR model that it names.
        base: the model class that this one extends.

    Raises:
        OptionError: an unread option is one of MSSR's own: almost an option of this stage, or one of the other stage.
                All others together give one warning.
    """
    own, read = STAGE_OPTIONS.get(model_type, set()), set(_strings_in_code(base))
    unread = []
    for section, found in (('', opt), ('train.', opt.get('train') or {})):
        ours = own if section else {'base_model_type'}
        for key in map(str, found):
            if key in ours:
                continue
            for other, options in STAGE_OPTIONS.items():
                if section and key in options:
                    allowed = f'nothing, since only {other} reads it: remove it'
                    raise OptionError(f'train.{key}', found[key], allowed)
            if key in read:
                continue
            nearest = closest(key, ours | read)
            if nearest in ours:
                raise OptionError(f'{section}{key}', found[key], f'{section}{nearest} (there is no option {key})')
            unread.append(f'{section}{key}' + (f' (the nearest that is read is {nearest})' if nearest else ''))
    if unread:
        message = f'{model_type} with {base.__name__} reads none of these options: {", ".join(unread)}.'
        get_root_logger().warning(message)


def _strings_in_code(model_class: type) -> Iterator[str]:
    """Every string in the code of ``model_class``, its base classes and the modules that these are defined in.

    And in the code of BasicSR's pipelines, which read options as well.
    """
    modules = [inspect.getmodule(one) for one in model_class.__mro__ if one is not object]
    pipelines = [sys.modules[f'basicsr.{name}'] for name in ('train', 'test', 'models', *_UTILITIES)]
    for module in {*modules, *pipelines, sys.modules.get('__main__')} - {None}:
        for value in vars(module).values():
            if getattr(value, '__module__', None) == vars(module)['__name__']:
                functions = vars(value).values() if inspect.isclass(value) else [value]
                for function in functions:
                    code = getattr(inspect.unwrap(function) if callable(function) else function, '__code__', None)
                    if code is not None:
                        yield from _strings_in(code)


def _strings_in(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (item for item in constant if isinstance(item, str))
        elif isinstance(constant, CodeType):
            yield from _strings_in(constant)
