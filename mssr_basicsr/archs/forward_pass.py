"""Recording a network's forward passes, so that the network from which it learns can be given the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ForwardPass:
    """The inputs of one forward pass, as the model class gave them: padded, or under torch's autocast."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]  #: inputs by keyword
    device_type: str
    autocast: bool
    dtype: torch.dtype  #: autocast's

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which networks compute as this one did."""
        return torch.autocast(self.device_type, self.dtype, self.autocast)

    def repeated_by(self, network: nn.Module) -> Any:
        """What ``network`` makes of the same inputs."""
        with self.precision():
            return network(*self.inputs, **self.keywords)


@contextmanager
def record_passes(network: nn.Module) -> Iterator[list[ForwardPass]]:
    """While the context is open, keep every forward pass of ``network``."""
    passes: list[ForwardPass] = []

    def keep(network: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kind = next(network.parameters()).device.type
        autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        passes.append(ForwardPass(inputs, keywords, kind, autocast, dtype))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def only_pass(passes: list[ForwardPass]) -> ForwardPass:
    """The one forward pass of an iteration; RuntimeError if there was not just one."""
    if len(passes) != 1:
        raise RuntimeError(f'the network runs {len(passes)} times in an iteration')
    return passes[0]
