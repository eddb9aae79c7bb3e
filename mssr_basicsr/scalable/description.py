"""The contents of a scalable model file in readable form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mssr_basicsr.foundation.tables import table_with_metrics


def level_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """The ``levels`` of :meth:`ScalableFile.describe` as text, with a column for each metric of each validation set."""
    head = ['level', 'sparsity (prunable)', 'parameters', 'bytes', 'cumulative']
    cells = [
        [
            f'{row["level"]}{"" if row["present"] else " (not there)"}',
            f'{row["sparsity"]:.2%}',
            f'{row["parameters"]:,}',
            f'{row["bytes"]:,}',
            f'{row["cumulative_bytes"]:,}',
        ]
        for row in levels
    ]
    return table_with_metrics(head, cells, levels)
