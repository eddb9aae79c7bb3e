"""Each defect of BasicSR that compat mends: seen without it, gone with it, and nothing else touched."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import basicsr.data.degradations
import basicsr.models.base_model
import basicsr.train
import basicsr.utils.dist_util
import basicsr.utils.options
import pytest
import torch
from conftest import call

from mssr_basicsr.adapter import compat

FUNCTIONAL_TENSOR = 'torchvision.transforms.functional_tensor'

OPTIONS = """
name: tiny
model_type: SRModel
scale: 2
num_gpu: 0
manual_seed: 0
datasets:
  {phase}:
    name: noise
    type: PairedImageDataset
    dataroot_gt: gt
    dataroot_lq: lq
    io_backend: {{type: disk}}
    gt_size: 16
    use_hflip: false
    use_rot: false
    num_worker_per_gpu: 0
    batch_size_per_gpu: 1
network_g: {{type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 4, num_block: 1, upscale: 2}}
path: {{pretrain_network_g: ~, strict_load_g: true, resume_state: ~}}
train:
  ema_decay: 0
  optim_g: {{type: Adam, lr: !!float 1e-4}}
  scheduler: {{type: MultiStepLR, milestones: [10], gamma: 0.5}}
  total_iter: {total_iter}
  warmup_iter: -1
  pixel_opt: {{type: L1Loss, loss_weight: 1.0, reduction: mean}}
val: {{val_freq: 100, save_img: true, suffix: ~}}
logger: {{print_freq: 1, save_checkpoint_freq: 1, use_tb_logger: true}}
"""


def stock(function: object) -> object:
    """BasicSR's own function, without what compat has put around it."""
    return inspect.unwrap(function)  # type: ignore[arg-type]


def run(folder: Path, *command: str, expect: int = 0) -> str:
    """What a new Python prints, with no CUDA, one thread and ``folder`` as its current one."""
    environment = {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'MSSR_BASICSR_DISCOVERY': '1'}
    return call(sys.executable, *command, cwd=folder, expect=expect, **environment)


def test_functional_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = [f for f in sys.meta_path if type(f).__module__ != compat.__name__]
    monkeypatch.setattr(sys, 'meta_path', finders.copy())
    monkeypatch.delitem(sys.modules, FUNCTIONAL_TENSOR, raising=False)
    try:
        importlib.import_module(FUNCTIONAL_TENSOR)
    except ModuleNotFoundError:
        pass
    else:
        pytest.skip('this torchvision has transforms.functional_tensor')

    compat.provide_functional_tensor()
    compat.provide_functional_tensor()
    assert len(sys.meta_path) == len(finders) + 1
    grey = importlib.import_module(FUNCTIONAL_TENSOR).rgb_to_grayscale(torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1))
    assert grey.item() == pytest.approx(0.2989 * 1.0 + 0.587 * 0.5 + 0.114 * 0.25)


def test_degradations_get_a_working_rgb_to_grayscale() -> None:
    noise = basicsr.data.degradations.random_generate_gaussian_noise_pt(torch.rand(2, 3, 8, 8), gray_prob=1)
    assert noise.shape == (2, 3, 8, 8)
    assert basicsr.data.degradations.rgb_to_grayscale(torch.rand(2, 3, 8, 8)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize('rank', [['--local-rank=3'], ['--local-rank', '3'], ['--local_rank=3']])
def test_local_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: list[str]) -> None:
    (tmp_path / 'x.yml').write_text(OPTIONS.format(phase='train', total_iter=1))
    argv = ['train.py', '-opt', str(tmp_path / 'x.yml'), *rank]
    monkeypatch.setattr(sys, 'argv', argv)
    for module in (basicsr.utils.options, basicsr.train):
        opt, args = module.parse_options(str(tmp_path), is_train=True)
        assert (opt['name'], args.local_rank) == ('tiny', 3)
        assert sys.argv is argv


def test_local_rank_is_what_stock_basicsr_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_options = stock(basicsr.utils.options.parse_options)
    if '--local-rank' in parse_options.__code__.co_consts:
        pytest.skip('this BasicSR knows --local-rank')
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', 'x.yml', '--local-rank=0'])
    with pytest.raises(SystemExit):
        parse_options('.')


