"""Errors that name data which cannot be trained on: BasicSR's own name neither the folder nor the file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Callable

from mssr_basicsr.foundation.checks import OptionError, first_line
from mssr_basicsr.foundation.patching import patch

_INIT, _GETITEM = '__init__', '__getitem__'


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
    """Wraps ``__getitem__`` of a dataset: what it raises names the files of the item."""
    if not _is_own(getitem, _GETITEM, dataset) or _reading.get() is dataset:
        return getitem(dataset, index)
    token = _reading.set(dataset)
    try:
        return getitem(dataset, index)
    except Exception as error:
        items = next((getattr(dataset, name) for name in ('paths', 'keys') if hasattr(dataset, name)), None)
        named = isinstance(error, UnreadableImageError)  # by a dataset that this one takes its items from
        # An iteration over the dataset ends with an IndexError.
        if named or isinstance(error, IndexError) or not isinstance(items, Sequence):
            raise
        item = items[index]
        files = ', '.join(f'{key} {path}' for key, path in item.items()) if isinstance(item, Mapping) else item
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise UnreadableImageError(f'datasets.{dataset.opt.get("phase")}: cannot read {files} ({reason})') from error
    finally:
        _reading.reset(token)


#: The dataset that reads an item: it may ask itself for another one if it cannot, and must then see the error as it is.
_reading: ContextVar[Any] = ContextVar('reading', default=None)


def _is_own(method: Callable[..., Any], name: str, dataset: Any) -> bool:
    """Whether ``method`` is what the class of ``dataset`` has as ``name``, and not one that it extends."""
    return inspect.unwrap(getattr(type(dataset), name)) is inspect.unwrap(method)
