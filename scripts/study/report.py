"""Write docs/results.md, and its figures, from docs/results.json (which scripts/study/study.py fills).

    python scripts/study/report.py

Runs that have not been done yet are left out of the tables and listed at the end.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from runs import CHOICES_SPARSITY, RUNS
from study import read_results

from mssr_basicsr.scalable.plotting import draw_psnr, new_figure, save_figure

DOCS = Path(__file__).resolve().parents[2] / 'docs'
SETS = ('Set5', 'Set14', 'BSD100')
# What reading Set14's one grey file as colours, which BasicSR does, adds to the PSNR of the set's 14 images: grey of 0
# to 255 becomes Y of 16 to 235, and every error shrinks alike.
GREY_AS_COLOURS = 20 * math.log10(255 / 219) / 14
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
    'main_backward': 'MSSR, all levels in one set of weights, ground truth only',
    'main_backward_teacher': '**MSSR, all levels in one set of weights**, tickets as second target',
    'long_forward': 'MSSR, longer (60,000 iterations a level, batch 16, LR patch 24, LAMP), own ticket of each level',
    'long_backward': 'MSSR, longer, all levels in one set of weights',
    'edsr_m_forward': 'MSSR on EDSR-M, own ticket of each level',
    'edsr_m_backward': 'MSSR on EDSR-M, all levels in one set of weights',
    'one_shot': 'dense ticket pruned in one shot (LAMP), then trained',
    'random': "random masks with the levels' layer densities",
    'dense_13k': 'small dense EDSR (8 blocks of 8)',
    'dense_13k_long': 'small dense EDSR (8 blocks of 8), iterations of all levels together',
    'dense_26k': 'small dense EDSR (7 blocks of 12)',
    'dense_26k_long': 'small dense EDSR (7 blocks of 12), iterations of levels 0 to 3 together',
}
SHORT = ('choices', 'cost')  # tables whose runs are only compared with each other
COLUMNS = ('PSNR Set5', 'Set14', 'BSD100', 'SSIM Set5', 'Set14', 'BSD100')

INTRODUCTION = """# Results

Made by `python scripts/study/report.py` from [results.json](results.json), which `python scripts/study/study.py` fills;
do not edit. EDSR with 8 blocks of 32 features, x2, trained on T91 and BSDS200 (291 images), batch 8, LR patch 20, Adam
1e-3 (backward stage: 3e-3) with cosine annealing in each level, on a CPU. The main table has one seed, so differences
of a few hundredths of a dB mean nothing. Parameter counts are of the weights kept, including biases.

PSNR (dB) and SSIM follow published work: on Y, not rounded unless stated, border 2, and a greyscale ground-truth file
is taken as Y itself (`evaluation: published` in results.json). Most runs were validated with BasicSR's own metrics
(`evaluation: basicsr`), which read Set14's one greyscale file as RGB. For any network, that adds 20 log10(255 / 219) /
14 = 0.094 dB to Set14's PSNR, which is subtracted here; Set14's SSIM of these runs is left out. The shipped file has
been measured again: `python scripts/study/evaluate.py models/EDSR_8x32_x2_291.mssr --images FOLDER`.

## Main table

The iterations of a level are its own; it starts from what the levels before it have learned. A small dense EDSR is
trained for as many iterations as the level of its size or, in its second row, as all levels up to it together. `main`
keeps the weights at a pruning step and restarts the schedule (`train.rewind: lr`), with self-distillation at 2 depths.
The dense ticket that is pruned in one shot is pruned by LAMP: at 93.75 %, global magnitude would
leave nothing of its last convolution."""
REPEATS = """## Reproducibility

Runs that were done twice with the same options: PSNR of the first run, and how the second differs. `main_forward` gave
the same bits on two machines. The others were run in between on a third, whose processor rounds differently."""
CROPS = """## One photograph at every level

![A crop of a photograph, upscaled by bicubic and at each level, and the original](crops.png)

