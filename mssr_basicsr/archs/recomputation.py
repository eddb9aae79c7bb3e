"""Gradient checkpointing: what a network computes again in the backward pass, it computes under the same conditions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Callable

import torch.utils.checkpoint
from torch import nn

from mssr_basicsr.foundation.checks import OptionError


@contextmanager
def recomputed_within(condition: Callable[[], AbstractContextManager[None]], network: nn.Module) -> Iterator[None]:
    """While the context is open, ``condition()`` is too, and again whenever parts of ``network`` are computed again.

    A network that uses ``torch.utils.checkpoint`` runs parts of itself again in the backward pass, when the masked
    weights that its forward pass had are no longer in it. torch takes a context for that, though only in the variant
    without reentrant autograd, which gives the same gradients: so in here that is the default. Defaults are changed,
    not the function, because architectures have bound it by names of their own.

    Raises:
        OptionError: the network asks for the reentrant variant.
    """
    checkpoint: Any = inspect.unwrap(torch.utils.checkpoint.checkpoint)
    defaults = checkpoint.__kwdefaults__

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), condition()

    checkpoint.__kwdefaults__ = {**defaults, 'use_reentrant': False, 'context_fn': contexts}
    try:
        with condition():
            yield
    except ValueError as error:
        if 'use_reentrant' not in str(error):
            raise
        allowed = 'a network whose code does not call torch.utils.checkpoint with use_reentrant=True'
        raise OptionError('network_g.backbone', type(network).__name__, allowed) from error
    finally:
        checkpoint.__kwdefaults__ = defaults
