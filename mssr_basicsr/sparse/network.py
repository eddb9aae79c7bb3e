"""Whole networks on the sparse runtime, wherever its result is the same as torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial, wraps
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from mssr_basicsr.sparse.graph import Part, Segment, Step, names_read, plan, trace
from mssr_basicsr.sparse.layers import SparseConv2d, eligible
from mssr_basicsr.sparse.library import CONVOLUTION, kernel
from mssr_basicsr.sparse.program import Program
from mssr_basicsr.sparse.table import is_small

_hooks_of_all_modules = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
# What torch keeps in every module and its class: tensors, submodules and hooks, which are compared by other means.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {'training'}
_CLASSES_OF_EVERY_MODULE = set(nn.Module.__mro__)
_MAX_PROGRAMS = 64  # are kept: for a few sizes of images and tiles


class _Cache:
    """What is known of one module, in one thread: nothing but the graph is shared, so nothing else is locked."""

    def __init__(self) -> None:
        self.traced: fx.GraphModule | None = None
        self.parts: list[Part] | None = None
        self.last_reads: dict[int, list[str]] = {}
        self.state: Any = None
        self.programs: dict[Any, Program] = {}
        self.given_up: set[Any] = set()  # shapes of images that torch would broadcast, or lay out in another way
        self.arena = np.empty(0, np.uint8)

    def prepare(self, traced: fx.GraphModule) -> None:
        """Make ready to run this graph, with the layers' forms as they are."""
        self.programs.clear()
        self.given_up.clear()
        self.traced, self.parts = traced, plan(traced, runs_sparse)
        self.last_reads = _last_reads(self.parts)


class _Graph(NamedTuple):
    traced: fx.GraphModule | None  # None: it cannot be traced, which is not tried again
    modules: dict[str, ref[nn.Module]]  # of the network that was traced
    attributes: dict[tuple[Any, str], Any]  # of these modules and their classes, without those that a forward changes
    names: set[tuple[Any, str]]  # of all these attributes: what is new may hide one of the class, or a default
    mixes_images: bool | None = None  # of a batch, so that their results differ from those of each alone; None: unknown


class _Local(threading.local):
    def __init__(self) -> None:
        self.caches: WeakKeyDictionary[nn.Module, _Cache] = WeakKeyDictionary()


_local = _Local()
_graphs: WeakKeyDictionary[nn.Module, _Graph] = WeakKeyDictionary()
# Two tracers at once would each put back what the other has changed. But while a thread compares a graph with its
# network, it may come to a network in it, which has a graph of its own.
_graphs_lock = threading.RLock()
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def state_of_weights(module: nn.Module) -> list[Any]:
    """What is no longer equal once a weight or bias has changed, unless in place through ``.data``."""
    state: list[Any] = []
    for layer in module.modules():
        kept = layer.__dict__.get('kept')
        state.append(kept and ref(kept))
        tensors = [tensor for tensor in layer._parameters.values() if tensor is not None]
        state += [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
    return state


def _copied_weights(module: nn.Module) -> list[bytes]:
    """The few weights of which programs have copies, so that a change through ``.data``, too, is noticed.

    All others are either used where they are or, in the sparse form, cannot be changed.
    """
    return [
        layer.weight.detach().float().numpy().tobytes()
        for layer in module.modules()
        if isinstance(layer, nn.PReLU) or (type(layer) is nn.Conv2d and runs_sparse(layer))
    ]


def _cache_of(module: nn.Module) -> _Cache:
    """The module's cache, cleared if its weights have changed."""
    cache = _local.caches.setdefault(module, _Cache())
    state = [*state_of_weights(module), *_copied_weights(module)]
    if state != cache.state:
        cache.parts, cache.state = None, state
        cache.programs.clear()
        cache.given_up.clear()
    return cache


def runs_sparse(layer: nn.Module) -> bool:
    """Whether the kernel runs the layer: it is in sparse form, or so small that torch would not be faster."""
    if isinstance(layer, SparseConv2d):
        return eligible(layer)
    if not isinstance(layer, nn.Conv2d) or not eligible(layer):
        return False
    return is_small(layer.in_channels, layer.out_channels, layer.kernel_size[0])


def usable(module: nn.Module, x: Any) -> bool:
    """Whether the runtime supports this input: plain float32 images on the CPU, outside training and compilers."""
    return (
        type(x) is Tensor
        and (x.dtype, x.device.type, x.layout, x.ndim) == (torch.float32, 'cpu', torch.strided, 4)
        and x.numel() > 0
        and not module.training
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, jvp and the like
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())))
        and not any(p.is_inference() for p in module.parameters())  # whose changes cannot be noticed
        and kernel() is not None
    )


