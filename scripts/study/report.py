"""Write docs/results.md, and its figures, from results_template.md and docs/results.json (which study.py fills).

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
from string import Template
from types import MappingProxyType
from typing import Any, NamedTuple

from matplotlib import colormaps
from runs import CHOICES_SPARSITY, RUNS
from study import read_results

from mssr_basicsr.scalable.plotting import draw_psnr, new_figure, save_figure

DOCS = Path(__file__).resolve().parents[2] / 'docs'
TEMPLATE = Path(__file__).with_name('results_template.md')
SETS = ('Set5', 'Set14', 'BSD100')
# What reading Set14's one grey file as colours, which BasicSR does, adds to the PSNR of the set's 14 images: grey of 0
# to 255 becomes Y of 16 to 235, and every error shrinks alike.
GREY_AS_COLOURS = 20 * math.log10(255 / 219) / 14


class Published(NamedTuple):
    """A network as commonly tabulated."""

    parameters: int
    psnr: tuple[float, float, float]  #: on SETS
    data: str = '291'  #: what it was trained on


PUBLISHED = {
    'ECBSR-M4C16': Published(11_600, (37.18, 32.79, 31.61), 'DIV2K'),
    'FSRCNN': Published(12_000, (37.00, 32.63, 31.53), '91 + General-100'),
    'ETDS-S': Published(41_500, (37.38, 32.96, 31.77), 'DIV2K'),
    'ECBSR-M6C40': Published(92_400, (37.61, 33.18, 31.94), 'DIV2K'),
    'DRRN': Published(297_000, (37.74, 33.23, 32.05)),
    'IDN': Published(553_000, (37.83, 33.30, 32.08)),
    'VDSR': Published(665_000, (37.53, 33.03, 31.90)),
    'MemNet': Published(677_000, (37.78, 33.28, 32.08)),
}
PUBLISHED_X4 = {'FSRCNN': Published(12_000, (30.71, 27.59, 26.98), '91 + General-100')}
FAMILIES = {
    'main_forward': 'MSSR, own ticket of each level',
    'main_backward': 'MSSR, all levels in one set of weights, ground truth only',
    'main_backward_teacher': '**MSSR, all levels in one set of weights**, tickets as second target',
    'one_shot': 'dense ticket pruned in one shot (LAMP), then trained',
    'random': "random masks with the levels' layer densities",
    'dense_13k': 'small dense EDSR (8 blocks of 8)',
    'dense_13k_long': 'small dense EDSR (8 blocks of 8), iterations of all levels together',
    'dense_26k': 'small dense EDSR (7 blocks of 12)',
    'dense_26k_long': 'small dense EDSR (7 blocks of 12), iterations of levels 0 to 3 together',
    'long_forward': 'longer, own ticket of each level',
    'long_backward': '**longer, all levels in one set of weights**',
    'long_unaugmented': 'longer, without scale augmentation, own ticket of each level',
    'long_paper': "longer, the paper's recipe, own ticket of each level",
    'long_dense_13k': 'small dense EDSR (8 blocks of 8), longer, iterations of the forward stage',
    'long_dense_13k_equal_time': 'small dense EDSR (8 blocks of 8), longer, time of the forward stage',
    'long_one_shot': 'dense ticket pruned in one shot (LAMP), longer',
    'long_random': 'dense ticket pruned at random in one shot, longer',
    'edsr_m_forward': 'EDSR-M, own ticket of each level',
    'edsr_m_backward': '**EDSR-M, all levels in one set of weights**',
    'edsr_m_unaugmented_forward': 'EDSR-M, without scale augmentation, own ticket of each level',
    'x4_forward': 'own ticket of each level',
    'x4_backward': '**all levels in one set of weights**',
    'srvgg_forward': 'SRVGGNetCompact, own ticket of each level',
    'srvgg_backward': '**SRVGGNetCompact, all levels in one set of weights**',
    'trained_tenth_forward': 'a tenth, own ticket of each level',
    'trained_tenth_backward': '**a tenth, all levels in one set of weights**',
    'trained_third_forward': 'a third, own ticket of each level',
    'trained_third_backward': '**a third, all levels in one set of weights**',
    'gan_forward': 'own ticket of each level',
    'gan_backward': '**all levels in one set of weights**',
}
NESTED = ('main_backward', 'main_backward_teacher', 'long_backward_seed1', 'long_backward_seed2')
OVER = {'FSRCNN': 0.1, 'ECBSR-M4C16': 0}  # by how many dB the smallest of those should be ahead
SHORT = ('choices', 'cost')  # tables whose runs are only compared with each other
X2 = ('main', 'long', 'edsr_m', 'srvgg')  # tables that can be compared with published networks


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


def points(
    results: Mapping[str, Any], tables: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every network of these tables: its run's name, the run's result, the network's record."""
    for name in [run.name for run in RUNS.values() if run.table in tables and run.name in results]:
        for record in results[name]['levels']:
            pretrained = 'one_shot' in name and record['level'] == 0
            if record['metrics'] and not pretrained:
                yield name, results[name], record


