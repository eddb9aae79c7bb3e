"""Kill both stages of a tiny training with SIGKILL, again and again, and see that nothing is lost.

    python scripts/checks/chaos.py [--kills 40] [--ranks 1 2] [--seed 0] [--base-model SRModel]

For each number of ranks (1: plain; more: under torchrun) the two stages run once undisturbed. Then they run again and
are killed at random instants, half of them aimed: at a file of a save being made, written half, renamed or removed, and
before and after a level ends or begins. Each time they are resumed with --auto_resume. What a disturbed pair of stages
ends with (weights, EMA, level map, rewind point, every level's file, all metrics, the .mssr file, a discriminator) must
be the undisturbed one's, bit for bit. When a pair is done before all kills are spent, the next one begins. A run that
was killed before its first save begins anew; "resumes" counts those that went on from a save.

However slow the machine is and whatever the seed, each stage is killed at least once and resumed from a save: the first
kill of either stage comes where its first level meets the next, which every run passes, and which has saves before it.

The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import torch
import yaml
from toy import (
    add_degradation,
    add_discriminator,
    backward_options,
    forward_options,
    register_kernels_dataset,
    write_pairs,
)

MARK = 'MSSR_CHAOS'  # an environment variable that all processes of one training have, with a value of its own
FILE_EVENTS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')  # as Python's audit hooks name them
EVENTS = (
    'half of a save',
    *(f'{when} {what}' for what in ('a level begins', 'a level ends', 'resuming') for when in ('before', 'after')),
    *FILE_EVENTS,
)
NO_EVENT = ''
# What surely happens in a run from the start, and after its first save: which event, the how-manieth time.
SURE_EVENTS = (('before a level ends', 1), ('after a level ends', 1), ('before a level begins', 2))
STAGES = ('forward', 'backward')

# ------------------------------ the training that is killed ------------------------------ #


def options(folder: Path, stage: str, ranks: int, base_model: str) -> dict[str, Any]:
    """The toy options, with saves and epochs that begin within levels."""
    opt = {**forward_options(folder), 'base_model_type': base_model}
    # One worker where there is one rank. Under torchrun on a CPU a worker takes 10 s to end, whatever the model.
    num_worker = 1 if stage == 'forward' and ranks == 1 else 0
    opt['datasets']['train'].update(
        gt_size=16, batch_size_per_gpu=1, num_worker_per_gpu=num_worker, dataset_enlarge_ratio=5
    )
    opt['train']['scheduler']['periods'] = [12]
    # The criterion is the one that draws random numbers itself.
    opt['train'].update(level_iter=12, total_iter=36, criterion='random')
    opt['val']['val_freq'], opt['logger']['save_checkpoint_freq'] = 6, 5
    if stage == 'backward':
        opt = backward_options(opt)
        del opt['train']['criterion']
        opt['train']['expansion']['level_iter'] = 12
        opt['train'].update(total_iter=24, ticket_opt={'type': 'L1Loss'})
        opt['val']['val_freq'], opt['logger']['save_checkpoint_freq'] = 6, 4
    if base_model == 'ESRGANModel':
        add_discriminator(opt, base_model)
    elif base_model == 'RealESRNetModel':
        add_degradation(opt)
        opt['gt_size'] = 16  # out of 32: where, is drawn
    return opt


def child() -> None:
    """BasicSR's training, which kills itself when the event that the environment names happens for the n-th time."""
    from basicsr.train import train_pipeline

    from mssr_basicsr.models.levelwise_training import LevelwiseTraining as Training

    register_kernels_dataset()
    torch.set_num_threads(1)
    aimed_at = os.environ['CHAOS_EVENT'] if os.environ['CHAOS_RANK'] == os.environ.get('RANK', '0') else NO_EVENT
    experiments, events = str(Path.cwd() / 'experiments'), Counter[str]()

    def event(what: str, file: str = '', before_death: Callable[[], object] = lambda: None) -> None:
        if events or what not in FILE_EVENTS:  # the training itself, and not what leads to it
            events[what] += 1
        if what == aimed_at and events[what] == int(os.environ['CHAOS_COUNT']):
            before_death()
            print(f'\nkilled at: {what} {Path(file).suffix}', flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, args: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS and experiments in str(args[0]):
            event(name, str(args[0]))

    def surrounded(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            event(f'before {name}')
            result = original(*args)
            event(f'after {name}')
            return result

        return call

    save = torch.save

    def save_or_half(thing: Any, file: Any, **kwargs: Any) -> None:
        def half() -> None:
            whole = io.BytesIO()
            save(thing, whole)
            Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])

        if isinstance(file, (str, Path)):
            event('half of a save', str(file), half)
        save(thing, file, **kwargs)

    torch.save = save_or_half
    Training.begin_level = surrounded(Training.begin_level, 'a level begins')  # type: ignore[method-assign]
    Training.end_level = surrounded(Training.end_level, 'a level ends')  # type: ignore[method-assign]
    Training.resume_training = surrounded(Training.resume_training, 'resuming')  # type: ignore[method-assign]
    sys.addaudithook(audit)
    train_pipeline(str(Path.cwd()))


