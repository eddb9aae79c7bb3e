"""What the levels are and how good: records that machines read, a table that people read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.foundation.tables import table_with_metrics
from mssr_basicsr.method.level_map import count, mask_of

Record = dict[str, Any]


def describe_level(network: MSSR, level: int) -> Record:
    """The size of one level.

    Returns:
        ``level``; ``prunable_kept`` and ``prunable_total``, weights that pruning may remove; ``sparsity``, the removed
        share of these; ``parameters_kept`` and ``parameters_total``, of all the backbone's parameters; ``density``,
        the kept share of each layer's prunable weights by the layer's name.
    """
    masks = mask_of(network.get_level_map(), level)
    kept, total = count(masks), sum(mask.numel() for mask in masks.values())
    parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
    return {
        'level': level,
        'sparsity': 1 - kept / total,
        'prunable_kept': kept,
        'prunable_total': total,
        'parameters_kept': parameters - total + kept,
        'parameters_total': parameters,
        'density': {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()},
    }


def level_table(records: Iterable[Mapping[str, Any]]) -> str:
    """The records as a table, a level a row: sizes, then a column for each validation set's metrics."""
    rows = sorted(records, key=lambda record: record['level'])
    head = ['level', 'sparsity of prunable', 'prunable kept', 'parameters kept', 'iterations']
    cells = [
        [
            str(row['level']),
            f'{row["sparsity"]:.4%}',
            f'{row["prunable_kept"]:,}',
            f'{row["parameters_kept"]:,}',
            str(row.get('iterations', '-')),
        ]
        for row in rows
    ]
    return table_with_metrics(head, cells, rows)