def _graph_of(network: nn.Module, x: Tensor) -> fx.GraphModule | None:
    """The network's graph, traced by whichever thread runs it first, and again when the network has been changed.

    None if there is none, or if it does not compute the same when it gets the images of the batch ``x`` one by one.
    """
    with _graphs_lock:
        known = _graphs.get(network)
        if known is None or not _is_current(known, network):
            known = _graphs[network] = _new_graph(network, x)
        if known.traced is not None and known.mixes_images is None and len(x) > 1:
            mixes = not _computes_the_same(known.traced, network, _unlike_images(x[0, :, :48, :48]))
            known = _graphs[network] = known._replace(mixes_images=mixes)
        return None if known.mixes_images and len(x) > 1 else known.traced


def _new_graph(network: nn.Module, x: Tensor) -> _Graph:
    before, traced = _attributes_of(network), trace(network)
    if traced is not None and not _computes_the_same(traced, network, x[:1]):
        traced = None
    after = _attributes_of(network)
    fixed = {key: value for key, value in before.items() if key in after and after[key] == value}
    return _Graph(traced, _modules_of(network), fixed, before.keys() | after.keys())


def _is_current(graph: _Graph, network: nn.Module) -> bool:
    return graph.traced is None or (_is_of(graph, network) and _has_tensors_of(graph.traced, network))


def _is_of(graph: _Graph, network: nn.Module) -> bool:
    """Whether the network has the modules, and the attributes, with which the graph was traced."""
    if graph.modules != _modules_of(network):
        return False
    attributes = _attributes_of(network)
    return graph.attributes.items() <= attributes.items() and attributes.keys() <= graph.names


def _modules_of(network: nn.Module) -> dict[str, ref[nn.Module]]:
    return {name: ref(module) for name, module in network.named_modules()}


def _attributes_of(network: nn.Module) -> dict[tuple[Any, str], Any]:
    """What a trace sees beside modules and tensors: attributes that are plain values or functions, also of classes.

    Of other attributes, those that hide one of the class are listed, but not what they are.
    """
    modules = dict(network.named_modules())
    classes = {base for kind in set(map(type, modules.values())) for base in kind.__mro__} - _CLASSES_OF_EVERY_MODULE
    found: dict[tuple[Any, str], Any] = {
        (kind, key): _comparable(value) for kind in classes for key, value in vars(kind).items() if _is_plain(value)
    }
    for name, module in modules.items():
        for key, value in module.__dict__.items():
            if key in _OF_EVERY_MODULE:
                continue
            if _is_plain(value):
                found[name, key] = _comparable(value)
            elif hasattr(type(module), key):
                found[name, key] = ...
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.generic, *_FUNCTIONS))


def _comparable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_comparable, value))
    return ref(value) if isinstance(value, _FUNCTIONS) else value  # a function may hold the network


def _has_tensors_of(traced: fx.GraphModule, network: nn.Module) -> bool:
    """Whether the network still has the tensors that the graph reads, or others that are equal."""
    for name in (str(node.target) for node in traced.graph.nodes if node.op == 'get_attr'):
        try:
            now, then = attrgetter(name)(network), attrgetter(name)(traced)
        except AttributeError:
            return False
        if now is not then and not (isinstance(now, Tensor) and now.dtype == then.dtype and torch.equal(now, then)):
            return False
    return True


def _unlike_images(image: Tensor) -> Tensor:
    """The image, a dark one and a bright one: what is computed over all three is not that of each.

    The images of a user's batch may be equal.
    """
    ramp = torch.linspace(0, 1, image.numel(), dtype=image.dtype, device=image.device).view(image.shape)
    return torch.stack((image, 0.2 * ramp + 0.11, 0.3 * ramp + 0.61))


def _computes_the_same(traced: fx.GraphModule, network: nn.Module, x: Tensor) -> bool:
    """Whether graph and network give the same result on corners of the images: a trace does not see everything.

    ``z = y; y += 1`` changes ``z`` in torch, but not in a trace. And the graph runs each image by itself.
    """
    corners, cache = x[:, :, :48, :48], _Cache()
    try:
        expected: Tensor = type(network).plain_forward(network, corners)  # type: ignore[attr-defined]
        cache.prepare(traced)
        found = _run_each(cache, corners)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            return False
        return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max()) or not _finite(expected)
    except Exception:  # whatever a forward, or a shape, raises
        return False
    finally:  # layers that ran by themselves each have an arena now, which the graph has no use for
        for layer in network.modules():
            if layer is not network:
                _local.caches.pop(layer, None)


class _ForwardOf(NamedTuple):
    """As an attribute of a class: the forward that ``base`` has now, which may have been replaced since."""

    base: type[nn.Module]

    def __get__(self, network: nn.Module | None, owner: type[nn.Module]) -> Callable[..., Any]:
        return self.base.forward


