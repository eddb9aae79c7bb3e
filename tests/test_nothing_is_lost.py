"""Interruptions, wrong files and full disks: no work is lost, and one error says what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.data.prefetch_dataloader import CPUPrefetcher
from basicsr.models.sr_model import SRModel
from basicsr.models.srgan_model import SRGANModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from conftest import BACKBONES, SPARSITY, TOY_EDSR, Run, call, contents, forget_after, load, pruned_mssr
from toy import add_degradation, add_discriminator, register_kernels_dataset

from mssr_basicsr.adapter.run_state import in_python_numbers, kept_between_iterations, put_back_kept
from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.method.criteria import global_magnitude
from mssr_basicsr.models.levelwise_training import LevelwiseTraining

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


# ------------------------------ resuming ------------------------------ #


@pytest.mark.parametrize('num_worker', [0, 1, 2])
@pytest.mark.parametrize('iteration', [2, 4, 6, 8, 12])
def test_a_resumed_forward_stage_ends_as_an_uninterrupted_one(
    iteration: int, num_worker: int, forward_opt: dict[str, Any], run: Run
) -> None:
    """Within epochs (7 batches) and levels (4 iterations), and at their ends; with a criterion that draws numbers."""
    forward_opt['train']['criterion'] = 'random'
    forward_opt['datasets']['train'].update(num_worker_per_gpu=num_worker, dataset_enlarge_ratio=3.5)
    forward_opt['logger']['save_checkpoint_freq'] = 2
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, iteration)
    for path in experiment.glob('models/net_g_level*'):  # those of levels that are not done yet
        if int(path.stem[-1]) >= iteration / 4:
            path.unlink()
    leftover = experiment / 'models' / '.saving-killed'
    leftover.mkdir()
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == uninterrupted
    assert not leftover.exists()
    log = max(experiment.glob('*.log'), key=os.path.getmtime).read_text()
    assert 'set train.first_level: 1' not in log  # which is about a network that a new run starts with
    assert ('batches; skipping those' in log) == (iteration < 12)  # after the last one, none follows


@pytest.mark.parametrize('iteration', [2, 3, 4, 6])
def test_a_resumed_backward_stage_ends_as_an_uninterrupted_one(
    iteration: int, forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    forward = run(forward_opt)
    backward_opt['logger']['save_checkpoint_freq'] = 1
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    experiment = run(backward_opt)
    shutil.rmtree(forward)  # what it still needs of the forward stage it has kept
    uninterrupted, file = contents(experiment / 'models'), (experiment / 'models' / 'net_g.mssr').read_bytes()
    backward_opt['path']['resume_state'] = f'experiments/backward/training_states/{iteration}.state'
    run(backward_opt)
    assert contents(experiment / 'models') == uninterrupted
    assert (experiment / 'models' / 'net_g.mssr').read_bytes() == file


def saved(path: Path) -> dict[str, Any]:
    """All that a checkpoint or a training state holds, by its place in there; tensors as bytes."""
    found: dict[str, Any] = {}
    rest = [('', torch.load(path, weights_only=True))]
    while rest:
        place, value = rest.pop()
        if isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            rest += [(f'{place}/{key}', item) for key, item in items]
        else:
            found[place] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    return found


def resumes_exactly(opt: dict[str, Any], run: Run, *iterations: int) -> dict[str, Any]:
    """Run, and resume at each of ``iterations``, with ``net_d``: the last training state, which is always the same."""
    opt['logger']['save_checkpoint_freq'] = 3
    experiment = run(opt)
    models, state = experiment / 'models', experiment / 'training_states' / f'{opt["train"]["total_iter"]}.state'
    uninterrupted = contents(models), saved(models / 'net_d_latest.pth'), saved(state)
    for iteration in iterations:
        forget_after(experiment, iteration)
        assert not state.exists() and not (models / 'net_d_latest.pth').exists()
        run(opt, '--auto_resume')
        assert (contents(models), saved(models / 'net_d_latest.pth'), saved(state)) == uninterrupted
    return uninterrupted[2]


def test_a_discriminator_and_its_optimizer_resume_exactly(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    for opt, iteration in ((forward_opt, 6), (backward_opt, 3)):
        add_discriminator(opt, 'ESRGANModel')
        state = resumes_exactly(opt, run, iteration)
        assert '/optimizers/1/state/0/exp_avg' in state  # the discriminator's, beside the network's


def test_real_esrgans_pool_resumes_exactly(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four training pairs: after iteration 3 it is not full yet, after iteration 6 pairs have been drawn from it."""
    monkeypatch.setattr(DATASET_REGISTRY, '_obj_map', dict(DATASET_REGISTRY._obj_map))
    register_kernels_dataset()
    add_discriminator(forward_opt, 'RealESRGANModel')
    add_degradation(forward_opt)
    forward_opt['datasets']['train']['batch_size_per_gpu'] = 1
    state = resumes_exactly(forward_opt, run, 6, 3)
    pool = {place for place in state if place.startswith('/mssr/kept/0/queue_')}
    assert pool == {f'/mssr/kept/0/queue_{name}' for name in ('lr', 'gt', 'ptr')}


