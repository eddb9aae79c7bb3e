"""Two processes under torchrun on the CPU: masks, sampled depths and weights are the same on both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from conftest import call
from toy import add_discriminator

pytestmark = pytest.mark.slow

# What torchrun starts: BasicSR's pipeline, each rank of which leaves behind what it ended with.
DRIVER = """
import os, sys, time
import torch
from mssr_basicsr.losses.ssd_loss import SSDLoss
from mssr_basicsr.models.forward_stage import ForwardStage
from mssr_basicsr.models.levelwise_training import LevelwiseTraining
from basicsr.models.sr_model import SRModel
from basicsr.train import train_pipeline
from basicsr.utils.registry import ARCH_REGISTRY
from toy import Normalised

ARCH_REGISTRY.register(Normalised)
rank, harm = os.environ['RANK'], {'differ': 1e-3, 'diverge': float('nan')}.get(sys.argv[-1])
save, optimize, depths = LevelwiseTraining.save, ForwardStage.optimize_parameters, []

def spy_on_save(model, epoch, current_iter):
    save(model, epoch, current_iter)
    if current_iter == -1:
        ended = {'network': model.network.state_dict(), 'ema': model.net_g_ema.state_dict(), 'depths': depths}
        ended['net_d'] = model.get_bare_model(model.net_d).state_dict() if 'network_d' in model.opt else {}
        torch.save(ended, f'{model.opt["name"]}_rank{rank}.pth')

def spy_on_optimize(model, current_iter):
    if harm and rank == '1' and current_iter == 3:
        model.net_g_ema.backbone.conv_first.weight.data[0, 0, 0, 0] += harm
    optimize(model, current_iter)

def spy_on_depths(loss, taps, seed):
    drawn = sample_taps(loss, taps, seed)
    depths.extend(drawn)
    return drawn

def slow_validation(model, *arguments):
    time.sleep(1)
    validate(model, *arguments)
    open('validated', 'a').write('x')

LevelwiseTraining.save, ForwardStage.optimize_parameters = spy_on_save, spy_on_optimize
sample_taps, SSDLoss.sample_taps = SSDLoss.sample_taps, spy_on_depths
validate, SRModel.nondist_validation = SRModel.nondist_validation, slow_validation
sys.argv = [argument for argument in sys.argv if argument not in ('differ', 'diverge')]
try:
    train_pipeline(os.getcwd())
    open(f'ended{rank}', 'w').write(open('validated').read())
except Exception as error:
    open(f'error{rank}', 'w').write(f'{type(error).__name__}: {error}')
    raise
"""


def torchrun(folder: Path, opt: dict[str, Any], *arguments: str, expect: int = 0) -> str:
    (folder / 'driver.py').write_text(DRIVER)
    (folder / f'{opt["name"]}.yml').write_text(yaml.safe_dump(opt, sort_keys=False))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'driver.py']
    command += ['-opt', f'{opt["name"]}.yml', '--launcher', 'pytorch', *arguments]
    toys = str(Path(toy.__file__).parent)
    return call(*command, cwd=folder, expect=expect, CUDA_VISIBLE_DEVICES='', PYTHONPATH=toys)


def ended_with(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f'{name}_rank{rank}.pth', weights_only=True)  # type: ignore[no-any-return]


def on_two_ranks(script: str, folder: Path) -> None:
    (folder / 'script.py').write_text(script)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py']
    call(*command, cwd=folder, CUDA_VISIBLE_DEVICES='')


def test_ranks_wait_longer_than_torchs_timeout(tmp_path: Path) -> None:
    """Rank 0 validates every level while the others wait; torch ends the run after 10 minutes, here after 1 second."""
    script = """
import os, time
from datetime import timedelta
from torch import distributed as dist
from basicsr.utils.dist_util import init_dist
from mssr_basicsr.adapter.ranks import gather, gather_on_rank_0, wait_for_all
init_dist('pytorch')
rank = int(os.environ['RANK'])
wait_for_all()
set_timeout = getattr(dist, 'set_timeout', None) or dist.distributed_c10d._set_pg_timeout  # its older name
set_timeout(timedelta(seconds=1))
results = []
for together in (wait_for_all, lambda: gather(rank), lambda: gather_on_rank_0(rank)):
    time.sleep(0 if rank else 2)  # rank 1 waits
    results.append(together())