# ------------------------------ the one who kills ------------------------------ #


Process = subprocess.Popen[str]


def processes(mark: str, *others: str) -> list[int]:
    """Every process with this mark and ``others`` in its environment: a launcher's ranks, a loader's workers."""
    wanted, found = {entry.encode() for entry in (f'{MARK}={mark}', *others)}, []
    for entry in Path('/proc').iterdir():
        try:
            if entry.name.isdigit() and wanted <= set((entry / 'environ').read_bytes().split(b'\0')):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def kill_all(mark: str) -> None:
    """SIGKILL every process that has this mark, until there is none."""
    while alive := processes(mark):
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class Trainer:
    """Trains in a folder, as often as it is told to, and kills as it is told to."""

    def __init__(self, folder: Path, ranks: int, base_model: str, rng: random.Random) -> None:
        self.folder, self.ranks, self.rng = folder, ranks, rng
        self.seconds: dict[str, float] = {}  # that a stage's training took, undisturbed
        self.resumes = 0
        folder.mkdir()
        for stage in STAGES:
            opt = options(folder.parent, stage, ranks, base_model)
            (folder / f'{stage}.yml').write_text(yaml.safe_dump(opt, sort_keys=False))

    def models(self, stage: str) -> Path:
        """Where the stage leaves what it ends with."""
        return self.folder / 'experiments' / stage / 'models'

    def start(self, stage: str, event: str = NO_EVENT, count: int = 0, rank: int = 0) -> tuple[str, Process]:
        """Begin, or resume, a stage; it kills itself at this event of this rank. Its mark, and its launcher."""
        command = [sys.executable]
        if self.ranks > 1:
            command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={self.ranks}']
        command += [__file__, '--child', '-opt', f'{stage}.yml', '--auto_resume']
        command += ['--launcher', 'pytorch'] if self.ranks > 1 else []
        mark = f'{os.getpid()}-{time.monotonic_ns()}'
        environment = {'CHAOS_EVENT': event, 'CHAOS_COUNT': str(count), 'CHAOS_RANK': str(rank), MARK: mark}
        environment.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return mark, process

    def undisturbed(self, stage: str) -> None:
        """Begin, or resume, the stage and let it come to its end."""
        _, process = self.start(stage)
        assert process.stdout is not None
        began, said = time.monotonic(), []
        for line in process.stdout:
            said.append(line)
            if 'Start training' in line:
                began = time.monotonic()
        self.seconds[stage] = time.monotonic() - began
        self.resumes += any('Resuming training' in line for line in said)
        if process.wait():
            sys.exit(''.join(said))

    def aim(self) -> tuple[str, int]:
        """An event, and the how-manieth of its kind in a run to kill at: there need not be as many."""
        event = self.rng.choice(EVENTS)
        return event, self.rng.randint(1, 5 if event in FILE_EVENTS else 2)

    def disturbed(self, stage: str, event: str, count: int, seconds: float) -> str:
        """Begin or resume the stage and kill it: what it was killed at, '' if it was done before that.

        Without an event: at a random time of its training, which takes ``seconds``, sometimes of its start; all
        processes or, sometimes, one rank.
        """
        rng, rank, said = self.rng, self.rng.randrange(self.ranks), []
        # Rank 0 does nearly all that can be aimed at.
        mark, process = self.start(stage, event, count, rank if 'level' in event or 'resuming' in event else 0)
        assert process.stdout is not None
        killed = ''
        if event == NO_EVENT:
            if rng.random() < 0.8:
                for line in process.stdout:
                    said.append(line)
                    if 'Start training' in line:
                        break
                time.sleep(rng.uniform(0, seconds))
            else:
                time.sleep(rng.uniform(0, 3))
            if process.poll() is None:
                killed = 'a random time'
                ranks = processes(mark, f'RANK={rank}')
                if self.ranks > 1 and ranks and rng.random() < 0.5:
                    os.kill(ranks[0], signal.SIGKILL)
                else:
                    kill_all(mark)
        said.extend(process.stdout)
        process.wait()
        kill_all(mark)
        self.resumes += any('Resuming training' in line for line in said)
        killed = next((line.strip() for line in said if line.startswith('killed at: ')), killed)
        if process.returncode and not killed:
            sys.exit(''.join(said))
        return '' if process.returncode == 0 else killed


