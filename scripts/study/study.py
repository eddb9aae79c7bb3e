"""Measure MSSR on Set5, Set14 and BSD100, with networks small enough to train on a CPU.

    python scripts/study/study.py data --images FOLDER   # FOLDER holds T91, BSDS200, Set5, Set14 and BSD100
    python scripts/study/study.py run main               # or the name of any run or table; see: study.py list
    python scripts/study/study.py list

scripts/study/runs.py tells what the runs are. One that was stopped continues from its last save; a finished one is not
repeated. Results are kept in docs/results.json, from which scripts/study/report.py makes docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.archs import build_network
from runs import DENSE, LATEST, RANDOM_MASKS, ROOT, RUNS, Run, options_of

from mssr_basicsr.adapter.records import RECORDS, describe_level
from mssr_basicsr.foundation.saving import write_whole

sys.path.insert(0, str(ROOT / 'scripts'))

import variants
from prepare_data import DataError, prepare
from training_logs import iteration_seconds, read_logs, wall_seconds

RESULTS = ROOT / 'docs' / 'results.json'

# For glibc: memory that is freed stays with the process, which otherwise gets it back page by page. On a CPU that takes
# a tenth to a fifth off an iteration of the 8x32 network, and off its validation; the results are the same bits. The
# pad alone would hold the threshold down, above which glibc gives each freed tensor back at once.
KEEP_FREED_MEMORY = {
    'MALLOC_TOP_PAD_': '100000000',
    'MALLOC_TRIM_THRESHOLD_': '1000000000',
    'MALLOC_MMAP_THRESHOLD_': '33554432',
}


# ------------------------------ running ------------------------------ #


def train(run: Run, again: bool = False) -> None:
    """Do a run, or what is left of it, and keep what it gave; ``again`` if its result is known but not its files."""
    if run.name in read_results() and not again:
        print(f'{run.name}: done already')
        return
    for file in map(Path, run.needs):
        if not file.is_file():
            train(RUNS[file.parts[1]], again=True)
    if run.changes.get('path.pretrain_network_g') == RANDOM_MASKS:
        write_random_masks()
    options = Path('experiments', f'{run.name}.yml')
    options.parent.mkdir(exist_ok=True)
    options.write_text(yaml.safe_dump(options_of(run), sort_keys=False))
    program = ['-m', 'mssr_basicsr.train']
    if hasattr(variants, run.changes.get('model_type', '')):
        program = [variants.__file__]
    command = [*program, '-opt', str(options), '--auto_resume']
    print('python', *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, env={**KEEP_FREED_MEMORY, **os.environ})
    keep(run)


def keep(run: Run) -> None:
    """Write what a finished run gave into docs/results.json; if it was run before, beside what it gave then."""
    experiment = Path('experiments', run.name)
    logs, levels = read_logs(experiment), experiment / 'models' / RECORDS
    seconds, data_seconds = iteration_seconds(logs)
    result = {
        'table': run.table,
        'command': f'python scripts/study/study.py run {run.name}',
        'changes': dict(run.changes),
        'seed': options_of(run)['manual_seed'],
        'iterations': options_of(run)['train']['total_iter'],
        'seconds': round(wall_seconds(logs)),
        'seconds_per_iteration': round(seconds, 4),
        'data_seconds_per_iteration': round(data_seconds, 4),
        'threads': torch.get_num_threads(),
        'levels': json.loads(levels.read_text()) if levels.is_file() else [record_of_stock(run, logs[-1])],
    }
    for record in result['levels']:
        record['evaluation'] = 'published'  # by the metrics that the options name; before, some had BasicSR's
    results = read_results()
    if run.stage == 'backward':  # what it is compared with; the forward stage may be run again some day
        tickets = results[Path(run.needs[0]).parts[1]]['levels']
        result['tickets'] = [{key: ticket[key] for key in ('level', 'metrics', 'evaluation')} for ticket in tickets]
    before = results.get(run.name)
    if before is not None:
        result['earlier'] = [*before.pop('earlier', []), before]
    results[run.name] = result
    write_whole(RESULTS, (json.dumps(results, indent=1) + '\n').encode())


def record_of_stock(run: Run, log: str) -> dict[str, Any]:
    """Of a network that BasicSR's own model trained: its parameters and last metrics, as in levels.json."""
    options = options_of(run)['network_g']
    network = build_network(options)
    if options['type'] == 'MSSR':
        network.load_state_dict(torch.load(LATEST.format(run.name), weights_only=True)['params'])
        parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
        record: Any = describe_level(network.get_level_map(), parameters, options['level'])
    else:
        record = {'level': 0, 'parameters': sum(parameter.numel() for parameter in network.parameters())}
    metrics: dict[str, dict[str, float]] = {}
    for dataset, lines in re.findall(r'Validation (\w+)\n((?:\t # .*\n)+)', log):
        metrics[dataset] = {name: float(value) for name, value in re.findall(r'# (\w+): ([\d.]+)', lines)}
    return {**record, 'metrics': metrics}


def write_random_masks() -> None:
    """The dense ticket with a level map that has, in each layer, main_forward's levels in random places."""
    state = torch.load(LATEST.format('main_forward'), weights_only=True)['params']
    dense = torch.load(DENSE, weights_only=True)['params']
    generator = torch.Generator().manual_seed(0)
    for name, levels in state.items():
        if name.startswith('level_map.'):
            order = torch.randperm(levels.numel(), generator=generator)
            state[name] = levels.flatten()[order].view_as(levels)
    state.update({f'backbone.{name}': weight for name, weight in dense.items()})
    torch.save({'params': state}, RANDOM_MASKS)


def read_results() -> dict[str, Any]:
    """What is known so far, by run."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


# ------------------------------ the command ------------------------------ #


def make_data(images: Path) -> None:
    """The LMDBs that the options name, under datasets/."""
    with tempfile.TemporaryDirectory() as folder:
        for source in ('T91', 'BSDS200'):
            for path in (images / source).iterdir():
                os.symlink(path.resolve(), Path(folder, path.name))
        prepare(folder, 'datasets/T91_BSDS200_x2', 2, 72, 32)
        prepare(folder, 'datasets/T91_BSDS200_augmented_x2', 2, 72, 32, (90, 80, 70, 60))  # as for FSRCNN
        prepare(folder, 'datasets/T91_BSDS200_x4', 4, 76, 36)  # the smallest image has 78 rows
    for name in ('Set5', 'Set14', 'BSD100'):
        for scale in (2, 4):
            prepare(images / name, f'datasets/{name}_x{scale}', scale)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('data', help='write datasets/').add_argument('--images', type=Path, required=True)
    commands.add_parser('list', help='every run, and whether it is done')
    run = commands.add_parser('run', help='do runs')
    run.add_argument('names', nargs='+', choices=sorted({*RUNS, *(run.table for run in RUNS.values())}), metavar='NAME')
    args = parser.parse_args(argv)
    if args.command == 'data':
        try:
            make_data(args.images)
        except (DataError, OSError) as error:
            sys.exit(f'study: {error}')
    elif args.command == 'list':
        done = read_results()
        for name, described in RUNS.items():
            print(f'{described.table:8} {name:32} {"done" if name in done else ""}')
    else:
        for described in RUNS.values():
            if described.name in args.names or described.table in args.names:
                train(described)


if __name__ == '__main__':
    main()
