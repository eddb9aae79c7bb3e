"""Building a backbone from the options in a file, without letting them allocate more than the file accounts for."""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mssr_basicsr.foundation.buffers import buffer_tree
from mssr_basicsr.foundation.checks import find_registered
from mssr_basicsr.foundation.on_demand import require_basicsr
from mssr_basicsr.foundation.patching import replaced
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.header import Header
from mssr_basicsr.scalable.values import DTYPE_NAMES, TORCH_DTYPES

#: What buffers that an architecture computes, such as attention masks, may take: they are not in the file.
MAX_COMPUTED_BYTES = 1 << 26
# A word such as 'pixelshuffledirect' or 'nearest+conv'. No option of a file is ever a path.
_WORD = re.compile(r'[\w+-]{0,64}')
# What architectures load and download weights with. torchvision has a reference of its own to the second; what other
# references to it lead to is the third.
_LOADERS = (
    ('torch', 'load'),
    ('torch.hub', 'load_state_dict_from_url'),
    ('torch.hub', 'download_url_to_file'),
    ('torchvision.models._api', 'load_state_dict_from_url'),
)
# Held while they are replaced: two threads at once would each put back what the other has put there.
_loaders_lock = threading.RLock()


def build_backbone(options: Mapping[str, Any]) -> nn.Module:
    """The architecture that ``options`` name, on the CPU, in eval mode; torch's random state is not changed.

    Raises:
        ScalableFileError: there is no such architecture, or it does not accept these options.
        MissingPackageError: BasicSR, which has the architectures, is not installed.
    """
    require_basicsr(f'to build {options["type"]} (or give a network that you have built)')
    from basicsr.utils.registry import ARCH_REGISTRY

    _refuse_paths(options)
    arguments = dict(options)
    name = arguments.pop('type')
    architecture = find_registered(ARCH_REGISTRY, name)
    if architecture is None:
        message = f'backbone: {name} is not registered with BasicSR; first import the package that registers it'
        raise ScalableFileError(f'{message} (mssr ... --import MODULE)')
    with torch.random.fork_rng(devices=[]), _torchs_own_defaults(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid')  # of BasicSR's SwinIR: nothing that a user could change
        try:
            network: nn.Module = architecture(**arguments)
        except _TooLarge as error:
            raise ScalableFileError(f'backbone: {name}({arguments}) is not what the header lists ({error})') from error
        except Exception as error:  # whatever an architecture does with options that it was not made for
            raise ScalableFileError(f'backbone: {name}({arguments}): {type(error).__name__}: {error}') from error
    return network.eval().requires_grad_(True)


@contextmanager
def _torchs_own_defaults() -> Iterator[None]:
    """While the context is open, new tensors are float32 and on the CPU, whatever the program has made the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device('cpu'):
            yield
    finally:
        torch.set_default_dtype(before)


def without_weight_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's options without the files from which it would load initial weights, such as ``spynet_path``.

    These are the options that end in ``_path``. They are not needed when all weights of the network are available.
    """
    return {key: value for key, value in options.items() if not key.endswith('_path')}


def build_for(header: Header, size: int) -> nn.Module:
    """The backbone of a file of which the first ``size`` bytes are present.

    Raises:
        ScalableFileError: as :func:`build_backbone`; or the network that the header describes is implausibly large for
            the file, or is not the one that the options give; or its architecture loads weights from anywhere else.
    """
    elements = _plausible_elements(header, size)
    largest = max(tensor.numel for tensor in header.weights + header.others)
    computed = MAX_COMPUTED_BYTES if header.computed else 0
    listed = len(header.weights + header.others) + len(header.computed)
    limit = AllocationLimit(
        single=max(8 * largest, computed), total=16 * elements + 2 * computed + (1 << 16), tensors=4 * listed + 64
    )
    with limit, loading_refused():
        network = build_backbone(header.backbone)
    check_network(header, network)
    return network


@contextmanager
def loading_refused() -> Iterator[None]:
    """While the context is open, this thread can neither load nor download weights with torch; other threads can.

    A file has all weights of its network. To load others, an architecture may need no option: one of BasicSR's looks
    for them in the current folder.
    """
    refused = {threading.get_ident()}

    def refusing(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() in refused:
                raise PermissionError('a network in a file has its weights there; no others are loaded or downloaded')
            return load(*args, **kwargs)

        return checked

    with _loaders_lock, ExitStack() as stack:
        stack.callback(refused.clear)  # a module imported meanwhile may have kept what refuses
        for module, name in _LOADERS:
            owner = sys.modules.get(module)
            if hasattr(owner, name):
                stack.enter_context(replaced(owner, name, refusing(getattr(owner, name))))
        yield


def tensors_of(header: Header, size: int) -> nn.Module:
    """Not a backbone, but a module with its weights and others, all zero: enough to read a level without BasicSR.

    Args:
        header: of a file of which the first ``size`` bytes are present.
        size: in bytes.

    Raises:
        ScalableFileError: implausibly large for the file, or with names that no network can have.
    """
    _plausible_elements(header, size)
    with _torchs_own_defaults():
        zeros = {info.name: torch.zeros(info.shape) for info in header.weights}
        zeros |= {info.name: torch.zeros(info.shape, dtype=TORCH_DTYPES[info.dtype]) for info in header.others}
    try:
        return buffer_tree({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in zeros.items()})
    except KeyError as error:
        raise ScalableFileError(f'weights, others: no network can have such names ({error})') from error


def _plausible_elements(header: Header, size: int) -> int:
    """The number of elements that the header lists; ScalableFileError if it is implausible for so short a file."""
    elements = sum(tensor.numel for tensor in header.weights + header.others)
    if header.dtype == 'I8':
        elements += sum(weight.shape[0] for weight in header.weights)  # scales, even of channels without elements
    # A whole file has every weight. What precedes the larger levels of a file may be small, but not arbitrarily.
    if elements > 256 * size:
        raise ScalableFileError(f'a network of {elements:,} weights is implausible in a file of {size:,} bytes')
    return elements


def check_network(header: Header, network: nn.Module) -> None:
    """Raise ScalableFileError unless ``network`` has the tensors, and the computed buffers, that the header lists."""
    state = network.state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    listed = {tensor.name: tensor.shape for tensor in header.weights + header.others}
    listed.update({name: found.get(name, ()) for name in header.computed})
    if found != listed:
        differing = sorted(set(found.items()) ^ set(listed.items()))[:3]
        raise ScalableFileError(f'the network does not match the header; it differs in {differing}')
    for other in header.others:
        if DTYPE_NAMES.get(state[other.name].dtype) != other.dtype:
            raise ScalableFileError(
                f'{other.name}: {state[other.name].dtype} in the network; the header says {other.dtype}'
            )
    buffers = {name for name, buffer in network.named_buffers() if buffer.dtype in DTYPE_NAMES}
    for name in header.computed:
        if name not in buffers:
            raise ScalableFileError(f'computed: found {name!r}; allowed: buffers of the network')
    if header.computed and computed_checksum(network, header.computed) != header.computed_checksum:
        raise ScalableFileError(f'this {type(network).__name__} computes other buffers than the packed one')


def computed_checksum(network: nn.Module, names: tuple[str, ...]) -> str:
    """The XXH64 of names, types, shapes and bytes of the buffers ``names``, in hex."""
    checksum, buffers = xxhash.xxh64(), dict(network.named_buffers())
    for name in names:
        buffer = buffers[name].detach().cpu().contiguous()
        sizes = ''.join(f' {size}' for size in buffer.shape)
        checksum.update(f'{name} {DTYPE_NAMES[buffer.dtype]}{sizes}\n'.encode())
        checksum.update(buffer.flatten().view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


def _refuse_paths(value: Any, path_option: str = '') -> None:
    """Raise ScalableFileError if a text could be a path: it is no word, or within an option called one.

    Even a word is the name of a file in the current folder. A number is none, such as a ``drop_path``, which is a rate.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_paths(key)
            _refuse_paths(item, path_option or (key if str(key).lower().endswith('path') else ''))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_paths(item, path_option)
    elif isinstance(value, str) and not _WORD.fullmatch(value):
        raise ScalableFileError(f'backbone: found {value[:80]!r}; allowed: words of letters, digits, _, + and -')
    elif isinstance(value, str) and path_option:
        raise ScalableFileError(f'backbone: {path_option}: found {value!r}; allowed: null, since it could be a path')


class _TooLarge(Exception):
    """An architecture needs more memory, or more tensors, than the header accounts for."""


class AllocationLimit(TorchDispatchMode):
    """While the context is open, no new tensor may exceed ``single`` bytes, nor all together ``total`` bytes.

    There may be at most ``tensors`` of them: without elements, they take no memory, but time.
    """

    def __init__(self, single: int, total: int, tensors: int) -> None:
        super().__init__()
        self.single, self.left, self.tensors_left = single, total, tensors

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(argument, Tensor) for argument in args):
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the tensor that ``func`` makes of numbers alone; the meta device tells its size."""
        wanted = func(*args, **{**kwargs, 'device': torch.device('meta')}) if 'device' in kwargs else None
        if isinstance(wanted, Tensor):
            size = math.prod(wanted.shape) * wanted.element_size()
            self.left -= size
            self.tensors_left -= 1
            if self.tensors_left < 0:
                raise _TooLarge('more tensors')
            if size > self.single or self.left < 0:
                raise _TooLarge(f'a tensor of {size:,} bytes')
