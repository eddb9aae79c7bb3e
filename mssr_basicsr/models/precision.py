"""How networks compute in training: in bf16 as far as torch's autocast does so, and with channels-last features.

Parameters, and so gradients, optimizer states, EMA and files, stay float32 and contiguous: only the inputs of the
network's operations change. A convolution adopts the layout of its input, whatever that of its weight, so converting
the input converts the whole network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.patching import replaced


@contextmanager
def computing(
    networks: Iterable[nn.Module], device: torch.device, precision: str, channels_last: bool = False
) -> Iterator[None]:
    """While the context is open, each of ``networks`` takes the same inputs as before but computes as follows.

    Args:
        networks: without wrappers. Their outputs are float32 and contiguous, as without this.
        device: where they are.
        precision: ``bf16`` runs them under ``torch.autocast``; ``fp32`` changes nothing.
        channels_last: whether four-dimensional inputs are converted to the ``channels_last`` memory format.

    Raises:
        OptionError: when a network runs that does not support ``channels_last``.
    """
    with ExitStack() as stack:
        if precision != 'fp32' or channels_last:
            for network in networks:
                forward = _forward_computing(network, device, precision, channels_last)
                stack.enter_context(replaced(network, 'forward', forward))
        yield


def _forward_computing(network: nn.Module, device: torch.device, precision: str, channels_last: bool) -> Any:
    original = network.forward

    def forward(*inputs: Any, **keywords: Any) -> Any:
        if channels_last:
            inputs = _in_channels_last(network, inputs)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16'):
                output = original(*inputs, **keywords)
        except RuntimeError as error:
            if channels_last and 'view size is not compatible' in str(error):
                allowed = f'false for this network (a tensor.view() in the code of {_type(network)} requires it)'
                raise OptionError('train.channels_last', True, allowed) from error
            raise
        return _as_float32(output)

    return forward


def _in_channels_last(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images = [isinstance(x, Tensor) and x.ndim == 4 for x in inputs]
    if not any(images):
        raise OptionError('train.channels_last', True, f'false, since {_type(network)} takes no (N, C, H, W) input')
    return tuple(x.contiguous(memory_format=torch.channels_last) if four else x for x, four in zip(inputs, images))


def _type(network: nn.Module) -> str:
    return type(getattr(network, 'backbone', network)).__name__


def _as_float32(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float().contiguous() if output.is_floating_point() else output
    if isinstance(output, (list, tuple)):
        make = getattr(type(output), '_make', type(output))  # a namedtuple takes its fields one by one
        return make(_as_float32(item) for item in output)
    if isinstance(output, dict):
        return {key: _as_float32(value) for key, value in output.items()}
    return output


def lacks_bf16(device: torch.device) -> bool:
    """Whether ``device`` is known to have no bf16 arithmetic, so that bf16 is slower there than fp32.

    For CPUs, this is only known on Linux.
    """
    if device.type == 'cuda':
        return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    features = Path('/proc/cpuinfo')
    # x86 has avx512_bf16 or amx_bf16, ARM has bf16 (of SVE, svebf16).
    return features.is_file() and 'bf16' not in features.read_text()
