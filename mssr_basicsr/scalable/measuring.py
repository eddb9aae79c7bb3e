"""Time and memory of a file's levels on this CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mssr_basicsr.scalable.container import require_no_pipe
from mssr_basicsr.scalable.model import ScalableModel
from mssr_basicsr.sparse.layers import SparseConv2d


@torch.no_grad()
def measure_levels(path: Path, size: tuple[int, int], threads: int | None, rounds: int) -> list[dict[str, Any]]:
    """A record for each level in the file, largest first: medians over ``rounds``, alternating between engines.

    Args:
        path: of the ``.mssr`` file.
        size: width and height of the input, in pixels.
        threads: how many torch and the kernel use; None: the current number.
        rounds: how many times to run each.

    Raises:
        ScalableFileError: the file is corrupted or incomplete, or a pipe.
        OSError: the file cannot be read.
    """
    require_no_pipe(path)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with ScalableModel(path) as model, ScalableModel(path, engine='torch') as reference:
            multiple = model.upscaler.multiple
            width, height = (-(-side // multiple) * multiple for side in size)
            x = torch.rand(1, model.upscaler.channels, height, width, dtype=torch.float32, device='cpu')
            records = []
            for level in range(model.level, model.header.smallest_level + 1):
                model.shrink(level)
                reference.shrink(level)
                record = _measure(model.network, reference.network, x, rounds)
                records.append({'level': level, 'peak_bytes': _peak_at(path, level, x), **record})
            return records
    finally:
        torch.set_num_threads(before)


def _measure(network: nn.Module, dense: Any, x: Tensor, rounds: int) -> dict[str, Any]:
    # dense is a Module, whose to() is not annotated for a memory format alone in torch 2.8.
    last = x.contiguous(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {'engine': [], 'default': [], 'channels_last': []}
    network(x)
    for _ in range(rounds):
        times['engine'].append(_seconds(lambda: network(x)))
        times['default'].append(_seconds(lambda: dense(x)))
        dense.to(memory_format=torch.channels_last)
        dense(last)  # its first call in a layout is slower
        times['channels_last'].append(_seconds(lambda: dense(last)))
        dense.to(memory_format=torch.contiguous_format)
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    sparse = {name: layer for name, layer in layers.items() if isinstance(layer, SparseConv2d)}
    tensors = [*network.parameters(), *network.buffers()]
    return {
        'engine': 'sparse' if sparse else 'torch',
        'milliseconds': medians['engine'],
        'torch_milliseconds': min(medians['default'], medians['channels_last']),
        'times_faster': min(medians['default'], medians['channels_last']) / medians['engine'],
        'weight_bytes': sum(t.nbytes for t in tensors) + sum(layer.kept.nbytes for layer in sparse.values()),
        'convolutions': len(layers),
        'sparse_layers': list(sparse),
    }


def calm_down() -> None:
    """Wait until the threads of earlier work have stopped spinning; busily, since the caches go cold during a sleep."""
    until = time.perf_counter() + 0.03
    while time.perf_counter() < until:
        pass


def _seconds(work: Callable[[], Any]) -> float:
    calm_down()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _resident() -> int:
    """Resident memory of this process in bytes; 0 if the system does not say."""
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 0


def _peak_at(path: Path, level: int, x: Tensor) -> int:
    """Peak memory added, weights included, from loading the level to its output image."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc: memory that was freed goes back to the system
    start, highest, over = _resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            highest[0] = max(highest[0], _resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ScalableModel(path, level) as model:
            model.network(x)
    finally:
        over.set()
        watcher.join()
    return highest[0]
