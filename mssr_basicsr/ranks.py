"""Agreement between the ranks of a distributed run: rank 0 decides, and all check that they hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from basicsr.utils.dist_util import get_dist_info
from torch import Tensor
from torch import distributed as dist


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256, in hex, of names, dtypes, shapes and all bits of the values: equal if and only if they are."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def broadcast_from_rank_0(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the tensors, in place, by rank 0's. Does nothing in a run of one process."""
    if get_dist_info()[1] > 1:
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)


def require_agreement(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise RuntimeError on every rank unless all ranks hold the same ``tensors``, bit for bit."""
    _, world_size = get_dist_info()
    if world_size == 1:
        return
    device = next(iter(tensors.values())).device
    mine = torch.tensor([int(digest(tensors)[:15], 16)], device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(all_of_them, mine)
    different = [rank for rank, other in enumerate(all_of_them) if other.item() != all_of_them[0].item()]
    if different:
        raise RuntimeError(f'{what}: ranks {different} differ from rank 0; the run stops before it does harm')
