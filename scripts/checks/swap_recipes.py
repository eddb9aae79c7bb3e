"""Swap MSSR into every SR setup that BasicSR ships, as the README tells, and see that nothing of it is lost.

    python scripts/checks/swap_recipes.py CHECKOUT [--match PART ...] [--others HAT REALESRGAN] [--logs FOLDER]

CHECKOUT is a clone of BasicSR. Each YAML below its options/train that has a scale is trained as it is (stock), then
with MSSR in it: forward stage, backward stage, and a test of every level; all by the checkout's own scripts. With
--others, so are some YAMLs of HAT and Real-ESRGAN, by their own. The table says for each run whether it works, is
refused (by an error that names the option) or failed, and which losses the stock run logs and one of ours does not
("-": none).

What is made smaller, and nothing else:
- data: a few random images and clips; a validation image is 37 x 53 (38 x 54 where RRDBNet must
  unshuffle it), for video classes a little larger than a patch.
  lmdb becomes disk. Where validation is commented out, as Real-ESRGAN's, it is put in.
- patches: 16 x 16 before upscaling, 32 x 32 for video, 64 x 64 where SPyNet needs that, and what a
  VGGStyleDiscriminator's input_size wants. One patch a batch, five to seven frames a clip, a pool of two pairs.
- iterations: two for stock and for each of three levels; milestones, periods and the phases fix_flow and tsa_iter with
  them.
- depths: at most two blocks, groups or layers of each kind; widths of video networks: at most 16 features.
- pretrained networks, SPyNet's, EDVR's and VGG's weights are random.
Each run is a fork of this process, which has imported BasicSR. The exit status is 1 if a run fails that stock can do,
or if a loss is lost.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable

import cv2
import numpy as np
import yaml

RUNS = ('stock', 'forward', 'backward', 'test')
HAT_RECIPES = ('train_HAT-S_SRx2_from_scratch', 'train_Real_HAT_GAN_SRx4_finetune_from_mse_model')
REALESRGAN_RECIPES = ('train_realesrgan_x4plus', 'train_realesrnet_x4plus', 'finetune_realesrgan_x4plus_pairdata')
LEVEL_ITER, SPARSITY = 2, [0, 0.5, 0.75]
DEPTHS = ('num_block', 'num_blocks', 'num_group', 'num_extract_block', 'num_reconstruct_block', 'depths', 'num_heads')
VIDEO_WIDTH = 16
PRETRAINED = Path('experiments/pretrained_models')
LIMIT = 900  # seconds for one run

# ------------------------------ data ------------------------------ #


def write_pair(gt: Path, lq: Path, lq_size: tuple[int, int], scale: int, seed: int) -> None:
    """A smooth random image and its smaller version."""
    height, width = lq_size
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for path, size in ((gt, (width * scale, height * scale)), (lq, (width, height))):
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(small, size, interpolation=cv2.INTER_CUBIC))


def write_clip(gt: Path, lq: Path, names: list[str], lq_size: tuple[int, int], scale: int) -> None:
    """Frames of the given names: five images, again and again."""
    for i, name in enumerate(names):
        if i < 5:
            write_pair(gt / name, lq / name, lq_size, scale, i)
        else:
            for folder in (gt, lq):
                (folder / name).symlink_to(names[i % 5])


def make_data(opt: dict[str, Any], folder: Path, lq_patch: int) -> None:
    """Write data for the sets of ``opt`` into ``folder``, and let ``opt`` name it."""
    video = 'Video' in opt['model_type'] or 'EDVR' in opt['model_type']
    for phase, data in opt['datasets'].items():
        training, scale = phase == 'train', opt['scale']
        gt, lq = folder / f'{phase}_gt', folder / f'{phase}_lq'
        for key in ('meta_info_file', 'meta_info'):
            data.pop(key, None)
        if 'dataroot_gt' in data:
            data['dataroot_gt'] = str(gt)
        if 'dataroot_lq' in data:
            data['dataroot_lq'] = str(lq)
        data['io_backend'] = {'type': 'disk'}
        size = (lq_patch + 4, lq_patch + 8)
        if not training:
            odd = (37, 53)
            if opt['network_g']['type'] == 'RRDBNet' and scale == 2:  # which unshuffles its input, by itself as well
                odd = (38, 54)
            size = (lq_patch + 4, lq_patch + 8) if video else odd
        if not video:
            names = [f'{i}.png' for i in range(4 if training else 1)]
            template = data.get('filename_tmpl', '{}')
            for i, name in enumerate(names):
                write_pair(gt / name, lq / f'{template.format(Path(name).stem)}.png', size, scale, i)
            if data['type'] == 'RealESRGANDataset':
                key = 'meta_info'
                data['meta_info'] = data['meta_info_file'] = str(folder / f'{key}.txt')
                Path(data[key]).write_text('\n'.join(names))
        elif data['type'].startswith('REDS'):
            write_clip(gt / '001', lq / '001', [f'{i:08d}.png' for i in range(100)], size, scale)
            data['meta_info_file'] = str(folder / 'clips.txt')
            Path(data['meta_info_file']).write_text('001 100 (0,0,3)\n')
        elif data['type'].startswith('Vimeo'):
            write_clip(gt / '00001/0001', lq / '00001/0001', [f'im{i}.png' for i in range(1, 8)], size, scale)
            data['meta_info_file'] = str(folder / 'clips.txt')
            Path(data['meta_info_file']).write_text('00001/0001 7 (0,0,3)\n')
        else:
            write_clip(gt / '000', lq / '000', [f'{i:08d}.png' for i in range(7)], size, scale)


def write_pretrained(project: Path) -> None:
    """VGG's weights, which BasicSR would download, SPyNet's and EDVR's, all random, where YAMLs look for them."""
    import torch
    import torchvision
    from basicsr.archs.basicvsr_arch import EDVRFeatureExtractor
    from basicsr.archs.spynet_arch import SpyNet

    folder = project / PRETRAINED
    folder.mkdir(parents=True)
    vgg = torchvision.models.vgg19().state_dict()
    for name, weight in vgg.items():  # those that no loss uses take no room
        if name.startswith('classifier'):
            vgg[name] = torch.zeros(1).expand(weight.shape)
    torch.save(vgg, folder / 'vgg19-dcbb9e9d.pth')
    spynet = {name: weight for name, weight in SpyNet().state_dict().items() if name not in ('mean', 'std')}
    torch.save({'params': spynet}, folder / 'spynet.pth')
    for frames in (5, 7):
        torch.save(
            {'params': EDVRFeatureExtractor(frames, VIDEO_WIDTH, None).state_dict()}, folder / f'edvr{frames}.pth'
        )


