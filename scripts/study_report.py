"""Write docs/results.md, and the figure in it, from docs/results.json (which scripts/study.py fills).

    python scripts/study_report.py

What has not been run yet is left out of the tables, and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from study import RUNS, SPARSITY, read_results

DOCS = Path(__file__).resolve().parent.parent / 'docs'
SETS = ('Set5', 'Set14', 'BSD100')
# PSNR on SETS as commonly tabulated, and parameters. All saw the 291 images, but for FSRCNN: T91 and General-100.
PUBLISHED = {
    'FSRCNN': (12_000, (37.00, 32.63, 31.53)),
    'DRRN': (297_000, (37.74, 33.23, 32.05)),
    'IDN': (553_000, (37.83, 33.30, 32.08)),
    'VDSR': (665_000, (37.53, 33.03, 31.90)),
    'MemNet': (677_000, (37.78, 33.28, 32.08)),
}
FAMILIES = {
    'main_forward': 'MSSR, own ticket of each level',
    'main_backward': '**MSSR, all levels in one set of weights**',
    'paper_forward': 'MSSR with rewound weights, own tickets',
    'paper_backward': 'MSSR with rewound weights, one set of weights',
    'one_shot': 'dense ticket pruned at once, trained on',
    'random': "random masks of the levels' layer densities",
    'dense_13k': 'small dense EDSR (8 blocks of 8 features)',
    'dense_26k': 'small dense EDSR (7 blocks of 12 features)',
}
COLUMNS = ('PSNR Set5', 'Set14', 'BSD100', 'SSIM Set5', 'Set14', 'BSD100')

INTRODUCTION = """# Results

Made by `python scripts/study_report.py` from [results.json](results.json), which `python scripts/study.py` fills; do
not edit. EDSR with 8 blocks of 32 features, x2, trained on T91 and BSDS200 (291 images), batch 8, LR patch 20, Adam
1e-3 with cosine annealing in each level, on a CPU. PSNR (dB) and SSIM on Y, border 2. One seed, so differences
of some hundredths mean nothing. Parameters are those kept, biases included.

## Main table

Iterations of a level are its own; it starts from what the levels before it have learned. A small dense EDSR has had as
many as the level of its size, or, in its second row, as all levels up to it together. `main` keeps the weights at a
pruning step and restarts the schedule (`train.rewind: lr`), `paper` rewinds them; both distil at 2 depths."""
CROPS = """## One photograph at every level

![A crop of a photograph by bicubic, at each level, and itself](crops.png)

`python scripts/crops.py models/EDSR_8x32_x2_291.mssr -o docs/crops.png`: scikit-image's motorcycle_left.png, PSNR of
the whole photograph."""
CHOICES = """1,000 iterations a level, {}. Mean PSNR of Set14 and BSD100, mean over the seeds (largest difference
between seeds)."""


def family(name: str) -> str:
    """The run's family: its name without the level or the length."""
    return re.sub(r'_(\d|long)$', '', name)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows)]
    return '\n'.join(lines)