def networks(
    results: Mapping[str, Any],
    which: str,
    published: Mapping[str, Published] = MappingProxyType({}),
    second: str = 'ssim',
) -> str:
    """A table with a row for each network of the table ``which``: PSNR and a second metric; and the published ones."""
    rows = []
    for name, result, record in points(results, [which]):
        level = int(name[-1]) if name.startswith(('one_shot', 'random')) else record['level']
        quality = [f'{record["metrics"][dataset]["psnr"]:.2f}' for dataset in SETS]
        others = [record['metrics'][dataset][second] for dataset in SETS]
        quality += ['' if value is None else f'{value:.4f}' for value in others]
        # A stage takes over as it is what it starts from; of a stock training all iterations are one level's.
        iterations = record.get('iterations', result['iterations'] if len(result['levels']) == 1 else 0)
        what = '' if 'dense' in name else f', level {level}'
        seed = f', seed {result["seed"]}' if '_seed' in name else ''
        rows.append([FAMILIES[family(name)] + what + seed, f'{record["parameters"]:,}', f'{iterations:,}', *quality])
    if not rows:
        return f'Not run yet: `python scripts/study/study.py run {which}`.'
    for name, known in published.items():
        quality = [f'{value:.2f}' for value in known.psnr]
        rows.append([f'{name}, published, trained on {known.data}', f'{known.parameters:,}', '', *quality, '', '', ''])
    columns = [f'PSNR {SETS[0]}', *SETS[1:], f'{second.upper()} {SETS[0]}', *SETS[1:]]
    return table(['network', 'parameters', 'iterations', *columns], rows)


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


def gap_tables(results: Mapping[str, Any]) -> str:
    """:func:`gaps` of each backward stage, as a table."""
    names = [run.name for run in RUNS.values() if run.stage == 'backward' and run.table not in SHORT]
    return '\n\n'.join(f'`{name}`:\n\n{gap_table(results[name])}' for name in names if name in results)


def gap_table(result: Mapping[str, Any]) -> str:
    """:func:`gaps` of a backward stage, as a table."""
    iterations = {record['level']: record.get('iterations', 0) for record in result['levels']}
    rows = [[str(k), f'{iterations[k]:,}', *(f'{gap[name]:+.3f}' for name in SETS)] for k, gap in gaps(result).items()]
    return table(['level', 'iterations', *SETS], rows)


def targets(results: Mapping[str, Any]) -> str:
    """The targets and whether they were met, as far as they have been run."""
    lines = []
    for name in [name for name in NESTED if name in results]:
        if name != 'main_backward':  # its smallest level is that of main_backward_teacher, measured again there
            lines += [over_published(name, results[name], 4, known, margin) for known, margin in OVER.items()]
        lines.append(within_tickets(name, results[name]))
    lines += levels_in_order(results)
    if 'x4_backward' in results:
        lines.append(over_published('x4_backward', results['x4_backward'], 4, 'FSRCNN', 0, PUBLISHED_X4))
        lines.append(within_tickets('x4_backward', results['x4_backward']))
    if 'edsr_m_backward' in results:
        lines.append(over_published('edsr_m_backward', results['edsr_m_backward'], 4, 'VDSR', 0))
    else:
        lines.append('- EDSR-M against VDSR: not run yet.')
    return '\n'.join(lines)


def over_published(
    name: str,
    result: Mapping[str, Any],
    level: int,
    known: str,
    margin: float,
    published: Mapping[str, Published] = PUBLISHED,
) -> str:
    """Whether a level is ahead of a published network by ``margin`` dB on every set, and how far it is ahead."""
    (found,) = [record for record in result['levels'] if record['level'] == level]
    over = {
        key: [found['metrics'][dataset][key] - psnr for dataset, psnr in zip(SETS, published[known].psnr)]
        for key in ('psnr', 'psnr_rounded')
        if key in found['metrics'][SETS[0]]
    }
    by = f' by {margin} dB' if margin else ''
    met = min(map(min, over.values())) >= margin
    differences = [' / '.join(f'{dB:+.2f}' for dB in each) for each in over.values()]
    return (
        f'- Level {level} of `{name}` ({found["parameters"]:,} parameters) over {known} '
        f'({published[known].parameters:,}, trained on {published[known].data}){by} on all three sets: '
        f'{"met" if met else "missed"}. The difference is {differences[0]} dB'
        + (f', or {differences[1]} dB with Y rounded to 8 bits, as in older papers.' if differences[1:] else '.')
    )


