"""A network's computation as steps of the kernel where it can run them, and of torch elsewhere."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Union

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mssr_basicsr.foundation.unchanged import attributes_kept
from mssr_basicsr.sparse import library
from mssr_basicsr.sparse.library import CONVOLUTION, NEAREST, NONE, RELU, SLOPE, SUM

RunsSparse = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Step:
    """One operation of the kernel, on values by their names: scale * activation(operation) + residual.

    The operation of SUM is its input, plus or minus one number per channel that torch computes at run time.
    """

    kind: int
    output: str
    inputs: tuple[str, ...]  #: their channels, one after the other
    layer: nn.Conv2d | None = None  #: of CONVOLUTION
    activation: int = NONE
    slopes: nn.PReLU | float = 0.0  #: of SLOPE
    scale: float = 1.0
    residual: str | None = None
    factor: int = 1  #: of the pixel shuffle after a convolution, or of NEAREST
    shift: str | None = None  #: of SUM: the value of torch that has the number for each channel
    sign: int = 1  #: of ``shift``

    @property
    def reads(self) -> tuple[str, ...]:
        """The images that it is made of."""
        return self.inputs if self.residual is None else (*self.inputs, self.residual)


@dataclass
class Segment:
    """Consecutive steps of the kernel, without torch in between."""

    steps: list[Step]
    inputs: list[str] = field(default_factory=list)  #: images that torch computed
    outputs: list[str] = field(default_factory=list)  #: what torch reads, or the network returns

    @property
    def shifts(self) -> list[str]:
        """Per-channel numbers computed by torch."""
        return list(dict.fromkeys(step.shift for step in self.steps if step.shift is not None))


Part = Union[fx.Node, Segment]


def names_read(part: Part | Step) -> list[str]:
    """The names of the values that must be known before it can run; of a segment also those that it computes itself."""
    if isinstance(part, fx.Node):
        return [node.name for node in part.all_input_nodes]
    steps = part.steps if isinstance(part, Segment) else [part]
    return [name for step in steps for name in (*step.reads, step.shift) if name is not None]


class _Tracer(fx.Tracer):
    """Traces its own thread alone: tracing patches ``nn.Module`` itself, but other threads go on as before."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


class _NothingIsComputed(TorchDispatchMode):
    """While it is active, tensors may be read, but not computed with; the symbols of a trace may.

    A graph has the result of such an operation as a constant. But the network computes it anew at each call, and from
    weights that another level has replaced, for instance in ``F.conv2d(x, 2 * self.conv.weight)``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError(f'{func} does not depend on the image')


def trace(network: nn.Module) -> fx.GraphModule | None:
    """The network's graph, or None if it cannot be traced: its forward depends on values or shapes, takes more than the
    image, computes something from weights alone, makes a constant, or modifies in place what is read again. One thread
    may trace at a time; others may run networks meanwhile.
    """
    tracer = _Tracer()
    # An accelerated network has its class's own forward under this name.
    tracer.traced_func_name = 'plain_forward' if hasattr(type(network), 'plain_forward') else 'forward'
    try:
        with attributes_kept(network), _NothingIsComputed():
            graph = tracer.trace(network)
        traced = fx.GraphModule(network, graph)  # AttributeError if it reads a tensor that the forward has made
    except Exception:  # whatever a forward does with symbols
        return None
    if sum(node.op == 'placeholder' for node in graph.nodes) > 1:
        return None
    return None if any(_overwrites(traced, node) for node in graph.nodes) else traced


_INPLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}


def _overwrites(traced: fx.GraphModule, node: fx.Node) -> bool:
    inplace = node.op == 'call_function' and (node.target in _INPLACE or node.kwargs.get('inplace'))
    if node.op == 'call_module':
        inplace = getattr(traced.get_submodule(str(node.target)), 'inplace', False)
    elif node.op == 'call_method':
        inplace = str(node.target).endswith('_')
    first = node.args[0] if node.args else None
    return bool(inplace) and isinstance(first, fx.Node) and (len(first.users) > 1 or first.op == 'placeholder')


def plan(traced: fx.GraphModule, runs_sparse: RunsSparse) -> list[Part]:
    """The network's nodes in an executable order, with those that the kernel runs fused and grouped in segments."""
    names = {node.name: node for node in traced.graph.nodes}
    steps: dict[str, Step] = {}
    for node in traced.graph.nodes:
        step = _step(traced, node, steps, runs_sparse)
        if step is not None:
            steps[node.name] = step
    fused = _fuse(steps, names)
    waiting: list[fx.Node | Step] = []
    for node in traced.graph.nodes:
        if node.name in fused:
            waiting.append(fused[node.name])
        elif node.name not in steps:
            waiting.append(node)
    return _in_segments(waiting)


