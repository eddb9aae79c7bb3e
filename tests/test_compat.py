"""Each defect of BasicSR that compat fixes: present without it, gone with it, and nothing else affected."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import basicsr.data.degradations
import basicsr.data.prefetch_dataloader
import basicsr.models.base_model
import basicsr.models.realesrgan_model
import basicsr.models.realesrnet_model
import basicsr.train
import basicsr.utils.dist_util
import basicsr.utils.img_process_util
import basicsr.utils.logger
import basicsr.utils.options
import pytest
import torch
import yaml
from basicsr.archs.basicvsrpp_arch import BasicVSRPlusPlus
from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
from basicsr.models import build_model
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY
from conftest import TOY_EDSR, Clips, call
from toy import DEGRADATION, add_discriminator

from mssr_basicsr.adapter import compat, cpu, training_script

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
    """What a new Python prints, with no CUDA and ``folder`` as its current one."""
    environment = {'CUDA_VISIBLE_DEVICES': '', 'MSSR_BASICSR_DISCOVERY': '1'}
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


@pytest.mark.parametrize(('phase', 'kind'), [('train', 'experiments'), ('test_1', 'results')])
def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, kind: str) -> None:
    """Everything that is written goes below the folder that the YAML names, as with BasicSR's master."""
    options = yaml.safe_load(OPTIONS.format(phase=phase, total_iter=1))
    options['path'] = {f'{kind}_root': '~/there', 'pretrain_network_g': str(tmp_path / kind / 'tiny' / 'x.pth')}
    (tmp_path / 'x.yml').write_text(yaml.safe_dump(options))
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(tmp_path / 'x.yml')])
    opt, _ = basicsr.train.parse_options(str(tmp_path), is_train=kind == 'experiments')
    there = str(tmp_path / 'there' / 'tiny')
    assert opt['path'].pop('pretrain_network_g') == options['path']['pretrain_network_g']
    assert opt['path'][f'{kind}_root'] == opt['path']['log'] == there
    assert all(path.startswith(there) for path in opt['path'].values() if path)


def test_local_rank_is_what_stock_basicsr_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_options = stock(basicsr.utils.options.parse_options)
    if '--local-rank' in parse_options.__code__.co_consts:
        pytest.skip('this BasicSR knows --local-rank')
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', 'x.yml', '--local-rank=0'])
    with pytest.raises(SystemExit):
        parse_options('.')


@pytest.mark.slow
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


@pytest.mark.slow
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
""")
    said = run(tmp_path, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py')
    assert 'done 0' in said and 'done 1' in said
    if said.count('stock refuses') < 4:
        pytest.skip('this BasicSR launches on a CPU')


@pytest.mark.slow
def test_gloo_ends_before_python_does(tmp_path: Path) -> None:
    """A distributed network is alive to the end, as in a training script; threads are counted after everything else.

    All threads are, since gloo's have no name of their own in torch 2.8.
    """
    (tmp_path / 'script.py').write_text("""
import atexit, pathlib, sys
import torch
from basicsr.utils import dist_util

def count_threads():
    print('threads:', len(list(pathlib.Path('/proc/self/task').iterdir())), flush=True)

atexit.register(count_threads)  # which runs last
dist_util.init_dist('pytorch')
if 'stay' in sys.argv:
    from mssr_basicsr.adapter import cpu
    atexit.unregister(cpu.leave_process_group)
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
network(torch.ones(1, 1)).sum().backward()
del network
""")
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1', 'script.py']
    ended, staying = (int(run(tmp_path, *launch, *more).rpartition('threads:')[2]) for more in ([], ['stay']))
    assert ended < staying


def test_color_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    from basicsr.utils import color_util, matlab_functions

    names = ('rgb2ycbcr', 'bgr2ycbcr', 'ycbcr2rgb', 'ycbcr2bgr')
    for name in names:
        monkeypatch.delattr(matlab_functions, name)
    monkeypatch.setattr(matlab_functions, 'rgb2ycbcr', 'its own', raising=False)
    compat.provide_color_conversions()
    assert matlab_functions.rgb2ycbcr == 'its own'
    assert all(getattr(matlab_functions, name) is getattr(color_util, name) for name in names[1:])


@pytest.mark.parametrize('is_old', [True, False])
def test_wandb_ids(is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wandb with generate_id where BasicSR looks for it, or where current wandb has it."""
    began = []
    util, runid = SimpleNamespace(), SimpleNamespace(generate_id=lambda: 'new')
    if is_old:
        util.generate_id = lambda: 'old'
    wandb = SimpleNamespace(util=util, init=lambda **kwargs: began.append(kwargs))
    for name, module in (('wandb', wandb), ('wandb.sdk.lib.runid', runid)):
        monkeypatch.setitem(sys.modules, name, module)
    opt = {'name': 'x', 'logger': {'wandb': {'project': 'p'}}}
    if not is_old:
        with pytest.raises(AttributeError, match='generate_id'):
            stock(basicsr.train.init_wandb_logger)(opt)
    basicsr.train.init_wandb_logger(opt)
    assert (began[0]['id'], began[0]['project']) == ('old' if is_old else 'new', 'p')


