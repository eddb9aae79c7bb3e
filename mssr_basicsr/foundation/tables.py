"""Records of levels as a readable table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table_with_metrics(
    head: Sequence[str], cells: Sequence[Sequence[str]], records: Sequence[Mapping[str, Any]]
) -> str:
    """An aligned table: ``head``, a row of ``cells`` per record, and a further column for each metric in the records.

    A record's ``metrics``, if it has any, are by validation set and metric.
    """
    known = [record.get('metrics', {}) for record in records]
    metrics = {(name, key): None for sets in known for name, values in sets.items() for key in values}
    table = [[*head, *(f'{name} {metric}' for name, metric in metrics)]]
    for row, sets in zip(cells, known):
        values = [sets.get(name, {}).get(metric) for name, metric in metrics]
        table.append([*row, *('-' if value is None else f'{value:.4f}' for value in values)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table)
