"""Errors that name data which cannot be trained on: BasicSR's own name neither the folder nor the file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Callable

from mssr_basicsr.foundation.checks import OptionError, first_line
from mssr_basicsr.foundation.patching import patch

_INIT, _GETITEM = '__init__', '__getitem__'
_ITEM = 'mssr_basicsr_item'  # an exception's attribute, from the innermost dataset to where the reading began


class UnreadableImageError(ValueError):
    """An image that cannot be read; the text names its files.

    A data loader's worker sends only an exception's type and text, from which it is built anew: there is nothing else
    in it.
    """


def datasets_name_files(get: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps a registry's ``get``: a dataset without images, or with one that cannot be read, is an error that names it.

    BasicSR divides by the number of images, and does not check whether OpenCV could decode one.
    """
    dataset = get(*args, **kwargs)
    for name, wrapper in ((_INIT, refuse_empty_dataset), (_GETITEM, name_unreadable_image)):
        if isinstance(dataset, type) and hasattr(dataset, name):
            patch(dataset, name, wrapper)
    return dataset


def refuse_empty_dataset(
    init: Callable[..., Any], dataset: Any, opt: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """Wraps ``__init__`` of a dataset: OptionError, which names the folders, if there is nothing in it."""
    init(dataset, opt, *args, **kwargs)
    if _is_own(init, _INIT, dataset) and hasattr(dataset, '__len__') and len(dataset) == 0:
        folders = {key: value for key, value in opt.items() if key.startswith('dataroot')}
        raise OptionError(f'datasets.{opt.get("phase")}', folders, 'folders or LMDBs that contain images')


def name_unreadable_image(getitem: Callable[..., Any], dataset: Any, index: int) -> Any:
    """Wraps ``__getitem__`` of a dataset: an exception that nothing catches names the files of the item.

    A dataset may take its items from another one, or from itself, and go on if one cannot be read. It sees the
    exception as it is: only where the reading began is it replaced. The files are those of the innermost dataset.
    """
    if not _is_own(getitem, _GETITEM, dataset):
        return getitem(dataset, index)
    began_here = not _reading.get()
    token = _reading.set(True)
    try:
        return getitem(dataset, index)
    except (LookupError, UnreadableImageError):  # a missing option, or the end of an iteration; or all is said
        raise
    except Exception as error:
        item = vars(error)[_ITEM] = vars(error).get(_ITEM) or _item(dataset, index)
        if not began_here or item is None:
            raise
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise UnreadableImageError(f'{item} ({reason})') from error
    finally:
        _reading.reset(token)


def _item(dataset: Any, index: int) -> str | None:
    """What an error says of an item, if the dataset has a list of files."""
    items = next((getattr(dataset, name) for name in ('paths', 'keys') if hasattr(dataset, name)), None)
    if not isinstance(items, Sequence) or index not in range(-len(items), len(items)):
        return None
    item = items[index]
    files = ', '.join(f'{key} {path}' for key, path in item.items()) if isinstance(item, Mapping) else item
    opt = getattr(dataset, 'opt', None)
    phase = f'datasets.{opt.get("phase")}: ' if isinstance(opt, Mapping) else ''
    return f'{phase}cannot read {files}'


#: Whether a dataset is reading an item.
_reading: ContextVar[bool] = ContextVar('reading', default=False)


def _is_own(method: Callable[..., Any], name: str, dataset: Any) -> bool:
    """Whether ``method`` is what the class of ``dataset`` has as ``name``, and not one that it extends."""
    return inspect.unwrap(getattr(type(dataset), name)) is inspect.unwrap(method)