@pytest.mark.slow
def test_slurm_on_cpu(tmp_path: Path) -> None:
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho 127.0.0.1\n')
    (tmp_path / 'scontrol').chmod(0o755)
    (tmp_path / 'script.py').write_text("""
import inspect, os, torch
from basicsr.utils import dist_util
os.environ.update(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_NODELIST='here')
os.environ['PATH'] = os.getcwd() + os.pathsep + os.environ['PATH']
try:
    inspect.unwrap(dist_util._init_dist_slurm)('nccl')
except Exception as error:
    print(f'stock: {error!r}')
count, choose = torch.cuda.device_count, torch.cuda.set_device
dist_util.init_dist('slurm', port=0)  # any that is free
assert torch.distributed.get_backend() == 'gloo' and dist_util.get_dist_info() == (0, 1)
assert (os.environ['MASTER_ADDR'], os.environ['LOCAL_RANK']) == ('127.0.0.1', '0')
assert torch.cuda.device_count is count and torch.cuda.set_device is choose
""")
    assert 'stock: ZeroDivisionError' in run(tmp_path, 'script.py')


@pytest.mark.slow
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


def needs_cuda() -> AbstractContextManager[object]:
    """What is run in it asks for CUDA: torch refuses it where there is none."""
    if torch.cuda.is_available():
        return nullcontext()
    return pytest.raises((RuntimeError, AssertionError), match=r'CUDA|NVIDIA')


class Degrading(BaseModel):
    """A third party's model class with every way to ask for CUDA that BasicSR's own have, and some more."""

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.blur = torch.nn.Conv2d(3, 3, 1).cuda()

    @torch.no_grad()
    def enqueue(self) -> torch.Tensor:
        return torch.zeros(2, 3).cuda()

    def tensors(self) -> list[torch.Tensor]:
        named = [torch.ones(1).to(device) for device in ('cuda', 'cuda:0', torch.device('cuda'))]
        return [*named, torch.zeros(1, device='cuda'), *(x.cuda(non_blocking=True) for x in torch.ones(2, 3))]

    def free(self) -> None:
        torch.cuda.empty_cache()

    def fork(self) -> None:
        device = 'cuda'
        with torch.random.fork_rng(device_type=device):
            torch.rand(1)
        assert torch.device(device) == torch.device('cpu')


@pytest.fixture
def degrading(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Degrading]]:
    """Registered by BasicSR's rule for a name that is taken twice; what is patched in it is undone."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Degrading_basicsr', Degrading)
    with pytest.MonkeyPatch.context() as undo:
        for name in ('__init__', 'enqueue', 'tensors', 'free', 'fork'):
            undo.setattr(Degrading, name, vars(Degrading)[name])
        yield Degrading


def test_model_classes_that_call_cuda(degrading: type[Degrading]) -> None:
    opt = {'num_gpu': 0, 'is_train': True}
    with needs_cuda():
        degrading(opt)
    assert MODEL_REGISTRY.get('Degrading') is degrading
    patched = dict(vars(degrading))
    assert degrading.free is stock(degrading.free), 'which needs no CUDA'
    model = degrading(opt)
    getattr(torch.get_device_module, 'cache_clear', lambda: None)()  # torch 2.4 keeps nothing
    model.fork()
    tensors = [*model.blur.parameters(), model.enqueue(), *model.tensors()]
    assert {tensor.device.type for tensor in tensors} == {'cpu'}
    assert [tensor.tolist() for tensor in model.tensors()] == [[1], [1], [1], [0], [1, 1, 1], [1, 1, 1]]
    with needs_cuda():
        torch.zeros(1, device='cuda')

    class Stage:
        def enqueue(self) -> torch.Tensor:
            return super().enqueue() + 1  # type: ignore[misc]

    stage = type('DegradingStage', (Stage, MODEL_REGISTRY.get('Degrading')), {})(opt)
    assert torch.equal(stage.enqueue(), torch.ones(2, 3))
    assert torch.get_device_module('cuda') is torch.cuda, 'which torch keeps as it first finds it'
    assert dict(vars(degrading)) == patched, 'once, however often it is taken'


class Renaming(Degrading):
    """Its options have a name of their own, and something that names CUDA runs before them, and without."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.prepare('cpu')
        super().__init__(options)
        self.sharpen = torch.nn.Conv2d(3, 3, 1).cuda()

    def prepare(self, device: str) -> None:
        self.mean = torch.zeros(3, device=device if device else 'cuda')


