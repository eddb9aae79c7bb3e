"""What a file of a scalable model holds, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mssr_basicsr.foundation.tables import table_with_metrics
from mssr_basicsr.scalable.container import ScalableFile


def describe(file: ScalableFile) -> dict[str, Any]:
    """What a :class:`ScalableFile` holds, as JSON values: a record for each level, largest first."""
    header, present = file.header, set(file.available())
    total = header.num_parameters(0)
    levels = [
        {
            'level': section.level,
            'parameters': header.num_parameters(section.level),
            'density': header.num_parameters(section.level) / total,
            'bytes': section.end if section.level == header.smallest_level else section.size,
            'cumulative_bytes': section.end,
            'present': section.level in present,
            'metrics': header.metrics.get(str(section.level), {}),
        }
        for section in reversed(header.sections)
    ]
    return {
        'file': file.name,
        'backbone': header.backbone,
        'scale': header.scale,
        'dtype': header.dtype,
        'metadata': header.metadata,
        'file_bytes': file.size,
        'whole_bytes': header.sections[-1].end,
        'levels': levels,
    }


def level_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """The records of :func:`describe` as text, with a column for each metric of each validation set."""
    head = ['level', 'parameters', 'density', 'bytes', 'cumulative']
    cells = [
        [
            f'{row["level"]}{"" if row["present"] else " (not there)"}',
            f'{row["parameters"]:,}',
            f'{row["density"]:.2%}',
            f'{row["bytes"]:,}',
            f'{row["cumulative_bytes"]:,}',
        ]
        for row in levels
    ]
    return table_with_metrics(head, cells, levels)
