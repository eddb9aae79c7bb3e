"""Agreement between the ranks of a distributed run: rank 0 decides, and all ranks check that they agree."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from basicsr.utils.dist_util import get_dist_info
from torch import Tensor
from torch import distributed as dist

from mssr_basicsr.foundation.checkpoints import non_finite


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256, in hex, of names, dtypes, shapes and all bits of the values: equal if and only if they are."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def broadcast_from_rank_0(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the tensors in place with rank 0's. Does nothing in a single-process run."""
    if get_dist_info()[1] > 1:
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)


@functools.cache
def patient_group() -> Any:
    """All ranks, on the CPU, for what they wait for each other in; None in a single-process run.

    While rank 0 validates every level, the others wait, for hours if need be. In BasicSR's own group torch would end
    the run after 10 minutes, and what is gathered would be in the GPU's memory. All ranks must make the first call
    together.
    """
    if get_dist_info()[1] == 1:
        return None
    atexit.register(_leave_patient_group)
    return dist.new_group(backend='gloo', timeout=timedelta(days=7))


def _leave_patient_group() -> None:
    """End gloo's threads before Python exits: one that outlives it occasionally aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group(patient_group())
    patient_group.cache_clear()
    gc.collect()  # the threads end with the last reference to the group


def gather(item: Any) -> list[Any]:
    """The ``item`` of every rank, in order of rank, on every rank."""
    _, world_size = get_dist_info()
    if world_size == 1:
        return [item]
    items = [None] * world_size
    dist.all_gather_object(items, item, patient_group())
    return items


def gather_on_rank_0(item: Any) -> list[Any]:
    """The ``item`` of every rank, in order of rank, on rank 0; on the others, which need no memory for it, no item."""
    rank, world_size = get_dist_info()
    if world_size == 1:
        return [item]
    items = [None] * world_size if rank == 0 else None
    dist.gather_object(item, items, group=patient_group())
    return items or []


def wait_for_all() -> None:
    """Wait until every rank has arrived here. Does nothing in a single-process run."""
    if get_dist_info()[1] > 1:
        dist.barrier(patient_group())


def require_finite(tensors: Mapping[str, Tensor], when: str) -> None:
    """Raise FloatingPointError on every rank if a value on any of them is NaN or infinite; it names the tensor."""
    found = gather(non_finite(tensors))
    for rank, names in enumerate(found):
        if names:
            where = f' on rank {rank}' if len(found) > 1 else ''
            raise FloatingPointError(f'{when}: {names[0]} is not finite{where}; the training has diverged')


def require_agreement(tensors: Mapping[str, Tensor], when: str) -> None:
    """Raise RuntimeError on every rank unless all ranks hold the same ``tensors``, bit for bit."""
    if get_dist_info()[1] == 1:
        return
    digests = gather(digest(tensors))
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(f'{when}: ranks {different} differ from rank 0; stopping before anything else is written')