`python scripts/side_by_side.py models/EDSR_8x32_x2_291.mssr --downscale --crop 360 300 110 -o docs/crops.png`:
scikit-image's motorcycle_left.png, with the PSNR of the whole photograph."""
TRIED = """The following was tried by hand to close the gap, with one seed and on level 3 alone (its ticket has 37.20 /
32.79 / 31.69), with model classes such as those in [scripts/study/variants.py](../scripts/study/variants.py). Most of
it is repeated at a shorter schedule under Choices. Set14 is as BasicSR reads it, 0.094 dB above the published
protocol.

| level 3 | Set5 | Set14 | BSD100 |
| --- | --- | --- | --- |
| 5,000 iterations, learning rate 1e-3 | 37.06 | 32.76 | 31.64 |
| the same, with separate biases | 37.06 | 32.77 | 31.64 |
| the same, with self-distillation at 2 depths, its ticket being the larger network | 37.05 | 32.77 | 31.65 |
| the same, with its ticket's output as a second target | 37.10 | 32.77 | 31.65 |
| 5,000 iterations of all weights, at level 4 and a random larger level together | 36.95 | 32.71 | 31.60 |
| 5,000 iterations, learning rate 3e-3 | 37.10 | 32.78 | 31.66 |
| the same, with its ticket's output as a second target | 37.13 | 32.78 | 31.66 |
| 5,000 iterations, learning rate 1e-2 | 37.07 | 32.76 | 31.65 |
| **15,000 iterations, learning rate 3e-3** | 37.16 | 32.81 | 31.68 |
| 30,000 iterations, learning rate 3e-3, schedule restarted once | 37.16 | 32.82 | 31.68 |

More iterations and a larger learning rate help, up to about 15,000 iterations; the longest of these runs did not make
the following level 2 better (37.22 / 32.87 / 31.73 after 15,000 iterations). The remaining gap is the price of frozen
weights. Using its ticket's output as a second target spreads a level's gap over the sets and helps level 1 most; on
average over all levels and sets it changes nothing."""
CHOICES = """## Choices

One change at a time, at a shorter schedule: levels of 0, 75 and 93.75 % sparsity, 1,000 iterations each. Mean PSNR (dB)
over Set14 and BSD100 and over the seeds; in parentheses, the largest difference between seeds.

![The effect of each choice](choices.png)

### Forward stage

`reference` is the paper's recipe: `train.rewind: weights`, self-distillation at 2 depths with the ground truth as the
target, global magnitude. A rewound ticket has seen level 0's iterations up to the rewind point and its own; a ticket
whose weights were kept (`rewind_lr`, `rewind_none`) has seen those of all levels up to it. `rewind_weights_equal_total`
rewinds and trains level k for k + 1 times as long, so that its weights see as many iterations in total as those of
`rewind_lr`. The whole run then has twice as many iterations, as does `rewind_lr_longer`, which keeps the weights.

`rewind_weights_equal_total` and `lamp` (seed 1) were run on a different processor from the rest of this table, on which
`rewind_lr` gave 0.13 dB more at 93.75 % (see below): there, smaller differences mean nothing."""
COST = """## What cheaper training costs

The paper's recipe at the short schedule of Choices: in fp32 (`reference` there); in bf16 and channels-last; and in bf16
and channels-last with self-distillation of half of each batch (`ssd_opt.batch_share: 0.5`), at two depths and at one.
Mean PSNR over Set14 and BSD100 and over the seeds; in parentheses, the largest difference between seeds."""
CHOICES_BACKWARD = """### Backward stage

Each nested level minus its own ticket, starting from the tickets of `rewind_lr`. `reference` recovers weights with the
values that they were pruned at (`train.recover: ticket`) and trains with a learning rate of 3e-3. `private_others`
trains the biases at each level, as if each level had its own. `ticket_teacher` adds the ticket's output as a second
target (`train.ticket_opt`). `joint` first trains all weights for 1,000 iterations, at the smallest level and a random
larger one together, and only then freezes them; this and `private_others` are in
[scripts/study/variants.py](../scripts/study/variants.py). `longer` trains each level for 3,000 iterations."""