def test_networks_that_draw_random_numbers_resume_exactly(forward_opt: dict[str, Any], run: Run) -> None:
    """SwinIR drops paths at random, with torch's generator, which validation must leave alone."""
    forward_opt['network_g']['backbone'] = {**deepcopy(BACKBONES['SwinIR']), 'drop_path_rate': 0.5}
    forward_opt['train'].update(level_iter=2, total_iter=6)
    del forward_opt['train']['ssd_opt'], forward_opt['train']['rewind_iter']
    forward_opt['val']['val_freq'] = 1
    forward_opt['logger']['save_checkpoint_freq'] = 1
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 3)
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == uninterrupted
    assert 'continues after 3 of its 20 batches' in max(experiment.glob('*.log'), key=os.path.getmtime).read_text()


def test_an_inexact_resume_starts_the_epoch_over(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['train']['exact_resume'] = False
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 8)
    run(forward_opt, '--auto_resume')
    resumed = contents(experiment / 'models')
    level1 = {name for name in uninterrupted if name.startswith('net_g_level1')}
    assert level1 and all(resumed[name] == uninterrupted[name] for name in level1)
    assert resumed != uninterrupted


@pytest.mark.parametrize('batch_size', [8, 4, 1])
def test_changed_data_start_the_epoch_over(batch_size: int, forward_opt: dict[str, Any], run: Run) -> None:
    """Of 20 batches in an epoch, 8 are gone; now it has 5, 10 or 40, so that only the first has no place after 8."""
    experiment = run(forward_opt)
    forget_after(experiment, 8)
    forward_opt['datasets']['train']['batch_size_per_gpu'] = batch_size
    run(forward_opt, '--auto_resume')
    log = max(experiment.glob('*.log'), key=os.path.getmtime).read_text()
    assert 'The data or the batch size has changed: the epoch starts over.' in log and 'iter:      12' in log


def test_a_state_that_does_not_say_how_long_its_epochs_are(forward_opt: dict[str, Any], run: Run) -> None:
    """As older ones: the run resumes exactly if nothing has changed."""
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 8)
    path = experiment / 'training_states' / '8.state'
    state = torch.load(path, weights_only=True)
    assert state['mssr'].pop('num_batches') == 20
    torch.save(state, path)
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == uninterrupted


