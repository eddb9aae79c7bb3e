"""From a trained MSSR network to the bytes of a ``.mssr`` file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mssr_basicsr.scalable.architectures import check_scale
from mssr_basicsr.scalable.building import build_backbone, computed_checksum
from mssr_basicsr.scalable.container import DTYPES, write_file
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.positions import coding_order, encode_positions


class NestedNetwork(Protocol):
    """What :func:`pack` needs of a network, such as :class:`mssr_basicsr.archs.mssr_arch.MSSR`."""

    backbone: nn.Module

    @property
    def backbone_options(self) -> Mapping[str, Any]: ...

    @property
    def smallest_level(self) -> int: ...

    def get_level_map(self) -> Mapping[str, Tensor]: ...


@torch.no_grad()
def pack(network: NestedNetwork, scale: int, metrics: Mapping[str, Any] | None = None, dtype: str = 'F32') -> bytes:
    """All levels of ``network`` as a ``.mssr`` file: the same bytes for the same arguments.

    Args:
        network: after the backward stage.
        scale: its upscaling factor, which is checked by running it on a small image.
        metrics: what is known of the levels: by level (as a string), then validation set, then metric.
        dtype: the type of the prunable weights in the file: ``F32`` is lossless; ``F16`` and ``BF16`` round to nearest.
            All other parameters and buffers keep theirs.

    Raises:
        ScalableFileError: no such dtype, a weight that it cannot hold, or weights that are not float32.
        OptionError: the network upscales by another factor.
    """
    check_scale(network.backbone, network.backbone_options, scale)
    if dtype not in DTYPES:
        raise ScalableFileError(f'dtype: found {dtype!r}; allowed: {", ".join(DTYPES)}')
    state = {name: tensor.detach().cpu() for name, tensor in network.backbone.state_dict().items()}
    level_map = {name: levels.cpu().flatten().numpy() for name, levels in network.get_level_map().items()}
    values = {name: _values(name, state[name], dtype) for name in level_map}
    computed = _computed(network, state)
    others = {name: tensor for name, tensor in state.items() if name not in level_map and name not in computed}
    parameters = dict(network.backbone.named_parameters())
    fields = {
        'backbone': network.backbone_options,
        'scale': scale,
        'dtype': dtype,
        'weights': [[name, list(state[name].shape)] for name in level_map],
        'others': [[name, list(tensor.shape)] for name, tensor in others.items()],
        'num_other_parameters': sum(tensor.numel() for name, tensor in others.items() if name in parameters),
        'computed': list(computed),
        'computed_checksum': computed_checksum(network.backbone, computed),
        'metrics': metrics or {},
    }
    counts, sections = [], []
    for level in range(network.smallest_level, -1, -1):
        count, tensors = _section(level_map, values, level)
        if level == network.smallest_level:
            tensors.update({f'other.{name}': tensor.contiguous() for name, tensor in others.items()})
        counts.append(count)
        sections.append(tensors)
    return write_file(fields, counts, sections)


def _values(name: str, weight: Tensor, dtype: str) -> Tensor:
    if weight.dtype != torch.float32:
        raise ScalableFileError(f'{name}: found {weight.dtype}; allowed: torch.float32')
    values = weight.flatten().to(DTYPES[dtype])
    if values.isinf().any() and not weight.isinf().any():
        raise ScalableFileError(f'{name}: {float(weight.abs().max()):g} is too large for {dtype}; allowed: F32, BF16')
    return values


def _computed(network: NestedNetwork, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The buffers that any newly built backbone has alike, such as SwinIR's attention masks."""
    fresh = dict(build_backbone(network.backbone_options).named_buffers())
    return tuple(name for name in state if name in fresh and torch.equal(fresh[name], state[name]))


def _section(
    level_map: Mapping[str, Any], values: Mapping[str, Tensor], level: int
) -> tuple[list[int], dict[str, Tensor]]:
    """How many elements of each weight ``level`` adds, and its section's tensors."""
    chosen = [levels[levels <= level] == level for levels in level_map.values()]
    counts, names = [int(which.sum()) for which in chosen], list(level_map)
    order = coding_order(counts, [which.size for which in chosen])
    taken = [values[names[i]][torch.from_numpy(level_map[names[i]] == level)] for i in order]
    positions = np.frombuffer(encode_positions([chosen[i] for i in order]), np.uint8).copy()
    return counts, {'values': torch.cat(taken), 'positions': torch.from_numpy(positions)}


def level_metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics in records of levels (``levels.json``), as the header has them."""
    return {str(record['level']): record['metrics'] for record in records if record.get('metrics')}