# What a node may call: functions, and methods of a tensor as '.name'.
_ADD = (operator.add, operator.iadd, torch.add, '.add', '.add_')
_SUBTRACT = (operator.sub, operator.isub, torch.sub)
_MULTIPLY = (operator.mul, operator.imul, torch.mul)
_DIVIDE = (operator.truediv, operator.itruediv, torch.div)


def _is_shift(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a tensor of the network with one number for each of several channels, such as the mean colour."""
    if node.op == 'call_method' and node.target == 'type_as':
        of, to = node.args
        return isinstance(to, fx.Node) and to.op == 'placeholder' and isinstance(of, fx.Node) and _is_shift(traced, of)
    if node.op != 'get_attr':
        return False
    tensor = operator.attrgetter(str(node.target))(traced)
    shape = tuple(tensor.shape)
    return (
        tensor.dtype == torch.float32
        and shape[-2:] == (1, 1)
        and shape in ((1, *shape[-3:]), shape[-3:])
        and shape[-3] > 1
    )


def _step(traced: fx.GraphModule, node: fx.Node, steps: dict[str, Step], runs_sparse: RunsSparse) -> Step | None:
    """The node as a step of its own, or None if the kernel does not have it."""
    target = _target(traced, node)
    if target is torch.cat:
        return _concatenation(traced, node, runs_sparse)
    arguments = [argument for argument in node.args if isinstance(argument, fx.Node)]
    # torch.fx lists all keyword arguments of torch's own functions, such as F.relu, even those at their defaults.
    options = {key: value for key, value in node.kwargs.items() if value is not None and value is not False}
    if not arguments or (options and target is not F.interpolate):  # such as torch.div's rounding_mode
        return None
    if isinstance(target, nn.Conv2d):
        return Step(CONVOLUTION, node.name, (arguments[0].name,), target) if runs_sparse(target) else None
    if arguments[0].name in steps or arguments[0].op == 'placeholder':
        if target is F.interpolate:
            return _upsampling(node, options)
        if target in (*_ADD, *_SUBTRACT) and len(node.args) == len(arguments) == 2 and _is_shift(traced, arguments[1]):
            sign = -1 if target in _SUBTRACT else 1
            return Step(SUM, node.name, (arguments[0].name,), shift=arguments[1].name, sign=sign)
    if any(argument.name not in steps for argument in arguments):
        return None
    return _pointwise(node, target, arguments, steps)


def _target(traced: fx.GraphModule, node: fx.Node) -> Any:
    """What the node calls: a module, a function, or a method of a tensor as ``'.name'``."""
    if node.op == 'call_module':
        return traced.get_submodule(str(node.target))
    return f'.{node.target}' if node.op == 'call_method' else node.target


def _concatenation(traced: fx.GraphModule, node: fx.Node, runs_sparse: RunsSparse) -> Step | None:
    """Channels one after the other, where only convolutions of the kernel read them: these take several inputs."""
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get('dim', 0)
    names = [part.name for part in parts if isinstance(part, fx.Node)] if isinstance(parts, (list, tuple)) else []
    read_by_convolutions = all(
        user.op == 'call_module' and runs_sparse(traced.get_submodule(str(user.target))) for user in node.users
    )
    if axis != 1 or not 0 < len(names) <= library.MAX_INPUTS or not read_by_convolutions:
        return None
    return Step(SUM, node.name, tuple(names))


def _upsampling(node: fx.Node, options: dict[str, Any]) -> Step | None:
    """Nearest-neighbour upsampling by a small integer."""
    factor, mode = options.get('scale_factor'), options.get('mode', 'nearest')
    if len(node.args) > 1 or factor not in (2, 3, 4) or mode != 'nearest' or options.keys() - {'scale_factor', 'mode'}:
        return None
    return Step(NEAREST, node.name, (node.all_input_nodes[0].name,), factor=int(factor))


def _pointwise(node: fx.Node, target: Any, arguments: list[fx.Node], steps: dict[str, Step]) -> Step | None:
    """A scaling, a sum of two images, an activation, or a pixel shuffle of what a convolution makes."""
    first = arguments[0].name
    factor = _factor(node, target)
    if factor is not None:
        return Step(SUM, node.name, (first,), scale=factor)
    if target in _ADD and len(node.args) == len(arguments) == 2:
        return Step(SUM, node.name, (arguments[1].name,), residual=first)
    if isinstance(target, nn.ReLU) or target in (F.relu, torch.relu):
        return Step(SUM, node.name, (first,), activation=RELU)
    if isinstance(target, nn.LeakyReLU):
        return Step(SUM, node.name, (first,), activation=SLOPE, slopes=target.negative_slope)
    if isinstance(target, nn.PReLU):
        return Step(SUM, node.name, (first,), activation=SLOPE, slopes=target)
    if isinstance(target, nn.PixelShuffle) and steps[first].kind == CONVOLUTION and len(arguments[0].users) == 1:
        return Step(SUM, node.name, (first,), factor=target.upscale_factor)
    return None


def _factor(node: fx.Node, target: Any) -> float | None:
    """The number by which the node multiplies an image; None if it does something else."""
    if target not in (*_MULTIPLY, *_DIVIDE) or len(node.args) != 2:
        return None
    left, right = node.args
    if target in _MULTIPLY and isinstance(left, (int, float)):
        return float(left)
    if isinstance(right, (int, float)):
        return float(right) if target in _MULTIPLY else 1 / right if right else None
    return None


def _fuse(steps: dict[str, Step], names: dict[str, fx.Node]) -> dict[str, Step]:
    """Activation, factor, shuffle and sum go into the step before, if nothing else reads that."""
    done: dict[str, Step] = {}
    for name, step in steps.items():
        source = step.inputs[0]
        if step.residual is not None and not _alone(names, source, done):
            source, other = step.residual, source
            step = replace(step, inputs=(source,), residual=other)
        before = done.get(source)
        merged = None
        alone = _alone(names, source, done) and step.residual != source
        if step.kind == SUM and len(step.inputs) == 1 and before is not None and alone:
            merged = _merged(before, step)
        if merged is not None:
            del done[source]
        if step.kind == CONVOLUTION and source in done and done[source].kind == SUM and len(done[source].inputs) > 1:
            step = replace(step, inputs=done[source].inputs)
        done[name] = merged or step
    return {name: step for name, step in done.items() if step.kind != SUM or len(step.inputs) == 1}


def _alone(names: dict[str, fx.Node], name: str, done: dict[str, Step]) -> bool:
    return name in done and len(names[name].users) == 1 and done[name].kind in (CONVOLUTION, SUM)


def _merged(before: Step, step: Step) -> Step | None:
    """``step`` after ``before`` as one step; None where the order of kernel.c does not allow it."""
    if before.residual is not None or (len(before.inputs) > 1 and before.kind == SUM) or step.shift is not None:
        return None
    if step.residual is not None:
        return replace(before, output=step.output, residual=step.residual)
    if step.factor > 1:
        plain = before.activation == NONE and before.scale == 1 and before.factor == 1
        return replace(before, output=step.output, factor=step.factor) if plain else None
    if step.activation != NONE:
        if before.activation != NONE or before.scale != 1 or (before.factor > 1 and isinstance(step.slopes, nn.PReLU)):
            return None
        return replace(before, output=step.output, activation=step.activation, slopes=step.slopes)
    return replace(before, output=step.output, scale=before.scale * step.scale)


def _in_segments(waiting: list[fx.Node | Step]) -> list[Part]:
    """Alternately all nodes of torch that can run, and all steps that can: as few segments as possible."""
    parts: list[Part] = []
    known: set[str] = set()
    while waiting:
        for of_torch in (True, False):
            ready: list[Any] = []
            rest: list[fx.Node | Step] = []
            for item in waiting:
                if isinstance(item, fx.Node) == of_torch and known.issuperset(names_read(item)):
                    ready.append(item)
                    known.add(item.name if isinstance(item, fx.Node) else item.output)
                else:
                    rest.append(item)
            waiting = rest
            if of_torch:
                parts.extend(ready)
            elif ready:
                parts.append(Segment(ready))
    for i, part in enumerate(parts):
        if isinstance(part, Segment):
            made = {step.output for step in part.steps}
            read = dict.fromkeys(name for step in part.steps for name in step.reads)
            part.inputs = [name for name in read if name not in made]
            later = {name for other in parts[i + 1 :] for name in names_read(other)}
            part.outputs = [name for name in made if name in later]
    return parts
