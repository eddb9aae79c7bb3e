"""Sizes and metrics of the levels: machine-readable records, and a readable table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from mssr_basicsr.foundation.tables import table_with_metrics
from mssr_basicsr.method.level_map import LevelMap, count, mask_of

RECORDS = 'levels.json'  #: beside the models, or in a test beside the results
LAST_CHECKPOINT = 'net_g_latest.pth'  #: what BasicSR calls the one that a run ends with


def level_file(level: int) -> str:
    """The name of the file, beside the models, that holds one level as a plain checkpoint of the backbone."""
    return f'net_g_level{level}.pth'


class LevelRecord(TypedDict, total=False):
    """One level's entry in :data:`RECORDS`, where null is a metric that is not finite."""

    level: int  #: its number
    sparsity: float  #: the removed share of the prunable weights
    prunable: int  #: prunable weights that the level has
    prunable_total: int  #: prunable weights of the dense network
    parameters: int  #: parameters that the level has, of all kinds
    parameters_total: int  #: parameters of the dense network
    layer_density: dict[str, float]  #: by the name of a prunable weight, the kept share of its elements
    iterations: int  #: for how many the level was trained, once it is done
    metrics: dict[str, dict[str, float]]  #: by validation set and metric


def validation_sets(opt: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of the sets that a training validates on, by their phase, such as ``val_2``."""
    return {phase: dataset for phase, dataset in opt['datasets'].items() if phase.split('_')[0] == 'val'}


def names_in_records(opt: Mapping[str, Any]) -> dict[str, str]:
    """The names that a training's records have of validation sets and metrics, by the option that says each."""
    if opt.get('val') is None:  # which switches validation off
        return {}
    sets = {f'datasets.{phase}.name': str(dataset['name']) for phase, dataset in validation_sets(opt).items()}
    return {**sets, **{f'val.metrics.{name}': name for name in opt['val'].get('metrics') or {}}}


def describe_level(level_map: LevelMap, num_parameters: int, level: int) -> LevelRecord:
    """The sizes of one level of a backbone with ``num_parameters`` parameters in total."""
    masks = mask_of(level_map, level)
    kept, total = count(masks), sum(mask.numel() for mask in masks.values())
    return {
        'level': level,
        'sparsity': 1 - kept / total,
        'prunable': kept,
        'prunable_total': total,
        'parameters': num_parameters - total + kept,
        'parameters_total': num_parameters,
        'layer_density': {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()},
    }


def level_table(records: Iterable[LevelRecord]) -> str:
    """The records as a table with one row per level: sizes, then a column for each metric of each validation set."""
    rows = sorted(records, key=lambda record: record['level'])
    head = ['level', 'sparsity (prunable)', 'prunable', 'parameters', 'iterations']
    cells = [
        [
            str(row['level']),
            f'{row["sparsity"]:.4%}',
            f'{row["prunable"]:,}',
            f'{row["parameters"]:,}',
            str(row.get('iterations', '-')),
        ]
        for row in rows
    ]
    return table_with_metrics(head, cells, rows)
