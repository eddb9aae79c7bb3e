"""What the levels are and how good: records that machines read, a table that people read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.pruning.level_map import count, mask_of

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
    metrics = {(name, key): None for row in rows for name, values in row.get('metrics', {}).items() for key in values}
    head = ['level', 'sparsity of prunable', 'prunable kept', 'parameters kept', 'iterations']
    table = [head + [f'{name} {metric}' for name, metric in metrics]]
    for row in rows:
        cells = [str(row['level']), f'{row["sparsity"]:.4%}', f'{row["prunable_kept"]:,}']
        cells += [f'{row["parameters_kept"]:,}', str(row.get('iterations', '-'))]
        values = [row.get('metrics', {}).get(name, {}).get(metric) for name, metric in metrics]
        table.append(cells + ['-' if value is None else f'{value:.4f}' for value in values])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table)
