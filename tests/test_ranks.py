"""Two processes under torchrun on the CPU: masks, sampled depths and weights are the same on both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import call

# What torchrun starts: BasicSR's pipeline, each rank of which leaves behind what it ended with.
DRIVER = """
import os, sys
import torch
from mssr_basicsr.models.mssr_forward_model import MSSRForwardModel
from mssr_basicsr.models.mssr_model import MSSRModel
from basicsr.train import train_pipeline

torch.set_num_threads(1)
rank, differ = os.environ['RANK'], 'differ' in sys.argv
save, optimize, depths = MSSRModel.save, MSSRForwardModel.optimize_parameters, []

def spy_on_save(model, epoch, current_iter):
    save(model, epoch, current_iter)
    if current_iter == -1:
        ended = {'network': model.network.state_dict(), 'ema': model.net_g_ema.state_dict(), 'depths': depths}
        torch.save(ended, f'{model.opt["name"]}_rank{rank}.pth')

def spy_on_optimize(model, current_iter):
    if differ and rank == '1' and current_iter == 3:
        model.net_g_ema.backbone.conv_first.weight.data[0, 0, 0, 0] += 1e-3
    optimize(model, current_iter)
    depths.extend(getattr(model, 'taps', []))

MSSRModel.save, MSSRForwardModel.optimize_parameters = spy_on_save, spy_on_optimize
sys.argv = [argument for argument in sys.argv if argument != 'differ']
train_pipeline(os.getcwd())
"""


def torchrun(folder: Path, opt: dict[str, Any], *arguments: str, expect: int = 0) -> str:
    (folder / 'driver.py').write_text(DRIVER)
    (folder / f'{opt["name"]}.yml').write_text(yaml.safe_dump(opt, sort_keys=False))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'driver.py']
    command += ['-opt', f'{opt["name"]}.yml', '--launcher', 'pytorch', *arguments]
    return call(*command, cwd=folder, expect=expect, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')


def ended_with(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f'{name}_rank{rank}.pth', weights_only=True)  # type: ignore[no-any-return]


def test_both_stages_on_two_ranks(forward_opt: dict[str, Any], backward_opt: dict[str, Any], tmp_path: Path) -> None:
    del forward_opt['manual_seed']  # each rank then draws its own, and rank 0's counts
    for opt in (forward_opt, backward_opt):
        torchrun(tmp_path, opt)
        one, other = ended_with(tmp_path, opt['name'], 0), ended_with(tmp_path, opt['name'], 1)
        assert one['depths'] == other['depths']
        for key in ('network', 'ema'):
            assert one[key].keys() == other[key].keys()
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        sizes = {name: (levels >= 2).sum() for name, levels in one['network'].items() if name.startswith('level_map.')}
        assert sum(sizes.values()) == 1692
    assert len(ended_with(tmp_path, 'forward', 0)['depths']) > 0


def test_a_rank_that_differs_is_caught(forward_opt: dict[str, Any], tmp_path: Path) -> None:
    said = torchrun(tmp_path, forward_opt, 'differ', expect=1)
    assert 'RuntimeError: End of level 0: ranks [1] differ from rank 0' in said