# ------------------------------ comparing ------------------------------ #


def flat(thing: Any, name: str = '') -> dict[str, Any]:
    """The tensors of a checkpoint by their paths in it."""
    if not isinstance(thing, dict):
        return {name: thing}
    return {path: value for key in thing for path, value in flat(thing[key], f'{name}/{key}').items()}


def differences(one: Path, other: Path) -> list[str]:
    """What differs, bit for bit, between the files that count in two experiments' ``models``."""
    names = {path.name for folder in (one, other) for path in folder.glob('*')}
    wanted = {'net_g_latest.pth', 'levels.json'}
    wanted |= {name for name in names if 'level' in name or 'latest' in name or name.endswith('.mssr')}
    found = [f'{name}: not there' for name in wanted if not ((one / name).is_file() and (other / name).is_file())]
    found += [str(path) for path in one.glob('.saving-*')]
    for name in sorted(wanted) if not found else []:
        if name.endswith('.pth'):
            first, second = (flat(torch.load(folder / name, weights_only=True)) for folder in (one, other))
            found += [f'{name}{key}' for key in first.keys() ^ second.keys()]
            found += [
                f'{name}{key}' for key in first.keys() & second.keys() if not torch.equal(first[key], second[key])
            ]
        elif (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    return found


def chaos(ranks: int, num_kills: int, seed: int, base_model: str) -> int:
    """Kill a training ``num_kills`` times, print what happened, and return the number of differences."""
    kills: list[tuple[str, str]] = []  # the stage, and what it was killed at
    resumes = pairs = mismatches = 0
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), random.Random(f'{seed} {ranks}')
        write_pairs(root)
        reference = Trainer(root / 'undisturbed', ranks, base_model, rng)
        for stage in STAGES:
            reference.undisturbed(stage)
        while len(kills) < num_kills or not pairs:
            trainer = Trainer(root / f'pair{pairs}', ranks, base_model, rng)
            for stage in STAGES:
                surely = not pairs
                # The first forward stage leaves kills to the backward stage.
                most = num_kills // 2 if not pairs and stage == 'forward' else num_kills
                while len(kills) < most:
                    event, count = NO_EVENT, 0
                    if surely:
                        event, count = rng.choice(SURE_EVENTS)
                    elif len(kills) % 2 == 0:
                        event, count = trainer.aim()
                    killed = trainer.disturbed(stage, event, count, reference.seconds[stage])
                    if not killed and surely:
                        sys.exit(f'{ranks} rank(s), {stage} stage: ended without what every run passes: {event}')
                    if not killed:
                        break
                    surely = False
                    kills.append((stage, killed))
                    print(f'{ranks} rank(s), kill {len(kills)}, {stage} stage: {killed}', flush=True)
                else:
                    trainer.undisturbed(stage)
                for difference in differences(trainer.models(stage), reference.models(stage)):
                    mismatches += 1
                    print(f'{ranks} rank(s), {stage} stage: {difference} differs', flush=True)
            pairs += 1
            resumes += trainer.resumes
    of_stage = Counter(stage for stage, _ in kills)
    counts = ', '.join(f'{of_stage[stage]} kills of the {stage} stage' for stage in STAGES)
    counts += f', {resumes} resumes, {pairs} pairs of stages compared, {mismatches} mismatches'
    print(f'{base_model}, {ranks} rank(s), seed {seed}: {counts}')
    for what, count in Counter(killed for _, killed in kills).most_common():
        print(f'    {count:3} {what}')
    return mismatches


def main() -> None:
    if '--child' in sys.argv:
        sys.argv.remove('--child')
        child()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=40, help='kills for each number of ranks (default: 40)')
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2], help='numbers of ranks (default: 1 2)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--base-model',
        choices=['SRModel', 'ESRGANModel', 'RealESRNetModel'],
        default='SRModel',
        help='base_model_type: the default; with a discriminator; with a pool of training pairs',
    )
    args = parser.parse_args()
    if args.kills < len(STAGES):
        parser.error(f'--kills: found {args.kills}; allowed: at least one for each of the {len(STAGES)} stages')
    sys.exit(1 if sum(chaos(ranks, args.kills, args.seed, args.base_model) for ranks in args.ranks) else 0)


if __name__ == '__main__':
    main()