def points(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every network of the main table: its run's name, the run's result, the network's record."""
    for name in [run.name for run in RUNS.values() if run.table == 'main' and run.name in results]:
        for record in results[name]['levels']:
            pretrained = name.startswith('one_shot') and record['level'] == 0
            if record['metrics'] and not pretrained:
                yield name, results[name], record


def main_table(results: Mapping[str, Any]) -> str:
    """A row for each network."""
    rows = []
    for name, result, record in points(results):
        level = int(name[-1]) if name[-1].isdigit() else record['level']
        quality = [f'{record["metrics"][dataset]["psnr"]:.2f}' for dataset in SETS]
        quality += [f'{record["metrics"][dataset]["ssim"]:.4f}' for dataset in SETS]
        # The backward stage takes over the smallest level as it is; of a stock training all iterations are one level's.
        iterations = record.get('iterations', 0 if name.endswith('backward') else result['iterations'])
        what = '' if name.startswith('dense') else f', level {level}'
        rows.append([FAMILIES[family(name)] + what, f'{record["parameters_kept"]:,}', f'{iterations:,}', *quality])
    for name, (parameters, psnr) in PUBLISHED.items():
        rows.append([f'{name}, published', f'{parameters:,}', '', *(f'{value:.2f}' for value in psnr), '', '', ''])
    return table(['network', 'parameters', 'iterations', *COLUMNS], rows)


def nested_gap(results: Mapping[str, Any], recipe: str) -> str:
    """How far each nested level is from its own ticket, in dB."""
    tickets, nested = (
        {record['level']: record['metrics'] for record in results[f'{recipe}_{stage}']['levels']}
        for stage in ('forward', 'backward')
    )
    rows = [
        [str(level), *(f'{nested[level][dataset]["psnr"] - tickets[level][dataset]["psnr"]:+.3f}' for dataset in SETS)]
        for level in sorted(nested)
    ]
    return table(['level', *SETS], rows)


def choices_table(results: Mapping[str, Any], stage: str) -> str:
    """The mean PSNR over seeds on Set14 and BSD100 together, of each level, with the spread between the seeds."""
    names = [run.name for run in RUNS.values() if run.table == 'choices' and run.stage == stage]
    rows = []
    for choice in dict.fromkeys(name.rpartition('_')[0] for name in names):
        runs = [results[name] for name in names if name.rpartition('_')[0] == choice and name in results]
        cells = []
        for level in range(len(SPARSITY)):
            records = [record['metrics'] for run in runs for record in run['levels'] if record['level'] == level]
            values = [mean(metrics[dataset]['psnr'] for dataset in SETS[1:]) for metrics in records]
            cells.append(f'{mean(values):.3f} ({max(values) - min(values):.3f})' if values else '')
        if runs:
            rows.append([choice, str(len(runs)), *cells])
    return table(['choice', 'seeds', *(f'level {level}' for level in range(len(SPARSITY)))], rows) if rows else ''


def runs_table(results: Mapping[str, Any]) -> str:
    """How each result was made."""
    rows = [
        [
            f'`{result["command"]}`',
            str(result['seed']),
            str(result['threads']),
            f'{result["iterations"]:,}',
            f'{result["seconds"] / 60:.0f} min',
            f'{1000 * result["seconds_per_iteration"]:.0f} ms',
            f'{1000 * result["data_seconds_per_iteration"]:.0f} ms',
        ]
        for result in results.values()
    ]
    return table(['command', 'seed', 'threads', 'iterations', 'wall time', 'an iteration', 'of it data'], rows)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """PSNR over parameters, a panel for each set."""
    figure, axes = plt.subplots(1, len(SETS), figsize=(14, 4.5), constrained_layout=True)
    lines: dict[str, list[Any]] = {}
    for name, _, record in points(results):
        lines.setdefault(re.sub(r'_\d$', '', name), []).append(record)
    for i, (dataset, axis) in enumerate(zip(SETS, axes)):
        for name, records in lines.items():
            sizes = [record['parameters_kept'] for record in records]
            quality = [record['metrics'][dataset]['psnr'] for record in records]
            label = FAMILIES[family(name)].strip('*') + (', as long as all levels' if name.endswith('long') else '')
            axis.plot(sizes, quality, 'o-' if len(records) > 1 else 's', label=label)
        for name, (parameters, psnr) in PUBLISHED.items():
            axis.plot(parameters, psnr[i], 'k+')
            side = {'xytext': (5, -3)} if parameters > 600_000 else {'xytext': (-5, -3), 'ha': 'right'}
            axis.annotate(name, (parameters, psnr[i]), textcoords='offset points', fontsize=8, **side)
        axis.set(title=f'{dataset}, x2', xlabel='parameters', ylabel='PSNR (dB)', xscale='log')
        axis.grid(alpha=0.3)
        axis.set_xlim(5e3, 3e6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def report(results: Mapping[str, Any]) -> str:
    """The whole of docs/results.md."""
    parts = [INTRODUCTION, main_table(results), '![PSNR over parameters](results.png)']
    for recipe in ('main', 'paper'):
        if {f'{recipe}_forward', f'{recipe}_backward'} <= results.keys():
            parts += [f'## Nested level minus own ticket, dB (`{recipe}`)', nested_gap(results, recipe)]
    for stage, note in (('forward', 'one change at a time to the paper recipe'), ('backward', 'from `reference`')):
        if choices := choices_table(results, stage):
            parts += [
                f'## Choices of the {stage} stage',
                CHOICES.format(note),
                choices,
            ]
    missing = [f'`{run.name}`' for run in RUNS.values() if run.table == 'main' and run.name not in results]
    choices_missing = sum(run.table == 'choices' and run.name not in results for run in RUNS.values())
    if choices_missing:
        missing.append(f'{choices_missing} runs of the choices (`python scripts/study.py list` names them)')
    parts += [
        CROPS,
        '## How to make them',
        '`python scripts/study.py data --images FOLDER`, then (wall times while the machine had other work)',
        runs_table(results),
    ]
    if missing:
        parts += [f'Not run yet: {", ".join(missing)}.']
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    results = read_results()
    plot(results, DOCS / 'results.png')
    (DOCS / 'results.md').write_text(report(results), 'utf-8')


if __name__ == '__main__':
    main()