def test_resume_on_cpu(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    script.write_text("""
import torch
from basicsr.train import load_resume_state, parse_options  # as if it had been defined here
from basicsr.models.lr_scheduler import MultiStepRestartLR
adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
adam.param_groups[0]['params'][0].grad = torch.ones(2)
adam.step()
schedule = MultiStepRestartLR(adam, [5])
torch.save({'epoch': 1, 'iter': 7, 'optimizers': [adam.state_dict()], 'schedulers': [schedule.state_dict()]}, '7.state')
opt = {'auto_resume': False, 'path': {'resume_state': '7.state'}, 'name': 'x'}
try:
    load_resume_state(opt)
except (RuntimeError, AssertionError) as error:
    print('stock:', error)
try:
    parse_options('.')
except SystemExit:
    print('no options')
load, current_device = torch.load, torch.cuda.current_device
state = load_resume_state(opt)
assert state['iter'] == 7 and state['optimizers'][0]['state'][0]['exp_avg'].device.type == 'cpu'
assert torch.load is load and torch.cuda.current_device is current_device
once = load_resume_state
try:
    parse_options('.')
except SystemExit:
    assert load_resume_state is once
print('resumed')
""")
    said = run(tmp_path, 'script.py')
    assert said.endswith('resumed\n')
    if 'stock:' not in said:
        pytest.skip('this BasicSR resumes on a CPU')


def test_launch_and_parallel_on_cpu(tmp_path: Path) -> None:
    (tmp_path / 'script.py').write_text("""
import inspect, os, torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import dist_util
rank = int(os.environ['RANK'])

def refused(function, *args):
    try:
        inspect.unwrap(function)(*args)
    except Exception as error:
        print(f'stock refuses {function.__name__}: {error!r}', flush=True)

refused(dist_util._init_dist_pytorch, 'nccl')
if not torch.distributed.is_initialized():
    dist_util.init_dist('pytorch')
assert torch.distributed.get_backend() == 'gloo' and dist_util.get_dist_info() == (rank, 2)
model = BaseModel({'num_gpu': 0, 'is_train': True, 'dist': True, 'find_unused_parameters': True})
refused(BaseModel.model_to_device, model, torch.nn.Linear(1, 1))
net = model.model_to_device(torch.nn.Linear(1, 1))
assert net.find_unused_parameters
net(torch.full((1, 1), float(rank))).sum().backward()
assert net.module.weight.grad.item() == 0.5, 'the mean over both ranks'
print(f'done {rank}', flush=True)
torch.distributed.destroy_process_group()
""")
    said = run(tmp_path, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py')
    assert 'done 0' in said and 'done 1' in said
    if said.count('stock refuses') < 4:
        pytest.skip('this BasicSR launches on a CPU')


def test_stock_scripts_on_cpu(tmp_path: Path) -> None:
    """Train and test below the current folder, then resume through BasicSR's own script and launcher."""
    from PIL import Image

    for folder, size in (('gt', 32), ('lq', 16)):
        (tmp_path / folder).mkdir()
        for name in 'ab':
            Image.effect_noise((size, size), 50).convert('RGB').save(tmp_path / folder / f'{name}.png')
    (tmp_path / 'basicsr').mkdir()
    shutil.copy(basicsr.train.__file__, tmp_path / 'basicsr' / 'train.py')
    for total_iter in (1, 2):
        (tmp_path / f'train{total_iter}.yml').write_text(OPTIONS.format(phase='train', total_iter=total_iter))
    (tmp_path / 'test.yml').write_text(OPTIONS.format(phase='test_1', total_iter=1))

    run(tmp_path, '-m', 'mssr_basicsr.train', '-opt', 'train1.yml')
    assert (tmp_path / 'experiments' / 'tiny' / 'training_states' / '1.state').is_file()
    assert list((tmp_path / 'tb_logger' / 'tiny').iterdir())

    launch = ['-m', 'torch.distributed.launch', '--nproc_per_node=2', '--standalone']
    said = run(tmp_path, *launch, 'basicsr/train.py', '-opt', 'train2.yml', '--launcher', 'pytorch', '--auto_resume')
    assert 'Resuming training from epoch: 0, iter: 1.' in said and 'world_size: 2' in said
    assert (tmp_path / 'experiments' / 'tiny' / 'training_states' / '2.state').is_file()

    run(tmp_path, '-m', 'mssr_basicsr.test', '-opt', 'test.yml')
    assert len(list((tmp_path / 'results' / 'tiny').rglob('*.png'))) == 2


def test_applied_once_and_signatures_kept() -> None:
    places = [
        (basicsr, 'parse_options'),
        (basicsr.train, 'parse_options'),
        (basicsr.utils.options, 'parse_options'),
        (basicsr.utils.dist_util, '_init_dist_pytorch'),
        (basicsr.models.base_model.BaseModel, 'model_to_device'),
    ]
    before = [getattr(owner, name) for owner, name in places]
    assert all(function is not stock(function) for function in before)
    assert [inspect.signature(f) for f in before] == [
        inspect.signature(f, follow_wrapped=False) for f in map(stock, before)
    ]
    compat.before_import()
    compat.after_import()
    assert [getattr(owner, name) for owner, name in places] == before


def test_nothing_changes_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    load = torch.load
    called = []
    compat.launch_on_cpu(lambda backend, **kwargs: called.append((backend, kwargs)), 'nccl', timeout=1)
    state = compat.load_resume_state_on_cpu(lambda opt: (opt, torch.load is load), 'opt')
    model = SimpleNamespace(device=torch.device('cuda'), opt={'dist': True})
    assert compat.parallel_on_cpu(lambda model, net: net, model, 'net') == 'net'
    assert (called, state) == ([('nccl', {'timeout': 1})], ('opt', True))


def test_one_process_on_the_cpu_is_left_to_basicsr() -> None:
    model = SimpleNamespace(device=torch.device('cpu'), opt={'dist': False})
    assert compat.parallel_on_cpu(lambda model, net: net, model, 'net') == 'net'