open(f'result{rank}', 'w').write(str(results))
"""
    on_two_ranks(script, tmp_path)
    assert [(tmp_path / f'result{rank}').read_text() for rank in (0, 1)] == [
        '[None, [0, 1], [0, 1]]',
        '[None, [0, 1], []]',
    ]


def test_rank_0_alone_gathers_what_is_saved(tmp_path: Path) -> None:
    """Real-ESRGAN's pools are large: no other rank needs memory for them."""
    script = """
import os
from basicsr.utils.dist_util import init_dist
from mssr_basicsr.adapter.ranks import gather_on_rank_0
init_dist('pytorch')
open('gathered' + os.environ['RANK'], 'w').write(str(gather_on_rank_0('of rank ' + os.environ['RANK'])))
"""
    on_two_ranks(script, tmp_path)
    assert (tmp_path / 'gathered0').read_text() == str(['of rank 0', 'of rank 1'])
    assert (tmp_path / 'gathered1').read_text() == '[]'


@pytest.mark.parametrize('setup', ['ssd, bf16', 'batch norm', 'gan'])
def test_both_stages_on_two_ranks(
    setup: str, forward_opt: dict[str, Any], backward_opt: dict[str, Any], tmp_path: Path
) -> None:
    del forward_opt['manual_seed']  # each rank then draws its own, and rank 0's counts
    if setup == 'batch norm':  # each rank's running statistics are of its own images
        del forward_opt['train']['ssd_opt']
        for opt in (forward_opt, backward_opt):
            opt['network_g']['backbone'] = {'type': 'Normalised'}
    if setup == 'gan':
        for opt in (forward_opt, backward_opt):
            add_discriminator(opt, 'ESRGANModel')
    for opt in (forward_opt, backward_opt):
        opt['train'].update(precision='bf16' if 'bf16' in setup else 'fp32', channels_last='bf16' in setup)
        torchrun(tmp_path, opt)
        one, other = ended_with(tmp_path, opt['name'], 0), ended_with(tmp_path, opt['name'], 1)
        assert one['depths'] == other['depths']
        for key in ('network', 'ema', 'net_d'):
            assert one[key].keys() == other[key].keys()
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        sizes = {name: (levels >= 2).sum() for name, levels in one['network'].items() if name.startswith('level_map.')}
        assert sum(sizes.values()) == (270 if setup == 'batch norm' else 1692)  # a quarter of the weights
        state = max(
            tmp_path.glob(f'experiments/{opt["name"]}/training_states/*'), key=lambda path: path.stat().st_mtime
        )
        assert len(torch.load(state, weights_only=True)['mssr']['random_states']) == 2
        # No rank has ended before rank 0 has validated: torchrun may stop rank 0 when the process of another ends.
        assert (tmp_path / 'ended0').read_text() == (tmp_path / 'ended1').read_text()
    assert len(ended_with(tmp_path, 'forward', 0)['depths']) == (0 if setup == 'batch norm' else (1 + 4 + 4) * 2)


@pytest.mark.parametrize(
    ('harm', 'error'),
    [
        (
            'differ',
            'RuntimeError: End of level 0: ranks [1] differ from rank 0; stopping before anything else is written',
        ),
        ('diverge', 'FloatingPointError: End of level 0: conv_first.weight is not finite on rank 1; the training has '),
    ],
)
def test_ranks_stop_together(harm: str, error: str, forward_opt: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1's weights are changed, or become NaN, within level 0: both ranks stop at its end, and say which."""
    torchrun(tmp_path, forward_opt, harm, expect=1)
    for rank in (0, 1):
        assert (tmp_path / f'error{rank}').read_text().startswith(error)
    assert not list(tmp_path.glob('experiments/forward/models/net_g_level*'))