def test_model_classes_that_name_their_options_otherwise(
    degrading: type[Degrading], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Renaming', Renaming)
    for name in ('__init__', 'prepare'):  # what is patched in it is undone
        monkeypatch.setattr(Renaming, name, vars(Renaming)[name])
    model = MODEL_REGISTRY.get('Renaming')({'num_gpu': 0, 'is_train': True})
    assert {tensor.device.type for tensor in (*model.blur.parameters(), *model.sharpen.parameters())} == {'cpu'}


def test_model_classes_on_cuda_stay_there(degrading: type[Degrading]) -> None:
    """Where there is no CUDA, each method asks for it all the same."""
    MODEL_REGISTRY.get('Degrading')
    opt = {'num_gpu': 1, 'is_train': True}
    model = degrading({**opt, 'num_gpu': 0})
    model.opt = opt
    for asks in (lambda: degrading(opt).blur.parameters(), lambda: [model.enqueue()], model.tensors):
        tensors: list[torch.Tensor] = []
        with needs_cuda():
            tensors += asks()
        assert {tensor.device.type for tensor in tensors} == ({'cuda'} if torch.cuda.is_available() else set())


@pytest.mark.parametrize('model_type', ['RealESRNetModel', 'RealESRGANModel'])
def test_real_esrgan_on_cpu(model_type: str) -> None:
    """Both degrade images by layers, and keep training pairs in tensors, that BasicSR asks CUDA for."""
    no_kernel = torch.zeros(2, 21, 21)
    no_kernel[:, 10, 10] = 1
    opt: dict[str, Any] = {
        'model_type': model_type, 'num_gpu': 0, 'is_train': True, 'dist': False, 'scale': 2, 'path': {},
        'network_g': dict(TOY_EDSR), **DEGRADATION,
        'train': {
            'ema_decay': 0.9, 'optim_g': {'type': 'Adam', 'lr': 1e-4},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [10]}, 'pixel_opt': {'type': 'L1Loss'},
        },
    }  # fmt: skip
    add_discriminator(opt, model_type)
    model = build_model(opt)
    kernels = dict.fromkeys(('kernel1', 'kernel2', 'sinc_kernel'), no_kernel)
    for iteration in (1, 2, 3):  # the pool of pairs is full after the second
        model.feed_data({'gt': torch.rand(2, 3, 32, 32), **kernels})
        model.optimize_parameters(iteration)
    assert model.lq.shape == (2, 3, 16, 16) and model.queue_lr.shape == (4, 3, 16, 16)
    assert ('l_d_fake' in model.log_dict) == (model_type == 'RealESRGANModel')
    with needs_cuda():
        del model.queue_lr
        stock(type(model)._dequeue_and_enqueue)(model)


def test_filter2d_of_any_strides_on_cpu() -> None:
    image = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    mean = torch.full((2, 3, 3), 1 / 9)
    inner = torch.nn.functional.avg_pool2d(image, 3, stride=1)
    for module in (basicsr.utils.img_process_util, basicsr.models.realesrgan_model, basicsr.models.realesrnet_model):
        assert torch.allclose(module.filter2D(image, mean)[..., 1:-1, 1:-1], inner, atol=1e-6)
    with pytest.raises(RuntimeError, match='view size is not compatible'):
        stock(basicsr.utils.img_process_util.filter2D)(image, mean)