def _accelerated(base: type[nn.Module]) -> type[nn.Module]:
    if base in _classes:
        return _classes[base]

    @wraps(base.forward)  # torch.fx looks at its parameters
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and usable(self, args[0]):
            result = _run(self, args[0])
            if result is not None:
                return result
        return base.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, _: Any) -> Any:
        return _rebuild, (base,), self.__getstate__()

    attributes = {'forward': forward, '__reduce_ex__': reduce, 'plain_forward': _ForwardOf(base)}
    _classes[base] = type(base.__name__, (base,), attributes)
    return _classes[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    accelerated = _accelerated(base)
    network: nn.Module = accelerated.__new__(accelerated)
    return network


def accelerate(network: nn.Module) -> None:
    """Make the network run its :class:`SparseConv2d` layers on the kernel, together with the operations around them.

    In place: its class becomes a subclass of the same name, whose ``forward`` does so for inputs that the runtime
    supports (:func:`usable`), and is the original one for all others.
    """
    if not hasattr(type(network), 'plain_forward'):
        network.__class__ = _accelerated(type(network))


def _run(network: nn.Module, x: Tensor) -> Tensor | None:
    """The network's output for ``x``; None if torch must compute it."""
    layers = list(network.modules())
    if not any(isinstance(layer, SparseConv2d) for layer in layers) or not _finite(x):
        return None
    # Hooks of the network itself are called around this forward.
    if any(map(_needs_torch, layers[1:])) or any(_hooks_of_all_modules):
        return None
    cache, traced = _cache_of(network), _graph_of(network, x)
    if traced is None or x.shape[1:] in cache.given_up:
        return None
    if cache.parts is None or cache.traced is not traced:
        cache.prepare(traced)
    try:
        result = _run_each(cache, x)
    except ValueError:
        cache.given_up.add(x.shape[1:])
        return None
    return result if _finite(result) else None


def _needs_torch(layer: nn.Module) -> bool:
    """Whether a graph would not call the layer as torch does: it has hooks, a forward of its own, or statistics.

    BatchNorm in train mode adds to these at each call, also when a graph is compared with the network.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or 'forward' in layer.__dict__
    return bool(hooked or (layer.training and layer._buffers))


def run_layer(layer: SparseConv2d, x: Any) -> Tensor | None:
    """One convolution of (N, C, H, W) on the kernel; None if torch must compute it."""
    if not usable(layer, x) or not eligible(layer) or x.shape[1] != layer.in_channels or not _finite(x):
        return None
    cache = _cache_of(layer)
    segment = Segment([Step(CONVOLUTION, 'y', ('x',), layer)], ['x'], ['y'])
    result = torch.stack([_run_segment(cache, segment, [image], {})[0] for image in x])
    return result if _finite(result) else None


def _finite(x: Tensor) -> bool:
    if x.dtype == torch.float32 and not x.is_neg():
        # By numpy, which has no threads: those of torch's OpenMP go on spinning for a while, on the kernel's cores.
        with np.errstate(all='ignore'):
            if np.isfinite(x.detach().numpy().sum()):
                return True
    return bool(x.isfinite().all())


def _run_each(cache: _Cache, x: Tensor) -> Any:
    images = [_run_parts(cache, image[None]) for image in x]
    return images[0] if len(images) == 1 else torch.cat(images)


def _run_parts(cache: _Cache, x: Tensor) -> Any:
    assert cache.traced is not None and cache.parts is not None
    interpreter = fx.Interpreter(cache.traced, garbage_collect_values=False)
    env: dict[str, Any] = {}
    for part in cache.parts:
        if isinstance(part, Segment):
            shifts = {name: env[name] for name in part.shifts}
            outputs = _run_segment(cache, part, [env[name][0] for name in part.inputs], shifts)
            env.update((name, y[None]) for name, y in zip(part.outputs, outputs))
        elif part.op == 'placeholder':
            env[part.name] = x
        else:
            interpreter.env = {node: env[node.name] for node in part.all_input_nodes}
            env[part.name] = interpreter.run_node(part)
            if part.op == 'output':
                return env[part.name]
        for name in cache.last_reads[id(part)]:
            env.pop(name, None)
    raise AssertionError('a graph ends with its output')


def _last_reads(parts: list[Part]) -> dict[int, list[str]]:
    """The names that each part is the last to read, by the part's id."""
    last = {name: id(part) for part in parts for name in names_read(part)}
    return {id(part): [name for name, at in last.items() if at == id(part)] for part in parts}


def _run_segment(cache: _Cache, segment: Segment, inputs: list[Tensor], shifts: Mapping[str, Tensor]) -> list[Tensor]:
    shapes = tuple(tuple(x.shape) for x in inputs)
    key = (segment.steps[-1].output, segment.steps[0].output, shapes)
    program = cache.programs.get(key)
    if program is None:
        while len(cache.programs) > _MAX_PROGRAMS:
            cache.programs.pop(next(iter(cache.programs)))
        program = Program(segment, dict(zip(segment.inputs, shapes)))  # type: ignore[arg-type]
        cache.programs[key] = program
    if cache.arena.nbytes < program.nbytes + 64:
        cache.arena = np.empty(program.nbytes + 64, np.uint8)
    return program.run(inputs, shifts, cache.arena, torch.get_num_threads())
