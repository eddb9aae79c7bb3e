"""Segments of a network on the kernel: rows of all values advance together, so that few rows of each are in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mssr_basicsr.sparse.graph import Segment, Step
from mssr_basicsr.sparse.layers import Kept, SparseConv2d
from mssr_basicsr.sparse.library import CONVOLUTION, PACK, SLOPE, UNPACK, Kernel, Operation, Value, kernel

Shape = tuple[int, int, int]  # channels, height, width
_PARTS = 8  # of a band, at least: what several threads share


class Program:
    """A :class:`Segment` for one size of its inputs.

    Args:
        segment: steps of the kernel.
        shapes: (C, H, W) of each of the segment's inputs.

    Raises:
        ValueError: the shapes do not match, as in a sum that torch would broadcast.
    """

    def __init__(self, segment: Segment, shapes: Mapping[str, Shape]) -> None:
        found = kernel()
        assert found is not None
        self._kernel: Kernel = found
        # Not the steps themselves: they hold the layers, of which a program may be the value in a weak dictionary.
        self._outputs = tuple(segment.outputs)
        self._kept_alive: list[Any] = []
        self.shapes: dict[str, Shape] = dict(shapes)
        self._vectors = {name: -(-shape[2] // found.lanes) for name, shape in shapes.items()}
        for step in segment.steps:
            self._infer(step)
        operations = [
            *(Step(PACK, name, ()) for name in segment.inputs),
            *segment.steps,
            *(Step(UNPACK, '', (name,)) for name in segment.outputs),
        ]
        self._schedule(operations)
        self._build(operations)

    def _infer(self, step: Step) -> None:
        """The shape of the step's output."""
        inputs = [self.shapes[name] for name in step.inputs]
        channels, (height, width) = sum(shape[0] for shape in inputs), inputs[0][1:]
        f, vectors = step.factor, self._vectors[step.inputs[0]]
        fits = all(shape[1:] == inputs[0][1:] for shape in inputs)
        if step.layer is not None:
            fits &= channels == step.layer.in_channels
            channels = step.layer.out_channels // (f * f)
        shape = (channels, height * f, width * f)
        same = [self._vectors[name] == vectors for name in step.inputs]
        if step.residual is not None:
            fits &= self.shapes[step.residual] == shape
            same.append(self._vectors[step.residual] == vectors * f)
        if not fits or not all(same):
            raise ValueError(f'{step.output}: shapes do not fit')
        self.shapes[step.output], self._vectors[step.output] = shape, vectors * f

    def _schedule(self, operations: list[Step]) -> None:
        """Which rows each operation computes when, and how many rows of each value are in memory at a time.

        Each operation in turn computes the next band of rows, as far as its inputs allow. A row is kept until the last
        operation that reads it has passed.
        """
        done = dict.fromkeys(self.shapes, 0)  # rows of each value that are there
        used = [0] * len(operations)  # rows of its input that each operation is through with
        readers: dict[str, list[int]] = {name: [] for name in self.shapes}
        for i, op in enumerate(operations):
            for name in op.reads:
                readers[name].append(i)
        self.rows = dict.fromkeys(self.shapes, 1)
        bands = []
        heights = [self.shapes[op.inputs[0] if op.inputs else op.output][1] for op in operations]
        lowest = min(heights)
        across = -(-min(self._vectors.values()) // self._kernel.vectors)
        rows = self._kernel.rows * max(1, -(-_PARTS // across))
        rows_of_bands = [-(-rows * height // lowest) for height in heights]
        while any(at < height for at, height in zip(used, heights)):
            for i, op in enumerate(operations):
                height = heights[i]
                if used[i] == height:
                    continue
                last = min(used[i] + rows_of_bands[i], _rows_ready(op, height, done))
                if last <= used[i]:
                    continue
                bands.append((i, used[i], last))
                if op.output:
                    done[op.output] = last * op.factor
                    needed = [_first_needed(operations[r], op.output, used[r]) for r in readers[op.output]]
                    if needed:
                        span = done[op.output] - max(0, min(needed))
                        self.rows[op.output] = max(self.rows[op.output], span)
                used[i] = last
        self._bands = np.array(bands, np.int32)

    def _build(self, operations: list[Step]) -> None:
        """The arrays that kernel.c reads."""
        self.nbytes, offsets = 0, {}
        for name, (channels, _, _) in self.shapes.items():
            offsets[name] = self.nbytes
            row = channels * self._vectors[name] + self._kernel.gap
            size = self.rows[name] * row * self._kernel.lanes * 4
            self.nbytes += -(-size // 64) * 64
        self._offsets = offsets
        self._values = {
            name: Value(0, *shape, self._vectors[name], self.rows[name]) for name, shape in self.shapes.items()
        }
        self._shifts: list[tuple[npt.NDArray[Any], int, str]] = []  # where each goes, its sign and its name
        self._array = (Operation * len(operations))()
        for op, entry in zip(operations, self._array):
            entry.kind, entry.inputs, entry.factor = op.kind, len(op.inputs), op.factor
            entry.activation, entry.scale = op.activation, op.scale
            for i, name in enumerate(op.inputs):
                entry.input[i] = ctypes.addressof(self._values[name])
            if op.residual is not None:
                entry.residual = ctypes.addressof(self._values[op.residual])
            if op.output:
                entry.output = ctypes.addressof(self._values[op.output])
            if op.activation == SLOPE:
                entry.slope = self._keep(_slopes(op, self.shapes[op.output][0] * op.factor**2))
            if op.layer is not None:
                self._set_weights(entry, op.layer)
            if op.shift is not None:
                shift = np.zeros(self.shapes[op.output][0], np.float32)
                self._shifts.append((shift, op.sign, op.shift))
                entry.bias = shift.ctypes.data

    def _set_weights(self, entry: Operation, layer: nn.Conv2d) -> None:
        kept = kept_of(layer, self._kernel)
        self._kept_alive.append(kept)
        entry.weights, entry.offset = kept.values.ctypes.data, kept.offsets.ctypes.data
        entry.start, entry.block = kept.starts.ctypes.data, kept.block
        entry.in_channels, entry.out_channels = layer.in_channels, layer.out_channels
        if layer.bias is not None:
            entry.bias = self._keep(layer.bias.detach().numpy())

    def _keep(self, array: npt.NDArray[Any]) -> int:
        array = np.ascontiguousarray(array, np.float32)
        self._kept_alive.append(array)
        return int(array.ctypes.data)

    def run(
        self, inputs: list[Tensor], shifts: Mapping[str, Tensor], arena: npt.NDArray[Any], threads: int
    ) -> list[Tensor]:
        """The segment's outputs for one image.

        Args:
            inputs: (C, H, W) float32 of the program's shapes.
            shifts: for each of the segment's shifts, one number per channel, (1, C, 1, 1) or (C, 1, 1).
            arena: :attr:`nbytes` + 64 bytes, of this call alone.
            threads: how many to use.

        Raises:
            ValueError: a shift has another shape.
        """
        for place, sign, name in self._shifts:
            if shifts[name].shape[-3:] != (len(place), 1, 1):
                raise ValueError(f'{name}: not one number per channel')
            place[:] = sign * shifts[name].detach().numpy().ravel()
        inputs = [x.contiguous() for x in inputs]
        outputs = [torch.empty(self.shapes[name], dtype=torch.float32, device='cpu') for name in self._outputs]
        base = -(-arena.ctypes.data // 64) * 64
        for name, value in self._values.items():
            value.data = base + self._offsets[name]
        for op, x in zip(self._array, inputs):
            op.image = x.data_ptr()
        for op, y in zip(self._array[len(self._array) - len(outputs) :], outputs):
            op.image = y.data_ptr()
        status = self._kernel.run(
            ctypes.addressof(self._array), len(self._array), self._bands.ctypes.data, len(self._bands), threads
        )
        if status:
            raise MemoryError('the sparse runtime ran out of memory')
        return outputs


def _halo(op: Step) -> int:
    """Rows below that a row of the operation looks at: 3x3 kernels, and 1x1 for simplicity."""
    return 1 if op.kind == CONVOLUTION else 0


def _rows_ready(op: Step, height: int, done: Mapping[str, int]) -> int:
    """How many of its ``height`` rows the operation can compute, if ``done`` rows of each value are there."""
    ready = height
    for name in op.inputs:
        ready = min(ready, height if done[name] == height else done[name] - _halo(op))
    return ready if op.residual is None else min(ready, done[op.residual] // op.factor)


def _first_needed(op: Step, name: str, used: int) -> int:
    """The first row of ``name`` that the operation, which is through with ``used`` rows of its input, still reads."""
    return used - _halo(op) if name in op.inputs else used * op.factor


def _slopes(op: Step, channels: int) -> npt.NDArray[Any]:
    if isinstance(op.slopes, nn.PReLU):
        slopes = op.slopes.weight.detach().numpy()
        if len(slopes) not in (1, channels):
            raise ValueError(f'{op.output}: shapes do not fit')
        return np.broadcast_to(slopes, channels)
    return np.full(channels, op.slopes)


def kept_of(layer: nn.Conv2d, using: Kernel) -> Kept:
    """The layer's kept weights; for a dense layer, all."""
    if isinstance(layer, SparseConv2d):
        return layer.kept
    weight = layer.weight.detach().contiguous().numpy()
    return Kept(weight.shape, weight.ravel(), np.zeros(weight.size, np.uint8), using)
