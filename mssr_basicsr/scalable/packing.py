"""From a trained MSSR network to the bytes of a ``.mssr`` file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mssr_basicsr.scalable.architectures import check_scale
from mssr_basicsr.scalable.building import build_backbone, computed_checksum
from mssr_basicsr.scalable.container import write_file
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.header import WEIGHT_DTYPES
from mssr_basicsr.scalable.quantisation import quantise
from mssr_basicsr.scalable.sections import encode_section
from mssr_basicsr.scalable.values import DTYPE_NAMES, TORCH_DTYPES


class NestedNetwork(Protocol):
    """What :func:`pack` needs of a network, such as :class:`mssr_basicsr.archs.mssr_arch.MSSR`."""

    backbone: nn.Module

    @property
    def backbone_options(self) -> Mapping[str, Any]: ...

    @property
    def smallest_level(self) -> int: ...

    def get_level_map(self) -> Mapping[str, Tensor]: ...


@torch.no_grad()
def pack(
    network: NestedNetwork,
    scale: int,
    metrics: Mapping[str, Any] | None = None,
    dtype: str = 'F32',
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """All levels of ``network`` as a ``.mssr`` file, always the same bytes for the same arguments.

    Args:
        network: after the backward stage.
        scale: its upscaling factor, which is checked by running it on a small image.
        metrics: metrics of the levels: by level (as a string), then validation set, then metric. The file keeps six
            digits of each, and none that is None or not finite, such as the PSNR of equal images.
        dtype: the type of the prunable weights in the file: ``F32`` is lossless; ``F16`` and ``BF16`` round to nearest;
            ``I8`` are integers with one scale per output channel (:func:`quantise`), the same at every level. All other
            parameters and buffers keep theirs.
        metadata: facts about the model, such as its license, author and training data.

    Raises:
        ScalableFileError: no such dtype, a weight that it cannot hold, or a type of tensor that no file can hold.
        OptionError: the network upscales by a different factor.
    """
    check_scale(network.backbone, network.backbone_options, scale)
    if dtype not in WEIGHT_DTYPES:
        raise ScalableFileError(f'dtype: found {dtype!r}; allowed: {", ".join(WEIGHT_DTYPES)}')
    state = {name: tensor.detach().cpu() for name, tensor in network.backbone.state_dict().items()}
    for name, tensor in state.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ScalableFileError(f'{name}: found {tensor.dtype}; allowed: {", ".join(map(str, DTYPE_NAMES))}')
    level_map = {name: levels.cpu() for name, levels in network.get_level_map().items()}
    stored, scales = _stored(state, level_map, dtype)
    computed = _computed(network, state)
    others = {name: tensor for name, tensor in state.items() if name not in level_map and name not in computed}
    parameters = dict(network.backbone.named_parameters())
    fields: dict[str, Any] = {
        'backbone': network.backbone_options,
        'scale': scale,
        'dtype': dtype,
        'weights': [[name, list(state[name].shape)] for name in level_map],
        'others': [[name, list(tensor.shape), DTYPE_NAMES[tensor.dtype]] for name, tensor in others.items()],
        'num_other_parameters': sum(tensor.numel() for name, tensor in others.items() if name in parameters),
    }
    if computed:
        fields |= {'computed': list(computed), 'computed_checksum': computed_checksum(network.backbone, computed)}
    if metrics:
        fields['metrics'] = _for_a_file(metrics)
    if metadata:
        fields['metadata'] = dict(metadata)
    counts, sections = [], []
    for level in range(network.smallest_level, -1, -1):
        chosen = [levels[levels <= level] == level for levels in level_map.values()]
        values = [values[level_map[name] == level] for name, values in stored.items()]
        first = (scales, list(others.values())) if level == network.smallest_level else None
        counts.append([int(which.sum()) for which in chosen])
        sections.append(encode_section([which.numpy() for which in chosen], values, first))
    return write_file(fields, counts, sections)


def _stored(
    state: Mapping[str, Tensor], level_map: Mapping[str, Tensor], dtype: str
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The prunable weights as stored in a file of ``dtype``, and their scales for I8."""
    stored, scales = {}, []
    for name, levels in level_map.items():
        weight = state[name]
        if weight.dtype != torch.float32:
            raise ScalableFileError(f'{name}: found {weight.dtype}; allowed: torch.float32')
        if dtype == 'I8':
            if not weight.isfinite().all():
                raise ScalableFileError(f'{name}: found a weight that is not finite; allowed: F32, F16, BF16')
            stored[name], scale = quantise(weight, levels)
            scales.append(scale)
        else:
            stored[name] = weight.to(TORCH_DTYPES[dtype])
            if stored[name].isinf().any() and not weight.isinf().any():
                largest = float(weight.abs().max())
                raise ScalableFileError(f'{name}: {largest:g} is too large for {dtype}; allowed: F32, BF16, I8')
    return stored, scales


def _computed(network: NestedNetwork, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The buffers that are the same in any newly built backbone, such as SwinIR's attention masks."""
    fresh = dict(build_backbone(network.backbone_options).named_buffers())
    return tuple(name for name in state if name in fresh and torch.equal(fresh[name], state[name]))


def _for_a_file(metrics: Any) -> Any:
    """Metrics with six digits each, without those that are not finite, which a file cannot hold."""
    if isinstance(metrics, Mapping):
        return {key: _for_a_file(item) for key, item in metrics.items() if _is_finite(item)}
    return float(f'{metrics:.6g}') if isinstance(metrics, float) else metrics


def _is_finite(item: Any) -> bool:
    """False for a number that is not, and for None, which ``levels.json`` has in its place."""
    return item is not None and (not isinstance(item, float) or math.isfinite(item))


def level_metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics in records of levels (``levels.json``), in the form of the header."""
    return {str(record['level']): record['metrics'] for record in records if record.get('metrics')}