@pytest.mark.parametrize('model_type', ['VideoBaseModel', 'VideoRecurrentModel'])
def test_video_validation_on_cpu(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enlarge(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clip = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            return clip if model_type == 'VideoRecurrentModel' else clip[:, 1]

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Enlarge', Enlarge)
    psnr = {'type': 'calculate_psnr', 'crop_border': 0}
    opt = {'num_gpu': 0, 'is_train': False, 'dist': False, 'network_g': {'type': 'Enlarge'}, 'path': {}}
    model = build_model({**opt, 'model_type': model_type, 'name': 'x', 'val': {'metrics': {'psnr': psnr}}})
    grey, white = torch.full((3, 3, 4, 4), 0.5), torch.ones(3, 3, 8, 8)
    if model_type == 'VideoRecurrentModel':
        clips = Clips([{'lq': grey, 'gt': white}])
    else:
        clips = Clips([{'lq': grey, 'gt': white[0], 'idx': f'{i}/3', 'lq_path': 'x.png'} for i in range(3)])
    model.validation(SimpleNamespace(dataset=clips), 1, None, False)
    assert model.metric_results['000'].device.type == 'cpu'
    expected = pytest.approx(20 * torch.log10(torch.tensor(255 / (255 - 128))).item())  # 0.5 is saved as 128
    assert model.metric_results['000'].flatten().tolist() == [expected] * 3
    if not torch.cuda.is_available():
        del model.metric_results
        with pytest.raises((RuntimeError, AssertionError)):
            stock(type(model).dist_validation)(model, SimpleNamespace(dataset=clips), 1, None, False)


def test_cuda_prefetcher_on_cpu() -> None:
    loader = torch.utils.data.DataLoader([{'x': 1}, {'x': 2}])
    if not torch.cuda.is_available():
        with needs_cuda():
            stock(CUDAPrefetcher.__init__)(CUDAPrefetcher.__new__(CUDAPrefetcher), loader, {'num_gpu': 0})
    prefetcher = CUDAPrefetcher(loader, {'num_gpu': 0})
    assert type(prefetcher) is CPUPrefetcher
    for _ in range(2):  # as BasicSR's training loop does it
        prefetcher.reset()
        batches = [prefetcher.next() for _ in range(3)]
        assert [batch and batch['x'].item() for batch in batches] == [1, 2, None]


@pytest.mark.slow
def test_basicvsrpp_on_cpu() -> None:
    network = ARCH_REGISTRY.get('BasicVSRPlusPlus')(mid_channels=16, num_blocks=1, cpu_cache_length=2)
    assert set(network.deform_align) == {'backward_1', 'forward_1', 'backward_2', 'forward_2'}
    if not torch.cuda.is_available():
        without = BasicVSRPlusPlus.__new__(BasicVSRPlusPlus)
        stock(BasicVSRPlusPlus.__init__)(without, mid_channels=16, num_blocks=1)
        assert not without.deform_align, 'stock makes a smaller network'
    clip = torch.rand(1, 3, 3, 64, 64)
    with torch.no_grad():
        cached = network(clip)
        network.cpu_cache_length = 3
        assert torch.allclose(cached, network(clip), atol=1e-5)
    if not torch.cuda.is_available():
        network.cpu_cache = True
        with needs_cuda():
            stock(BasicVSRPlusPlus.upsample)(network, clip, {'spatial': [clip[:, 0]], 'backward_1': [clip[:, 0]]})


def test_applied_once_and_signatures_kept() -> None:
    places = [
        (basicsr, 'parse_options'),
        (basicsr.train, 'parse_options'),
        (basicsr.test, 'parse_options'),
        (basicsr.utils.options, 'parse_options'),
        (basicsr.utils.dist_util, '_init_dist_pytorch'),
        (basicsr.utils.dist_util, '_init_dist_slurm'),
        (basicsr.models.base_model.BaseModel, '__init__'),
        (basicsr.models.base_model.BaseModel, 'model_to_device'),
        (DATASET_REGISTRY, 'get'),
        (CUDAPrefetcher, '__init__'),
        (BasicVSRPlusPlus, '__init__'),
        (basicsr.utils.img_process_util, 'filter2D'),
        (basicsr.models.realesrnet_model, 'filter2D'),
        (basicsr.models.realesrgan_model, 'filter2D'),
        *((module, 'init_wandb_logger') for module in (basicsr, basicsr.train, basicsr.utils, basicsr.utils.logger)),
        (MODEL_REGISTRY, 'get'),
        (ARCH_REGISTRY, 'get'),
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
    cpu.launch_on_cpu(lambda backend, **kwargs: called.append((backend, kwargs)), 'nccl', timeout=1)
    state = cpu.load_resume_state_on_cpu(lambda opt: (opt, torch.load is load), 'opt')
    model = SimpleNamespace(device=torch.device('cuda'), opt={'dist': True})
    assert cpu.parallel_on_cpu(lambda model, net: net, model, 'net') == 'net'
    prefetcher = CUDAPrefetcher.__new__(CUDAPrefetcher)
    cpu.prefetch_on_cpu(lambda *args: called.append(args), prefetcher, 'loader', {'num_gpu': 1})
    assert called.pop() == (prefetcher, 'loader', {'num_gpu': 1}) and type(prefetcher) is CUDAPrefetcher
    assert (called, state) == ([('nccl', {'timeout': 1})], ('opt', True))


def test_one_process_on_the_cpu_is_left_to_basicsr() -> None:
    model = SimpleNamespace(device=torch.device('cpu'), opt={'dist': False})
    assert cpu.parallel_on_cpu(lambda model, net: net, model, 'net') == 'net'


@pytest.mark.parametrize('network_opt', [{}, {'network_g': None}, {'network_g': {'type': 'EDSR'}}])
def test_the_data_of_other_trainings_are_left_to_their_scripts(network_opt: dict[str, Any]) -> None:
    """Whatever arguments their own functions take, and whatever these return."""
    opt = {**network_opt, 'datasets': {'train': {}}}
    assert training_script.train_to_total_iter(lambda *args, **kwargs: (args, kwargs), opt, 1, two=2) == (
        (opt, 1),
        {'two': 2},
    )
    assert opt['datasets'] == {'train': {}}