# ------------------------------ the swap ------------------------------ #


def shrink(opt: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """The setup as it is, small enough for seconds; see this file's head."""
    opt = deepcopy(opt)
    network, train, data = opt['network_g'], opt['train'], opt['datasets']['train']
    video = 'Video' in opt['model_type'] or 'EDVR' in opt['model_type']
    opt.update(num_gpu=0, name=name)
    lq_patch = 64 if 'spynet_path' in network else 32 if video else 16
    if opt.get('network_d', {}).get('type') == 'VGGStyleDiscriminator':
        lq_patch = opt['network_d'].get('input_size', 128) // opt['scale']
    if 'val' not in opt['datasets']:
        opt['datasets']['val'] = {
            'name': 'validation',
            'type': 'PairedImageDataset',
            'dataroot_gt': '',
            'dataroot_lq': '',
        }
    make_data(opt, folder, lq_patch)
    data.update(gt_size=lq_patch * opt['scale'], num_worker_per_gpu=0, batch_size_per_gpu=1, dataset_enlarge_ratio=2)
    if 'gt_size' in opt:
        opt['gt_size'] = data['gt_size']
    if 'queue_size' in opt:
        opt['queue_size'] = 2
    if 'Recurrent' in data['type'] and data.get('num_frame', -1) > 5:
        data['num_frame'] = 5
    for key in DEPTHS:
        if key in network:
            depth = network[key]
            network[key] = depth[:2] if isinstance(depth, list) else min(depth, 2)
            if key == 'depths':
                network[key] = [min(layers, 2) for layers in network[key]]
    if video and 'num_feat' in network:
        network['num_feat'] = min(network['num_feat'], VIDEO_WIDTH)
    if 'spynet_path' in network:
        network['spynet_path'] = str(PRETRAINED / 'spynet.pth')
    if 'edvr_path' in network:
        network['edvr_path'] = str(PRETRAINED / f'edvr{2 * network["temporal_padding"] + 1}.pth')
    train['total_iter'] = LEVEL_ITER
    for key, value in (('milestones', [1]), ('periods', [LEVEL_ITER]), ('restart_weights', [1])):
        if key in train['scheduler']:
            train['scheduler'][key] = value
    for key in ('fix_flow', 'tsa_iter'):
        if train.get(key):
            train[key] = 1
    metrics = {'psnr': {'type': 'calculate_psnr', 'crop_border': 4, 'test_y_channel': False}}
    opt.setdefault('val', {'save_img': False, 'metrics': metrics})
    opt['val']['val_freq'] = LEVEL_ITER
    opt['logger'].update(print_freq=1, save_checkpoint_freq=LEVEL_ITER)
    return opt


def swapped(stock: dict[str, Any], run: str) -> dict[str, Any]:
    """What the README tells: ``network_g`` becomes ``backbone``, ``model_type`` becomes ``base_model_type``."""
    opt = deepcopy(stock)
    opt['name'] = stock['name'].replace('stock', run)
    opt['base_model_type'] = opt['model_type']
    opt['network_g'] = {'type': 'MSSR', 'sparsity': SPARSITY, 'backbone': opt['network_g']}
    models = Path('experiments', stock['name'].replace('stock', '{}'), 'models', 'net_g_latest.pth')
    if run == 'forward':
        opt['model_type'] = 'MSSRForwardModel'
        opt['train'].update(level_iter=LEVEL_ITER, total_iter=LEVEL_ITER * len(SPARSITY))
    elif run == 'backward':
        opt['model_type'] = 'MSSRBackwardModel'
        expansion = {'type': 'SequentialExpansion', 'level_iter': LEVEL_ITER}
        opt['train'].update(expansion=expansion, total_iter=LEVEL_ITER * (len(SPARSITY) - 1))
        opt['path']['pretrain_network_g'] = str(models).format('forward')
        opt['path'].pop('param_key_g', None)
    else:
        opt['model_type'] = 'MSSRModel'
        opt['datasets'] = {'test_1': opt['datasets']['val']}
        opt['path']['pretrain_network_g'] = str(models).format('backward')
        opt['path']['param_key_g'] = 'params_ema' if opt['train'].get('ema_decay') else 'params'
        opt['val'].setdefault('suffix', None)
        for key in ('train', 'logger'):
            del opt[key]
    return opt


# ------------------------------ running ------------------------------ #


class Project:
    """A copy of a checkout's code: its package, with train.py and mostly test.py, in the working folder."""

    def __init__(self, checkout: Path, package: str, options: Path, folder: Path) -> None:
        self.options, self.package, self.folder = checkout / options, package, folder / checkout.name
        shutil.copytree(checkout / package, self.folder / package)
        version = self.folder / package / 'version.py'  # which setup.py writes
        if not version.exists():
            number = (checkout / 'VERSION').read_text().strip()
            version.write_text(f"__version__, __gitsha__, version_info = '{number}', 'unknown', ()\n")
        test = self.folder / package / 'test.py'
        if not test.exists():
            test.write_text(
                f'import os\nimport {package}.archs, {package}.data, {package}.models\n'
                'from basicsr.test import test_pipeline\ntest_pipeline(os.getcwd())\n'
            )

    def run(self, opt: dict[str, Any], log: Path) -> bool:
        """Whether the script comes to its end with ``opt``; what it prints is in ``log``."""
        yml = self.folder / f'{opt["name"]}.yml'
        yml.write_text(yaml.safe_dump(opt, sort_keys=False))
        script = self.folder / self.package / ('train.py' if 'train' in opt else 'test.py')

        def run() -> None:
            sys.path.insert(0, str(self.folder))
            sys.argv = [str(script), '-opt', str(yml)]
            runpy.run_path(str(script), run_name='__main__')

        return forked(run, self.folder, log)


def forked(function: Callable[[], object], folder: Path, log: Path) -> bool:
    """Whether ``function`` returns, in a process of its own with ``folder`` as its current one."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(LIMIT)
            os.chdir(folder)
            with log.open('w') as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def write_start(opt: dict[str, Any], networks: dict[str, dict[str, Any]], project: Project) -> None:
    """Random checkpoints in place of the ones that the YAML starts from."""

    def write() -> None:
        import importlib

        import torch
        from basicsr.archs import build_network

        sys.path.insert(0, str(project.folder))
        importlib.import_module(f'{project.package}.archs')
        for key, network in networks.items():
            state = build_network(network).state_dict()
            torch.save({'params': state, 'params_ema': state}, PRETRAINED / f'start_{key}.pth')

    for key in ('network_g', 'network_d'):
        if opt['path'].get(f'pretrain_{key}'):
            opt['path'][f'pretrain_{key}'] = str(PRETRAINED / f'start_{key}.pth')
            networks[key] = opt[key]
    if networks:
        forked(write, project.folder, Path(os.devnull))


def outcome(log: Path, done: bool) -> str:
    """What the table says of a run: works, refused and why, or failed and how."""
    if done:
        return 'works'
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if re.match(r'[\w.]*(Error|Exception|Interrupt)\b', line)), '')
    kind, _, text = last.partition(': ')
    text = text if len(text) < 160 else f'{text[:160]}...'
    return f'refused ({text})' if kind.endswith('OptionError') else f'failed ({kind}: {text})'


def losses(log: Path) -> set[str]:
    """The names of the losses, and of the discriminator's outputs, in the log of a training."""
    return set(re.findall(r'\b((?:l|out)_\w+): [-+\d.naife]+', log.read_text()))


def try_recipe(project: Project, recipe: Path, logs: Path) -> list[str]:
    """A row of the table."""
    began, found, logged = time.monotonic(), dict.fromkeys(RUNS, '-'), {}
    opt = yaml.load(recipe.read_text(), yaml.FullLoader)
    data = project.folder / 'data'
    stock = shrink(opt, data, f'{recipe.stem}_stock')
    write_start(stock, {}, project)
    for run in RUNS:
        if run in ('backward', 'test') and found['forward'] != 'works':
            break
        log = logs / f'{recipe.stem}_{run}.log'
        done = project.run(stock if run == 'stock' else swapped(stock, run), log)
        found[run], logged[run] = outcome(log, done), losses(log)
    lost = {name for run in ('forward', 'backward') for name in logged['stock'] - logged.get(run, logged['stock'])}
    for name in ('experiments', 'results', 'tb_logger', 'data'):
        for path in (project.folder / name).glob('*'):
            if path.name != PRETRAINED.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    seconds = f'{time.monotonic() - began:.0f}'
    return [recipe.stem, opt['model_type'], *found.values(), ', '.join(sorted(lost)) or '-', seconds]


def is_wrong(row: list[str]) -> bool:
    """Whether something that stock can do fails, or is lost; or whether something fails that had to be refused."""
    works_in_stock = row[2] == 'works'
    wanted = ('works', 'refused', '-')
    return (works_in_stock and not all(cell.startswith(wanted) for cell in row[2:6])) or row[6] != '-'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkout', type=Path, help='a clone of BasicSR')
    parser.add_argument('--match', nargs='+', default=[''], help='only YAMLs whose path has one of these in it')
    parser.add_argument('--others', nargs=2, type=Path, metavar=('HAT', 'REALESRGAN'), help='clones of these')
    parser.add_argument('--logs', type=Path, help="keep the runs' logs in this folder")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        logs = (args.logs or folder / 'logs').resolve()
        logs.mkdir(parents=True, exist_ok=True)
        os.environ.update(CUDA_VISIBLE_DEVICES='', MSSR_BASICSR_DISCOVERY='1')
        basicsr = Project(args.checkout.resolve(), 'basicsr', Path('options/train'), folder)
        sys.path.insert(0, str(basicsr.folder))
        import torch

        import mssr_basicsr.models  # noqa: F401  (imports BasicSR, that of the checkout, for all runs)

        torch.set_num_threads(1)
        found = [(basicsr, path) for path in sorted(basicsr.options.rglob('*.yml'))]
        if args.others:
            hat, realesrgan = args.others
            for project, names in (
                (Project(hat.resolve(), 'hat', Path('options/train'), folder), HAT_RECIPES),
                (Project(realesrgan.resolve(), 'realesrgan', Path('options'), folder), REALESRGAN_RECIPES),
            ):
                found += [(project, project.options / f'{name}.yml') for name in names]
        for project in {project for project, _ in found}:
            forked(lambda folder=project.folder: write_pretrained(folder), project.folder, Path(os.devnull))  # type: ignore[misc]
        rows = []
        print('| YAML | model class | ' + ' | '.join(RUNS) + ' | lost | seconds |')
        print('| --- | --- |' + ' --- |' * (len(RUNS) + 2), flush=True)
        for project, recipe in found:
            if re.search('^scale:', recipe.read_text(), re.M) and any(part in str(recipe) for part in args.match):
                rows.append(try_recipe(project, recipe, logs))
                print('| ' + ' | '.join(rows[-1]) + ' |', flush=True)
        wrong = [row[0] for row in rows if is_wrong(row)]
        working = sum(row[2:6] == ['works'] * 4 for row in rows)
        print(f'{working} of {len(rows)} work in all runs. Wrong: {", ".join(wrong) or "none"}.')
        sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
