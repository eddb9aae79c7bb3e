"""Gradient checkpointing: what a network computes again in the backward pass, it computes under the same conditions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any, Callable

import torch.utils.checkpoint
from torch import nn

from mssr_basicsr.foundation.checks import OptionError

_Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]

#: What ``torch.utils.checkpoint`` calls for the contexts of a forward pass and its repetition, in each thread.
_contexts: ContextVar[Callable[[], _Contexts]] = ContextVar('contexts', default=lambda: (nullcontext(), nullcontext()))


@contextmanager
def recomputed_within(condition: Callable[[], AbstractContextManager[None]], network: nn.Module) -> Iterator[None]:
    """While the context is open, ``condition()`` is too, and again whenever parts of ``network`` are computed again.

    A network that uses ``torch.utils.checkpoint`` runs parts of itself again in the backward pass, when the masked
    weights that its forward pass had are no longer in it. torch takes a context for that, though only in the variant
    without reentrant autograd, which gives the same gradients: so in here that is the default.

    Raises:
        OptionError: the network asks for the reentrant variant.
    """
    token = _contexts.set(lambda: (nullcontext(), _Repeatable(lambda: recomputed_within(condition, network))))
    try:
        with _without_reentrance, condition():
            yield
    except ValueError as error:
        if 'use_reentrant' not in str(error):
            raise
        where = 'torch.utils.checkpoint without use_reentrant=True (the default of checkpoint_sequential)'
        raise OptionError('network_g.backbone', type(network).__name__, f'a network that uses {where}') from error
    finally:
        _contexts.reset(token)


class _Repeatable(AbstractContextManager[None]):
    """A context manager that can be entered repeatedly, as torch does for a second backward pass.

    Each time it opens a new ``make()``.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


class _WithoutReentrance:
    """While it is entered, in any thread, ``torch.utils.checkpoint`` has our defaults.

    They are changed, and not the function, because architectures have bound it by names of their own.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._num_entered = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_entered == 0:
                self._checkpoint: Any = inspect.unwrap(torch.utils.checkpoint.checkpoint)
                self._defaults = self._checkpoint.__kwdefaults__
                ours = {'use_reentrant': False, 'context_fn': lambda: _contexts.get()()}
                self._checkpoint.__kwdefaults__ = {**self._defaults, **ours}
            self._num_entered += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_entered -= 1
            if self._num_entered == 0:
                self._checkpoint.__kwdefaults__ = self._defaults


_without_reentrance = _WithoutReentrance()