def within_tickets(name: str, result: Mapping[str, Any]) -> str:
    """Whether every nested level is within 0.05 dB of its own ticket, and none is behind on average."""
    all_gaps = [gap for level in gaps(result).values() for gap in level.values()]
    missed = sum(gap < -0.05 for gap in all_gaps)
    return (
        f'- Each nested level within 0.05 dB of its own ticket, {len(all_gaps)} figures, `{name}`: '
        f'{f"missed by {missed}" if missed else "met by all"}; the largest deficit is {-min(all_gaps):.3f} dB, '
        f'the mean difference {mean(all_gaps):+.3f} dB.'
    )


def levels_in_order(results: Mapping[str, Any]) -> list[str]:
    """Of the longer training: whether each level is ahead of the next smaller, and how good the dense one is.

    A difference counts if it is larger than those between seeds, once there are two.
    """
    seeds = [psnr_by_level(results[name]['levels']) for name in NESTED if name.startswith('long') and name in results]
    if not seeds:
        return []
    psnr = {k: {dataset: mean(seed[k][dataset] for seed in seeds) for dataset in SETS} for k in seeds[0]}
    spread = max(abs(seed[k][dataset] - seeds[0][k][dataset]) for seed in seeds for k in psnr for dataset in SETS)
    steps = [psnr[k][dataset] - psnr[k + 1][dataset] for k in sorted(psnr)[:-1] for dataset in SETS]
    behind = sum(step <= spread for step in steps)
    known = f'the largest difference between seeds, {spread:.3f} dB,' if seeds[1:] else '0 dB (one seed)'
    dense = psnr[0][SETS[0]]
    return [
        f'- Each level of the longer training ahead of the next smaller by more than {known} on each set: '
        f'{f"missed by {behind} of {len(steps)}" if behind else "met by all"}; '
        f'the smallest step is {min(steps):+.3f} dB.',
        f'- The dense level of the longer training at least 37.60 dB on {SETS[0]}: '
        f'{"met" if dense >= 37.6 else "missed"}, with {dense:.2f} dB.',
    ]


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
    return table(['run', 'level', *SETS], rows)


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
    """PSNR over parameters, a panel for each set; published networks as a cross, upright if they saw the 291 images."""
    figure, axes = new_figure(1, len(SETS), figsize=(14, 4.5))
    families: dict[str, list[Any]] = {}
    for name, _, record in points(results, X2):
        families.setdefault(FAMILIES[family(name)].replace('*', ''), []).append(record)
    for i, (dataset, axis) in enumerate(zip(SETS, axes)):
        lines = {
            label: [(record['parameters'], record['metrics'][dataset]['psnr']) for record in records]
            for label, records in families.items()
        }
        axis.set_prop_cycle(color=colormaps['tab20'].colors)  # there are more families than default colours
        draw_psnr(axis, lines, 'parameters', {label: 's' for label, line in lines.items() if len(line) == 1})
        for name, known in PUBLISHED.items():
            place = (known.parameters, known.psnr[i])
            axis.plot(*place, 'kx' if known.data == 'DIV2K' else 'k+')
            side = {'xytext': (5, -3)} if known.parameters > 600_000 else {'xytext': (-5, -3), 'ha': 'right'}
            axis.annotate(name, place, textcoords='offset points', fontsize=8, **side)
        axis.set_title(f'{dataset}, x2')
        axis.set_xlim(1.5e3, 3e6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8)
    save_figure(figure, path, dpi=110)


def not_run(results: Mapping[str, Any]) -> str:
    """What is still to be run."""
    missing = [run.name for run in RUNS.values() if run.name not in results]
    return f'Not run yet: {", ".join(f"`{name}`" for name in missing)}.' if missing else 'All have been run.'


def report(results: Mapping[str, Any]) -> str:
    """The text of docs/results.md: that of results_template.md, with the results that study.py keeps."""
    results = as_published(results)
    return Template(TEMPLATE.read_text('utf-8')).substitute(
        main=networks(results, 'main', PUBLISHED),
        long=networks(results, 'long', PUBLISHED),
        edsr_m=networks(results, 'edsr_m', PUBLISHED),
        x4=networks(results, 'x4', PUBLISHED_X4),
        srvgg=networks(results, 'srvgg', PUBLISHED),
        trained=networks(results, 'trained'),
        gan=networks(results, 'gan', second='niqe'),
        targets=targets(results),
        gaps=gap_tables(results),
        choices_forward=choices_table(results, 'forward'),
        choices_backward=choices_table(results, 'backward'),
        cost=choices_table(results, 'forward', 'cost'),
        repeats=repeats(results),
        commands=runs_table(results),
        not_run=not_run(results),
    )


def main() -> None:
    kept = read_results()
    results = as_published(kept)
    plot(results, DOCS / 'results.png')
    plot_choices(results, DOCS / 'choices.png')
    (DOCS / 'results.md').write_text(report(kept), 'utf-8')


if __name__ == '__main__':
    main()