def test_auto_resume_finds_the_run_from_any_folder(
    forward_opt: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BasicSR looks in the current folder, and would archive the run and begin anew."""
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 8)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    forward_opt['path']['resume_state'] = '/nowhere/4.state'  # which BasicSR does not use with --auto_resume
    newest = experiment / 'training_states' / '8.state'
    said = f'path.resume_state: /nowhere/4.state is not used: with --auto_resume the run continues from {newest}'
    with pytest.warns(UserWarning, match=re.escape(said)):
        run(forward_opt, '--auto_resume')
    log = max(experiment.glob('*.log'), key=os.path.getmtime).read_text()
    assert 'Resuming training from epoch: 0, iter: 8.' in log
    assert contents(experiment / 'models') == uninterrupted
    assert [path.name for path in experiment.parent.iterdir()] == ['forward']


def test_epochs_that_become_longer_do_not_end_a_resumed_run(forward_opt: dict[str, Any], run: Run) -> None:
    """Iteration 8 is in the fourth of the short epochs; of the long ones, all iterations take only one."""
    forward_opt['datasets']['train']['dataset_enlarge_ratio'] = 1  # 2 batches in an epoch
    experiment = run(forward_opt)
    complete = json.loads((experiment / 'models' / 'levels.json').read_text())
    forget_after(experiment, 8)
    forward_opt['datasets']['train']['dataset_enlarge_ratio'] = 10
    run(forward_opt, '--auto_resume')
    log = max(experiment.glob('*.log'), key=os.path.getmtime).read_text()
    assert 'Resuming training from epoch: 0, iter: 8.' in log and 'iter:      12' in log
    resumed = json.loads((experiment / 'models' / 'levels.json').read_text())
    assert [record['iterations'] for record in resumed] == [record['iterations'] for record in complete] == [4, 4, 4]


class ForgettingSRGAN(SRGANModel):
    """It does not load its discriminator, as BasicSR's HiFaceGANModel."""

    def init_training_settings(self) -> None:
        path = self.opt['path'].pop('pretrain_network_d', None)
        super().init_training_settings()
        self.opt['path']['pretrain_network_d'] = path


class NumPySchedule(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda step: np.float64(0.9) ** step)
        self.rates = {'next': (np.float32(0.5), [np.int64(3)])}


class WithNumPySchedule(SRModel):
    def setup_schedulers(self) -> None:
        self.schedulers.append(NumPySchedule(self.optimizer_g))

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        super().save_training_state(epoch, current_iter)
        torch.save(torch.rand(2), Path(self.opt['path']['training_states'], 'another.pth'))


class ElsewhereSaved(SRModel):
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        Path(self.opt['path']['training_states'], f'{current_iter}.state').touch()


def test_a_state_without_what_mssr_needs_is_an_error(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'ElsewhereSaved', ElsewhereSaved)
    with pytest.raises(OSError, match='ElsewhereSaved saves no training state as BasicSR does, by'):
        run({**forward_opt, 'base_model_type': 'ElsewhereSaved'})


@pytest.mark.parametrize('base', [ForgettingSRGAN, WithNumPySchedule])
def test_what_a_model_class_does_not_resume_itself(
    base: type, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discriminator that it does not load; numbers of NumPy, which torch reads from no state."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Base', base)
    forward_opt.update(base_model_type='Base')
    if base is ForgettingSRGAN:
        add_discriminator(forward_opt, 'Base')
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 8)
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == uninterrupted


def test_numbers_of_numpy_become_pythons() -> None:
    nested = [np.int64(2), (np.bool_(True), 'text'), np.arange(2)]
    state = {'rate': np.float64(0.5), 'milestones': Counter({np.int64(3): 2}), 'nested': nested}
    plain = in_python_numbers(state)
    assert plain == {'rate': 0.5, 'milestones': Counter({3: 2}), 'nested': [2, (True, 'text'), [0, 1]]}
    assert [type(key) for key in plain['milestones']] == [int]
    assert [type(plain['rate']), type(plain['milestones']), type(plain['nested'][0])] == [float, Counter, int]
    assert type(state['rate']) is np.float64


def test_the_pool_of_training_pairs_comes_back_where_it_fits() -> None:
    """All of it, in projects that keep more in it than Real-ESRGAN; or none, and then the class fills it anew."""

    def model(**options: Any) -> Any:
        data = {'batch_size_per_gpu': options.pop('batch_size_per_gpu', 2), 'gt_size': 400}
        opt = {'scale': 2, 'queue_size': 4, 'gt_size': 32, 'datasets': {'train': data}, **options}
        return SimpleNamespace(opt=opt, device=torch.device('cpu'), queue_size=4)

    saved = model()
    assert kept_between_iterations(saved) == {}
    pool = {'queue_lr': torch.rand(4, 3, 16, 16), 'queue_kernels': torch.rand(4, 21), 'queue_ptr': 2}
    vars(saved).update(pool, queue_lock=Lock())  # which no file can hold
    kept = kept_between_iterations(saved)

    resumed = model()
    put_back_kept(resumed, kept)
    assert not hasattr(resumed, 'queue_lock')
    assert all(getattr(resumed, name) is value for name, value in pool.items())
    for changed in ({'batch_size_per_gpu': 4}, {'gt_size': 48}):
        resumed = model(**changed)
        put_back_kept(resumed, kept)
        assert not pool.keys() & vars(resumed).keys()


class WithTeacher(SRModel):
    """Its loss is the distance to what a teacher, which does not train, makes of the same images."""

    def init_training_settings(self) -> None:
        paths = self.opt['path']
        self.net_t = build_network(self.opt['network_t']).to(self.device)
        self.load_network(self.net_t, paths['pretrain_network_t'], True, paths.get('param_key_t', 'params'))
        super().init_training_settings()

    def feed_data(self, data: Any) -> None:
        super().feed_data(data)
        with torch.no_grad():
            self.gt = self.net_t(self.lq)


@pytest.mark.parametrize('param_key', [None, 'params_ema'])
def test_a_teacher_that_is_not_resumed_is_read_as_before(
    param_key: str | None, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever weights of the file the YAML names; those that are resumed come from the run's own files."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'WithTeacher', WithTeacher)
    own, other = build_network(TOY_EDSR).state_dict(), build_network(TOY_EDSR).state_dict()
    torch.save(own if param_key is None else {'params': other, 'params_ema': own}, 'teacher.pth')
    forward_opt.update(base_model_type='WithTeacher', network_t=TOY_EDSR)
    forward_opt['path'].update(
        pretrain_network_t='teacher.pth', param_key_t=param_key, ignore_resume_networks=['network_t']
    )
    experiment = run(forward_opt)
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 8)
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == uninterrupted


def test_a_run_does_not_resume_without_its_network(forward_opt: dict[str, Any], run: Run) -> None:
    run(forward_opt)
    forward_opt['path']['ignore_resume_networks'] = ['network_g']
    expected = (
        "path.ignore_resume_networks: found ['network_g']; allowed: networks other than network_g, without which "
        'MSSRForwardModel cannot resume.'
    )
    with pytest.raises(OptionError) as error:
        run(forward_opt, '--auto_resume')
    assert str(error.value) == expected


# ------------------------------ too few epochs ------------------------------ #


def test_short_epochs_are_repeated_until_total_iter(forward_opt: dict[str, Any], run: Run) -> None:
    """4 images make one batch of 3, and BasicSR counts two: it plans 6 + 1 epochs for 12 iterations."""
    forward_opt['datasets']['train'].update(batch_size_per_gpu=3, dataset_enlarge_ratio=1)
    experiment = run(forward_opt)
    (log,) = experiment.glob('*.log')
    assert 'Total epochs: 12; complete batches in each: 1.' in log.read_text()
    assert 'iter:      12' in log.read_text()


def test_an_epoch_without_a_batch_is_refused(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['datasets']['train'].update(batch_size_per_gpu=5, dataset_enlarge_ratio=1)
    with pytest.raises(OptionError, match=r'dataset_enlarge_ratio: found 1; allowed: .* has 4 images .* a batch 5'):
        run(forward_opt)


@pytest.mark.parametrize(('ratio', 'calls'), [(10, 7), (1, 10)])  # 20 batches in an epoch, or 2 and then none
def test_a_training_that_ends_early_is_not_taken_for_finished(
    ratio: int, calls: int, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that plans too few epochs: in level 1 its data end. What was trained is saved, and can be resumed."""
    forward_opt['datasets']['train']['dataset_enlarge_ratio'] = ratio
    uninterrupted = contents(run(forward_opt) / 'models')
    forward_opt['name'] = 'early'
    with monkeypatch.context() as patched:
        given, following = iter(range(calls)), CPUPrefetcher.next
        patched.setattr(CPUPrefetcher, 'next', lambda loader: None if next(given, None) is None else following(loader))
        with pytest.raises(OptionError, match=rf'dataset_enlarge_ratio: found {ratio}; .* after iteration 7 of 12'):
            run(forward_opt)
    models = Path('experiments/early/models')
    assert sorted(path.name for path in models.glob('net_g_*')) == ['net_g_4.pth', 'net_g_7.pth', 'net_g_level0.pth']
    assert [record.get('iterations') for record in json.loads((models / 'levels.json').read_text())] == [4]
    run(forward_opt, '--auto_resume')
    assert contents(models) == uninterrupted
    assert 'the epoch starts over' not in max(models.parent.glob('*.log'), key=os.path.getmtime).read_text()


def test_a_save_of_an_earlier_run_is_not_paired_with_a_new_one(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from an earlier state and killed between its next network and state: the old state is gone."""
    experiment = run(forward_opt)
    forward_opt['path']['resume_state'] = 'experiments/forward/training_states/4.state'

    def killed(model: Any, epoch: int, current_iter: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LevelwiseTraining, 'save_training_state', killed)
    with pytest.raises(KeyboardInterrupt):
        run(forward_opt)
    assert sorted(path.name for path in experiment.glob('training_states/*')) == ['12.state', '4.state']


def test_options_that_have_changed_are_reported(forward_opt: dict[str, Any], run: Run) -> None:
    """They hold from now on, for the levels to come."""
    experiment = run(forward_opt)
    forget_after(experiment, 8)
    forward_opt['network_g']['sparsity'] = [0, 0.5, 0.9]
    forward_opt['train'].update(criterion='lamp', rewind='lr')
    del forward_opt['train']['ema_decay']
    run(forward_opt, '--auto_resume')
    log = max(experiment.glob('*.log'), key=os.path.getmtime).read_text()
    assert 'Options have changed. ' in log
    for name, before, now in (
        ('network_g.sparsity', [0.0, 0.5, 0.75], [0.0, 0.5, 0.9]),
        ('train.criterion', 'global_magnitude', 'lamp'),
        ('train.rewind', 'weights', 'lr'),
        ('train.ema_decay', 0.9, 0),
    ):
        assert f'{name}: the run began with {before!r} and continues with {now!r}' in log


def test_a_level_cannot_lose_its_schedule_when_it_is_resumed(forward_opt: dict[str, Any], run: Run) -> None:
    """Nor get one; while level 0 trains, which has one in any case, either can still be chosen."""
    for began, now, allowed in (('weights', 'none', 'weights, lr'), ('none', 'lr', 'none')):
        forward_opt.update(name=f'from_{began}', train={**forward_opt['train'], 'rewind': began})
        experiment = run(forward_opt)
        forget_after(experiment, 8)
        forward_opt['train']['rewind'] = now
        with pytest.raises(OptionError) as error:
            run(forward_opt, '--auto_resume')
        expected = f'found {now!r}; allowed: {allowed} (level 1, which is resumed, began with {began}).'
        assert str(error.value) == f'train.rewind: {expected}'
        forget_after(experiment, 4)
        run(forward_opt, '--auto_resume')
        schedulers = load(experiment / 'training_states' / '12.state')['schedulers']
        assert len(schedulers) == (0 if now == 'none' else 1)


def chaos(kills: int, ranks: int) -> None:
    """scripts/checks/chaos.py, which exits with 1 where a killed and resumed training differs.

    How many pairs of stages it takes to spend the kills depends on the machine: a kill at a random time may come late.
    """
    said = call(sys.executable, ROOT / 'scripts' / 'checks' / 'chaos.py', '--kills', str(kills), '--ranks', str(ranks))
    counts = re.search(
        r'(\d+) kills of the forward stage, (\d+) kills of the backward stage, (\d+) resumes, '
        r'\d+ pairs of stages compared, 0 mismatches',
        said,
    )
    assert counts is not None, said
    forward, backward, resumes = map(int, counts.groups())
    assert forward + backward == kills
    assert min(forward, backward, resumes) >= 1


def test_killed_and_resumed() -> None:
    chaos(kills=4, ranks=1)


def test_killed_and_resumed_on_two_ranks() -> None:
    chaos(kills=2, ranks=2)


# ------------------------------ full disks, read-only folders ------------------------------ #


# A Python that limits the size of the files that it may write, and then becomes the command behind the limit.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def train_in(folder: Path, opt: dict[str, Any], *before: str, largest: int | None = None) -> str:
    """What a training in ``folder`` that fails prints; it may write files of at most ``largest`` bytes."""
    (folder / 'x.yml').write_text(yaml.safe_dump(opt, sort_keys=False))
    limited = [] if largest is None else [sys.executable, '-c', LIMITED, str(largest)]
    command = [*before, *limited, sys.executable, '-m', 'mssr_basicsr.train', '-opt', 'x.yml', '--auto_resume']
    return call(*command, cwd=folder, expect=1, PYTHONUNBUFFERED='1')  # so that the error comes last


def finish_in(folder: Path) -> None:
    """Resume the training in ``folder``, now undisturbed."""
    said = call(sys.executable, '-m', 'mssr_basicsr.train', '-opt', 'x.yml', '--auto_resume', cwd=folder)
    assert 'Resuming training from epoch: 0, iter: 4.' in said


def test_a_file_that_cannot_be_written_whole(forward_opt: dict[str, Any], tmp_path: Path) -> None:
    """A quota on the size of a file, which the first save exceeds."""
    del forward_opt['train']['ema_decay']
    forward_opt['val'] = None
    said = train_in(tmp_path, forward_opt, largest=60_000)
    assert re.search(
        r'OSError: \S+/models: saving failed \([\d,]+ bytes are free there\): net_g_4\.pth is truncated$', said.strip()
    )
    assert not list(tmp_path.glob('experiments/forward/*/*'))


def test_a_full_disk(forward_opt: dict[str, Any], tmp_path: Path) -> None:
    """On a file system that has room for some saves: the error names the file, the last save is whole and resumes."""
    experiments = tmp_path / 'experiments'
    experiments.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(experiments)]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small file system is not allowed here')
    try:
        said = train_in(tmp_path, forward_opt)
        assert re.search(r'OSError: \S+/(models|training_states): saving failed \([\d,]+ bytes are free there\)', said)
        assert sorted(path.name for path in experiments.glob('forward/training_states/*')) == ['4.state']
        assert not list(experiments.glob('forward/*/.saving-*'))
        subprocess.run(['mount', '-o', 'remount,size=4m', str(experiments)], check=True)
        finish_in(tmp_path)
    finally:
        subprocess.run(['umount', str(experiments)], check=True)


def test_a_folder_that_became_read_only(forward_opt: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / 'x.yml').write_text(yaml.safe_dump(forward_opt, sort_keys=False))
    call(sys.executable, '-m', 'mssr_basicsr.train', '-opt', 'x.yml', cwd=tmp_path)
    experiment = tmp_path / 'experiments' / 'forward'
    forget_after(experiment, 4)
    before = (experiment / 'models' / 'net_g_4.pth').read_bytes()
    (experiment / 'models').chmod(0o555)
    # The superuser may write anywhere, unless this capability is dropped.
    as_user = ['setpriv', '--bounding-set=-dac_override', '--inh-caps=-dac_override'] if os.geteuid() == 0 else []
    if as_user and shutil.which('setpriv') is None:
        pytest.skip('setpriv, which makes the superuser obey permissions, is not there')
    said = train_in(tmp_path, forward_opt, *as_user)
    assert re.search(
        r'OSError: \S+/models\S* saving failed \([\d,]+ bytes are free there\): \[Errno 13\] Permission', said
    )
    assert (experiment / 'models' / 'net_g_4.pth').read_bytes() == before
    (experiment / 'models').chmod(0o755)
    finish_in(tmp_path)


def test_a_save_that_failed_is_an_error(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """BasicSR warns after three tries and continues."""
    save = torch.save

    def full_disk(thing: Any, path: Any) -> None:
        if 'net_g_8' in str(path):
            Path(path).write_bytes(b'PK\x03\x04 cut short')
            raise OSError(28, 'No space left on device')
        save(thing, path)

    monkeypatch.setattr(torch, 'save', full_disk)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(
        OSError, match=r'models: saving failed \([\d,]+ bytes are free there\): net_g_8\.pth is truncated'
    ):
        run(forward_opt)
    models = Path('experiments/forward/models')
    assert not (models / 'net_g_8.pth').exists()
    assert torch.load(models / 'net_g_4.pth', weights_only=True)
    assert not list(models.glob('.saving-*'))


# ------------------------------ the wrong file ------------------------------ #


def write_wrong_file(kind: str, path: Path) -> None:
    """Write to ``path`` what is not the forward stage's checkpoint of the toy EDSR."""
    whole = {'params': pruned_mssr(TOY_EDSR).state_dict()}
    torch.save(whole, path)
    data = path.read_bytes()
    if kind == 'missing':
        path.unlink()
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'truncated':
        path.write_bytes(data[: len(data) // 2])
    elif kind == 'damaged':
        at = data.index(whole['params']['backbone.conv_last.weight'].numpy().tobytes())
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif kind == 'text':
        path.write_text('net_g_latest.pth is in the other folder\n')
    elif kind == 'image':
        path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
    elif kind == 'code':
        torch.save({'params': Path('/')}, path)
    elif kind == 'tensor':
        torch.save(torch.zeros(3), path)
    elif kind == 'state':
        torch.save({'epoch': 0, 'iter': 4, 'optimizers': [], 'schedulers': []}, path)
    elif kind == 'numbered':
        torch.save({'params': dict(enumerate(whole['params'].values()))}, path)
    elif kind == 'bare':
        torch.save(whole['params'], path)
    elif kind == 'stock':
        torch.save({'params': MSSR(TOY_EDSR, SPARSITY).backbone.state_dict()}, path)
    elif kind == 'unfinished':
        network = MSSR(TOY_EDSR, SPARSITY)
        network.prune(1, global_magnitude, torch.Generator())
        torch.save({'params': network.state_dict()}, path)
    elif kind == 'wider':
        torch.save({'params': pruned_mssr({**TOY_EDSR, 'num_feat': 16}).state_dict()}, path)
    elif kind == 'another':
        torch.save({'params': pruned_mssr(BACKBONES['RCAN']).state_dict()}, path)
    elif kind == 'newer':
        whole['params']._metadata['']['version'] = 2
        torch.save(whole, path)


WRONG_FILES = {
    'missing': 'there is no such file',
    'empty': 'torch cannot read it; it may be truncated (',
    'truncated': 'torch cannot read it; it may be truncated (',
    'damaged': 'it is damaged: ',
    'text': 'it is not a checkpoint, or holds more than tensors (',
    'image': 'it is not a checkpoint, or holds more than tensors (',
    'code': 'it is not a checkpoint, or holds more than tensors (',
    'bare': 'it has no network under params_ema, but is itself one: param_key_g: null takes it',
    'tensor': 'it holds a Tensor, not a dict as a checkpoint does',
    'state': 'it has no network under params_ema (it has epoch, iter, optimizers, schedulers)',
    'numbered': 'it has no network under params_ema (it has params)',
    'stock': "the forward stage's last checkpoint (nothing is pruned in this one)",
    'unfinished': "the forward stage's last checkpoint (this one has been pruned to level 1 only)",
    'wider': 'have a different shape, such as backbone.conv_first.weight (16, 3, 3, 3) instead of (8, 3, 3, 3)',
    'another': 'it is of another network: ',
    'newer': 'its format is version 2; this mssr-basicsr reads up to 1: update mssr-basicsr',
}


@pytest.mark.parametrize('kind', WRONG_FILES)
def test_the_backward_stage_refuses_the_wrong_file(
    kind: str, backward_opt: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    """One error, which names the option and the file, before any training."""
    path = tmp_path / 'wrong.pth'
    write_wrong_file(kind, path)
    backward_opt['path']['pretrain_network_g'] = str(path)
    with pytest.raises(OptionError) as error:
        run(backward_opt)
    assert str(error.value).startswith(f"path.pretrain_network_g: found '{path}'; allowed: ")
    assert WRONG_FILES[kind] in str(error.value)
    assert '\n' not in str(error.value)


def test_nothing_in_a_checkpoint_is_executed(backward_opt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / 'executed'),)

    torch.save({'params': Code()}, tmp_path / 'wrong.pth')
    backward_opt['path']['pretrain_network_g'] = str(tmp_path / 'wrong.pth')
    with pytest.raises(OptionError, match='it is not a checkpoint, or holds more than tensors'):
        run(backward_opt)
    assert not (tmp_path / 'executed').exists()


# What is done to the experiment that is resumed at iteration 8, and the error's text.
WRONG_STATES = {
    'network is missing': r"path\.resume_state: found '\S+net_g_8\.pth'; .*there is no such file",
    'network is cut short': r"path\.resume_state: found '\S+net_g_8\.pth'; .*torch cannot read it",
    'network of a stock run': r"resume_state: found '\S+8\.state'; allowed: a state whose network file has an entry ",
    'state is cut short': r"path\.resume_state: found '\S+8\.state'; allowed: a complete training state \(",
    'state of a stock run': r"path\.resume_state: found '\S+8\.state'; allowed: a state that MSSRForwardModel saved",
    'state is newer': r'allowed: a state of version 3; this one has version 4: resume it with the mssr-basicsr that ',
    'more levels': r"path\.resume_state: found '\S+net_g_8\.pth'; .* level is 2, but that of network_g.sparsity is 3",
    'fewer levels': r"path\.resume_state: found '\S+net_g_8\.pth'; .* level is 2, but that of network_g.sparsity is 1",
    'other stages': r'began with 2 iterations at level 0, .* at level 1.*; this one: 4 iterations at level 0, 4 iter',
}


@pytest.mark.parametrize('kind', WRONG_STATES)
def test_resuming_refuses_the_wrong_files(kind: str, forward_opt: dict[str, Any], run: Run) -> None:
    experiment = run(forward_opt)
    forget_after(experiment, 8)
    network, state = experiment / 'models' / 'net_g_8.pth', experiment / 'training_states' / '8.state'
    if kind == 'network is missing':
        network.unlink()
    elif kind.endswith('cut short'):
        path = state if kind.startswith('state') else network
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == 'network of a stock run':
        checkpoint = torch.load(network, weights_only=True)
        torch.save({'params': checkpoint['params'], 'params_ema': checkpoint['params_ema']}, network)
    elif kind == 'more levels':
        forward_opt['network_g']['sparsity'] = [0, 0.5, 0.75, 0.875]
        forward_opt['train']['total_iter'] = 16
    elif kind == 'fewer levels':
        forward_opt['network_g']['sparsity'] = [0, 0.5]
        forward_opt['train']['total_iter'] = 8
    elif kind == 'other stages':
        forward_opt['train'].update(level_iter=[2, 6, 4], rewind_iter=1)
        forward_opt['train']['scheduler']['periods'] = [6]
        forward_opt['val']['val_freq'] = 2
    else:
        saved = torch.load(state, weights_only=True)
        if kind == 'state is newer':
            saved['mssr']['version'] = 4
        else:
            del saved['mssr']
        torch.save(saved, state)
    with pytest.raises(OptionError, match=WRONG_STATES[kind]):
        run(forward_opt, '--auto_resume')