def family(name: str) -> str:
    """The run's family: its name without the level, or without the seed."""
    return re.sub(r'_(seed)?\d$', '', name)


def as_published(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results by the published protocol: PSNR of what BasicSR's metrics measured is corrected, which is exact."""
    published: dict[str, Any] = copy.deepcopy(dict(results))
    for last in published.values():
        for result in (last, *last.get('earlier', [])):
            for record in (*result['levels'], *result.get('tickets', [])):
                if record['evaluation'] == 'basicsr' and 'Set14' in record['metrics']:
                    record['metrics']['Set14']['psnr'] -= GREY_AS_COLOURS
                    record['metrics']['Set14']['ssim'] = None
    return published


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows)]
    return '\n'.join(lines)


def points(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every network of the main table, EDSR-M included: its run's name, the run's result, the network's record."""
    for name in [run.name for run in RUNS.values() if run.table not in SHORT and run.name in results]:
        for record in results[name]['levels']:
            pretrained = name.startswith('one_shot') and record['level'] == 0
            if record['metrics'] and not pretrained:
                yield name, results[name], record


def main_table(results: Mapping[str, Any]) -> str:
    """A row for each network."""
    rows = []
    for name, result, record in points(results):
        level = int(name[-1]) if name.startswith(('one_shot', 'random')) else record['level']
        quality = [f'{record["metrics"][dataset]["psnr"]:.2f}' for dataset in SETS]
        ssims = [record['metrics'][dataset]['ssim'] for dataset in SETS]
        quality += ['' if ssim is None else f'{ssim:.4f}' for ssim in ssims]
        # The backward stage takes over the smallest level as it is; of a stock training all iterations are one level's.
        iterations = record.get('iterations', 0 if 'backward' in name else result['iterations'])
        what = '' if name.startswith('dense') else f', level {level}'
        rows.append([FAMILIES[family(name)] + what, f'{record["parameters"]:,}', f'{iterations:,}', *quality])
    for name, (parameters, psnr) in PUBLISHED.items():
        rows.append([f'{name}, published', f'{parameters:,}', '', *(f'{value:.2f}' for value in psnr), '', '', ''])
    return table(['network', 'parameters', 'iterations', *COLUMNS], rows)


def psnr_by_level(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """PSNR by level and set, of the levels that have been validated."""
    return {
        record['level']: {dataset: metrics['psnr'] for dataset, metrics in record['metrics'].items()}
        for record in records
        if record['metrics']
    }


def gaps(result: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """How far each nested level of a backward stage is from its own ticket, in dB, by level and set."""
    tickets, nested = psnr_by_level(result['tickets']), psnr_by_level(result['levels'])
    return {k: {name: nested[k][name] - tickets[k][name] for name in SETS} for k in sorted(tickets)}


def nested_gap(result: Mapping[str, Any]) -> str:
    """:func:`gaps` as a table."""
    iterations = {record['level']: record.get('iterations', 0) for record in result['levels']}
    rows = [[str(k), f'{iterations[k]:,}', *(f'{gap[name]:+.3f}' for name in SETS)] for k, gap in gaps(result).items()]
    return table(['level', 'iterations', *SETS], rows)


def targets(results: Mapping[str, Any]) -> str:
    """The targets and whether they were met, as far as they have been run."""
    lines = []
    if 'main_backward_teacher' in results:
        (smallest,) = [record for record in results['main_backward_teacher']['levels'] if record['level'] == 4]
        over = [
            [smallest['metrics'][name][key] - psnr for name, psnr in zip(SETS, PUBLISHED['FSRCNN'][1])]
            for key in ('psnr', 'psnr_rounded')
        ]
        unrounded, rounded = (' / '.join(f'{dB:+.2f}' for dB in each) for each in over)
        lines.append(
            '- The 93.75 % sparse level (12,911 parameters) over FSRCNN (12,000) on all three sets: '
            f'{"met" if min(map(min, over)) > 0 else "missed"}. The difference is {unrounded} dB, or '
            f'{rounded} dB with Y rounded to 8 bits, as in older papers.'
        )
    for name in [name for name in ('main_backward', 'main_backward_teacher') if name in results]:
        all_gaps = [gap for level in gaps(results[name]).values() for gap in level.values()]
        missed = sum(gap < -0.05 for gap in all_gaps)
        lines.append(
            f'- Each nested level within 0.05 dB of its own ticket, {len(all_gaps)} figures, `{name}`: '
            f'{f"missed by {missed}" if missed else "met by all"}; the largest deficit is {-min(all_gaps):.3f} dB, '
            f'the mean difference {mean(all_gaps):+.3f} dB.'
        )
    if 'edsr_m_backward' not in results:
        lines.append('- EDSR-M against VDSR and IDN: not run, since it requires a GPU.')
    return '\n'.join(lines)


def runs_of(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The results of each time a run was done, the last first; empty if it never was."""
    return [results[name], *reversed(results[name].get('earlier', []))] if name in results else []


def repeats(results: Mapping[str, Any]) -> str:
    """PSNR of runs done more than once: the first time, and the difference of the last time from it."""
    rows = []
    for name in results:
        last, *before = runs_of(results, name)
        for earlier in before[-1:]:
            first, again = psnr_by_level(earlier['levels']), psnr_by_level(last['levels'])
            for level, psnr in first.items():
                cells = [f'{psnr[dataset]:.3f} {again[level][dataset] - psnr[dataset]:+.3f}' for dataset in SETS]
                rows.append([f'`{name}`', str(level), *cells])
    return table(['run', 'level', *SETS], rows) if rows else ''


def quality_of_choices(
    results: Mapping[str, Any], stage: str, which: str = 'choices'
) -> dict[str, dict[str, dict[int, float]]]:
    """The mean PSNR of Set14 and BSD100 by choice (of those in table ``which`` that have been run), seed and level.

    For backward stages, it is relative to the tickets that they started from.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in RUNS.values():
        if run.table == which and run.stage == stage and run.name in results:
            choice, _, seed = re.sub('^(nested|cost)_', '', run.name).rpartition('_')
            quality = mean_psnr(results[run.name]['levels'])
            if stage == 'backward':
                tickets = mean_psnr(results[run.name]['tickets'])
                quality = {level: value - tickets[level] for level, value in quality.items()}
            found.setdefault(choice, {})[seed] = quality
    return found


def mean_psnr(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The mean PSNR of Set14 and BSD100 by level."""
    return {level: mean(psnr[dataset] for dataset in SETS[1:]) for level, psnr in psnr_by_level(records).items()}


def choices_table(results: Mapping[str, Any], stage: str, which: str = 'choices') -> str:
    """A row for each choice: mean and spread over its seeds, at each level."""
    rows = []
    for choice, seeds in quality_of_choices(results, stage, which).items():
        cells = []
        for level in range(len(CHOICES_SPARSITY)):
            values = [quality[level] for quality in seeds.values() if level in quality]
            sign = '+' if stage == 'backward' else ''
            spread = f' ({max(values) - min(values):.3f})' if len(values) > 1 else ''
            cells.append(f'{mean(values):{sign}.3f}{spread}' if values else '')
        rows.append([f'`{choice}`', str(len(seeds)), *cells])
    return table(['choice', 'seeds', *(f'{share:.2%} sparse'.replace('.00', '') for share in CHOICES_SPARSITY)], rows)


def plot_choices(results: Mapping[str, Any], path: Path) -> None:
    """The effect of each choice: a dot per level and seed; forward stages relative to the same seed's reference."""
    figure, axes = new_figure(1, 2, figsize=(14, 7))
    for axis, stage, against in zip(axes, ('forward', 'backward'), ('the reference', 'the own ticket')):
        choices = quality_of_choices(results, stage)
        base = choices.pop('reference') if stage == 'forward' else {}
        for row, seeds in enumerate(choices.values()):
            for seed, quality in seeds.items():
                for level, value in quality.items():
                    change = value - base[seed][level] if base else value
                    axis.plot(change, row + 0.2 * (level - 1), 'o', color=f'C{level}')
        axis.set_yticks(range(len(choices)), list(choices))
        axis.invert_yaxis()
        axis.axvline(0, color='k', linewidth=0.8)
        axis.set_xscale('symlog', linthresh=0.1)
        axis.set(title=f'{stage} stage', xlabel=f'PSNR, Set14 and BSD100, against {against} (dB; linear within 0.1)')
        axis.grid(alpha=0.3)
    for level, share in enumerate(CHOICES_SPARSITY):
        axes[1].plot([], [], 'o', color=f'C{level}', label=f'level {level}, {share:.2%} sparse')
    figure.legend(*axes[1].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    save_figure(figure, path, dpi=90)


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
    return table(['command', 'seed', 'threads', 'iterations', 'wall time', 'per iteration', 'of which data'], rows)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """PSNR over parameters, a panel for each set."""
    figure, axes = new_figure(1, len(SETS), figsize=(14, 4.5))
    families: dict[str, list[Any]] = {}
    for name, _, record in points(results):
        families.setdefault(FAMILIES[family(name)].replace('*', ''), []).append(record)
    for i, (dataset, axis) in enumerate(zip(SETS, axes)):
        lines = {
            label: [(record['parameters'], record['metrics'][dataset]['psnr']) for record in records]
            for label, records in families.items()
        }
        draw_psnr(axis, lines, 'parameters', {label: 's' for label, line in lines.items() if len(line) == 1})
        for name, (parameters, psnr) in PUBLISHED.items():
            axis.plot(parameters, psnr[i], 'k+')
            side = {'xytext': (5, -3)} if parameters > 600_000 else {'xytext': (-5, -3), 'ha': 'right'}
            axis.annotate(name, (parameters, psnr[i]), textcoords='offset points', fontsize=8, **side)
        axis.set_title(f'{dataset}, x2')
        axis.set_xlim(5e3, 3e6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    save_figure(figure, path, dpi=110)


def report(results: Mapping[str, Any]) -> str:
    """The text of docs/results.md, from the results that study.py keeps."""
    results = as_published(results)
    parts = [INTRODUCTION, main_table(results), '![PSNR over parameters](results.png)']
    parts += ['## Targets', targets(results)]
    parts.append('## Nested level minus own ticket, dB')
    for name in [run.name for run in RUNS.values() if run.stage == 'backward' and run.table not in SHORT]:
        if name in results:
            parts += [f'`{name}`:', nested_gap(results[name])]
    parts.append(TRIED)
    for stage, note in (('forward', CHOICES), ('backward', CHOICES_BACKWARD)):
        if quality_of_choices(results, stage):
            parts += [note, choices_table(results, stage)]
    if quality_of_choices(results, 'forward', 'cost'):
        parts += [COST, choices_table(results, 'forward', 'cost')]
    repeated = repeats(results)
    if repeated:
        parts += [REPEATS, repeated]
    missing = [f'`{run.name}`' for run in RUNS.values() if run.table not in SHORT and run.name not in results]
    for which in SHORT:
        count = sum(run.table == which and run.name not in results for run in RUNS.values())
        if count:
            missing.append(f'{count} runs of the table `{which}` (`python scripts/study/study.py list` names them)')
    parts += [
        CROPS,
        '## Commands',
        '`python scripts/study/study.py data --images FOLDER`, then (wall times on a machine with other work to do):',
        runs_table(results),
    ]
    if missing:
        parts += [f'Not run yet: {", ".join(missing)}.']
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    kept = read_results()
    results = as_published(kept)
    plot(results, DOCS / 'results.png')
    if quality_of_choices(results, 'forward'):
        plot_choices(results, DOCS / 'choices.png')
    (DOCS / 'results.md').write_text(report(kept), 'utf-8')


if __name__ == '__main__':
    main()
