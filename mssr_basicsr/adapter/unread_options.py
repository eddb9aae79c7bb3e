"""Nothing in the YAML is silently ignored: neither misspelt options nor options that no class reads.

The code tells which options it reads. BasicSR's model and dataset classes look up options by name where they need them,
some only in a later phase of training; but every name occurs in their code as a string. A name that occurs nowhere is
not read. What BasicSR passes on as arguments, such as a loss's options, the class or function that takes them checks.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from types import CodeType, ModuleType
from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.registry import DATASET_REGISTRY, METRIC_REGISTRY

from mssr_basicsr.adapter.stage_options import BackwardOptions, ForwardOptions, ValidationOptions
from mssr_basicsr.adapter.training_script import NUM_BATCHES
from mssr_basicsr.foundation.bytecode import codes_in
from mssr_basicsr.foundation.checks import OptionError, closest, find_registered, without_suffix

# YAML reads 1e-4 as a string: a number with an exponent needs a point, 1.0e-4.
_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+')
_NAMES = ('name', 'suffix', 'type')  # their values are words, whatever they look like

_PIPELINES = ('train', 'test', 'models', 'utils.options', 'utils.misc', 'utils.logger', 'utils.dist_util')
_DATA_PIPELINES = ('data', 'data.data_sampler', 'data.prefetch_dataloader')

# BasicSR's pipelines look for these within the names of options; they are no options themselves.
_PARTS_OF_PATHS = {'pretrain_network', 'strict_load', 'param_key', 'resume'}

#: MSSR's own options under ``train``, by the stage that reads them.
STAGE_OPTIONS = {
    'MSSRForwardModel': {field.name for field in dataclasses.fields(ForwardOptions)},
    'MSSRBackwardModel': {field.name for field in dataclasses.fields(BackwardOptions)},
}
_VALIDATION_OPTIONS = {field.name for field in dataclasses.fields(ValidationOptions)}


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
    """Report every option that nothing reads, in a section of the YAML in which BasicSR would ignore it.

    These sections are the top level, ``train``, ``path``, ``val`` with its metrics, ``logger`` and ``datasets``.

    Args:
        opt: the whole YAML.
        model_type: the MSSR model that it names.
        base: the model class that this one extends.

    Raises:
        OptionError: an unread option is almost one of MSSR's own or belongs to the other stage, or a metric does not
            take one of its options. All other unread options together give one warning.
    """
    of_pipelines = set(_strings_in_code(_modules(_PIPELINES)))
    program = sys.modules.get('__main__')
    of_model = set(_strings_in_code([*_modules_of(base), *([program] if program else [])]))
    read = of_pipelines | of_model
    own = STAGE_OPTIONS.get(model_type, set())
    for other, options in STAGE_OPTIONS.items():
        for key in (opt.get('train') or {}).keys() & (options - own):
            raise OptionError(f'train.{key}', opt['train'][key], f'nothing, since only {other} reads it: remove it')
    unread = [
        *_unread('', opt, read, {'base_model_type'}),
        *_unread('train.', opt.get('train'), read, own),
        *_unread('path.', opt.get('path'), (of_pipelines - _PARTS_OF_PATHS) | of_model),
        *_unread('val.', opt.get('val'), read, _VALIDATION_OPTIONS),
        *_unread('logger.', opt.get('logger'), read),
        *_unread('logger.wandb.', (opt.get('logger') or {}).get('wandb'), read),
    ]
    read_of_data = read | {NUM_BATCHES} | set(_strings_in_code(_modules(_DATA_PIPELINES)))
    for phase, data in (opt.get('datasets') or {}).items():
        dataset = find_registered(DATASET_REGISTRY, data.get('type'))
        if inspect.isclass(dataset):
            unread += _unread(f'datasets.{phase}.', data, read_of_data | set(_strings_in_code(_modules_of(dataset))))
    for name, metric_opt in ((opt.get('val') or {}).get('metrics') or {}).items():
        unread += _unread_by_metric(f'val.metrics.{name}.', metric_opt, of_model)
    if unread:
        get_root_logger().warning(
            f'{model_type} with {base.__name__} reads none of these options: {", ".join(unread)}.'
        )


def report_comparison_of_type(opt: Mapping[str, Any], base: type) -> None:
    """Warn if ``base`` may look for the backbone's type in ``network_g.type``.

    A model class finds the backbone's other options in ``network_g``, as without MSSR, but the type is MSSR's own.
    """
    backbone = (opt.get('network_g') or {}).get('backbone')
    named = backbone.get('type') if isinstance(backbone, Mapping) else None
    if named in set(_strings_in_code(_modules_of(base))):
        get_root_logger().warning(
            f'{base.__name__} names {named} in its code. If it compares network_g.type with that, it finds MSSR there; '
            "the backbone's is network_g.backbone.type."
        )


def _unread(section: str, found: Any, read: Set[str], ours: Set[str] = frozenset()) -> Iterator[str]:
    """The options in ``found`` that are neither ``read`` nor ``ours``, each with the nearest that is."""
    for key in map(str, found if isinstance(found, Mapping) else ()):
        if key in read or key in ours:
            continue
        nearest = closest(key, read | ours)
        if nearest in ours:
            raise OptionError(f'{section}{key}', found[key], f'{section}{nearest} (there is no option {key})')
        yield f'{section}{key}' + (f' (the nearest that is read is {nearest})' if nearest else '')


def _unread_by_metric(section: str, found: Any, of_model: Set[str]) -> Iterator[str]:
    """As :func:`_unread`, for the options of a metric, which BasicSR passes to a function.

    One that BasicSR does not know may be the model class's own, whose strings are ``of_model``.
    """
    if not isinstance(found, Mapping):
        raise OptionError(section[:-1], found, 'a mapping with the type and the options of a metric')
    metric = find_registered(METRIC_REGISTRY, found.get('type'))
    if metric is None:
        nearest = closest(str(found.get('type')), without_suffix(name for name, _ in METRIC_REGISTRY))
        if nearest is not None and found['type'] not in of_model:
            raise OptionError(f'{section}type', found['type'], nearest)
        return
    parameters = inspect.signature(metric, follow_wrapped=False).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    named -= {'img', 'img2'}  # the images, which BasicSR passes as well
    collected = next((parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD), None)
    if collected is None:
        for key in [key for key in found if key not in {*named, 'type'}]:
            allowed = closest(key, named) or f'nothing ({found["type"]} takes {", ".join(sorted(named))})'
            raise OptionError(f'{section}{key}', found[key], allowed)
    elif not _uses(metric, collected):
        yield from _unread(section, found, named | {'type', 'better'})  # better is also BasicSR's own


def _uses(function: Any, variable: str) -> bool:
    """Whether the code of ``function`` uses its local ``variable``; True for what has no code to look at."""
    code = getattr(function, '__code__', None)
    return code is None or any(variable == one.argval for one in dis.get_instructions(code))


def _modules(names: Iterable[str]) -> list[ModuleType]:
    """The modules of BasicSR of these names; copies that other projects have may lack some."""
    return [sys.modules[f'basicsr.{name}'] for name in names if f'basicsr.{name}' in sys.modules]


def _modules_of(one: type) -> list[ModuleType]:
    """The modules in which ``one`` and its base classes are defined."""
    modules = [inspect.getmodule(base) for base in one.__mro__ if base is not object]
    return [module for module in modules if module is not None]


def _strings_in_code(modules: Iterable[ModuleType]) -> Iterator[str]:
    """Every string in the code of the functions and classes that the modules define."""
    for module in set(modules):
        for value in vars(module).values():
            if getattr(value, '__module__', None) == vars(module)['__name__']:
                functions = vars(value).values() if inspect.isclass(value) else [value]
                for function in functions:
                    # Properties, class and static methods and partials are not functions, but contain one.
                    inner = (getattr(function, name, None) for name in ('fget', '__func__', 'func'))
                    function = next((one for one in inner if one is not None), function)
                    code = getattr(inspect.unwrap(function) if callable(function) else function, '__code__', None)
                    if code is not None:
                        yield from _strings_in(code)


def _strings_in(code: CodeType) -> Iterator[str]:
    for constant in (constant for part in codes_in(code) for constant in part.co_consts):
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (item for item in constant if isinstance(item, str))
