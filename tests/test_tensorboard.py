"""TensorBoard starts in the environment that this project is installed in, and shows what a run has logged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from conftest import HANGING, TOY_EDSR, Clips, Run, contents, forget_after
from PIL import Image

from mssr_basicsr.adapter.tensorboard import BLUE, CELL, LINE, pictures_of
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.scalable.container import ScalableFile


def tags_served(server: subprocess.Popen[bytes], log: Path, run_name: str) -> set[str]:
    """The scalars' tags that the server has of the run, as soon as it has any. It says in its log where it serves."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + HANGING
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        runs: dict[str, Any] = {}
        serves = re.search(r'http://127\.0\.0\.1:\d+/', log.read_text())
        # Where it serves, it may not answer yet.
        with contextlib.suppress(OSError):
            if serves is not None:
                with opener.open(f'{serves[0]}data/plugin/scalars/tags', timeout=60) as answer:
                    runs = json.load(answer)
        if runs.get(run_name):
            return set(runs[run_name])
        time.sleep(0.2)
    raise AssertionError(f'no tags of {run_name}; TensorBoard said: {log.read_text()}')


@pytest.mark.slow
def test_tensorboard_shows_a_run(forward_opt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    forward_opt['train'].update(level_iter=1, total_iter=3, rewind_iter=1)
    forward_opt['val']['val_freq'] = 1
    forward_opt['logger']['use_tb_logger'] = True
    run(forward_opt)
    log = tmp_path / 'tensorboard.txt'
    command = [sys.executable, '-m', 'tensorboard.main', '--logdir', 'tb_logger', '--host', '127.0.0.1']
    with log.open('w') as said:
        server = subprocess.Popen(
            [*command, '--port', '0', '--load_fast=false'],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        tags = tags_served(server, log, 'forward')
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which is what the test then fails for
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert {'losses/l_pix', 'levels/toyval/psnr', 'layer_density/conv_first.weight'} <= tags


def events_of(experiment: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(experiment.parents[1] / 'tb_logger' / experiment.name)).Reload()


def images(events: Any, tag: str) -> dict[int, Any]:
    """By step, as RGB arrays; the last of a step."""
    found = {image.step: image.encoded_image_string for image in events.Images(tag)}
    return {step: np.asarray(Image.open(BytesIO(data))) for step, data in found.items()}


def panels(image: Any) -> list[Any]:
    """The toy's 32 x 32 pictures in an image, three in a row, each below a line of text; without empty places."""
    height, width, _ = image.shape
    rows = [np.split(row[LINE:], width // 32, axis=1) for row in np.split(image, height // (LINE + 32))]
    return [panel for row in rows for panel in row if (panel < 255).any()]


def read(path: Path) -> Any:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def upscaled(checkpoint: Path, lq: Path) -> Any:
    """What stock BasicSR's network makes of an image."""
    network = build_network(dict(TOY_EDSR)).eval()
    network.load_state_dict(torch.load(checkpoint)['params'])
    with torch.no_grad():
        output = network(torch.from_numpy(read(lq) / np.float32(255)).permute(2, 0, 1)[None])
    return (output[0].clamp(0, 1) * 255).round().permute(1, 2, 0).byte().numpy()


@pytest.fixture
def logged_opt(forward_opt: dict[str, Any]) -> dict[str, Any]:
    forward_opt['logger']['use_tb_logger'] = True
    return forward_opt


def test_pictures_and_densities_of_the_levels(
    logged_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, toy_data: Path
) -> None:
    """The pictures are those of the levels' plain checkpoints; a cell's colour is the share of the level map."""
    backward_opt['logger']['use_tb_logger'] = True
    for opt, num_shown in ((logged_opt, {4: 1, 8: 2, 12: 3}), (backward_opt, {3: 2, 6: 3})):
        experiment = run(opt)
        events = events_of(experiment)
        shown = {step: panels(image) for step, image in images(events, 'validation/toyval').items()}
        assert {step: len(shown[step]) - 1 for step in num_shown} == num_shown
        *levels, gt = shown[max(num_shown)]
        (name,) = [path.name for path in (toy_data / 'gt').iterdir() if np.array_equal(gt, read(path))]
        for level, picture in enumerate(levels):
            expected = upscaled(experiment / 'models' / f'net_g_level{level}.pth', toy_data / 'lq' / name)
            assert np.abs(picture.astype(int) - expected).max() <= 1

        tables = images(events, 'layer_density/percent')
        assert list(tables) == ([0, 1, 2] if opt is logged_opt else [2])
        state = torch.load(experiment / 'models' / 'net_g_latest.pth')['params']
        maps = [state[name] for name in state if 'level_map' in name]
        assert tables[2].shape[0] == LINE * (len(maps) + 1)
        for level in range(3):
            corners = tables[2][2 * LINE - 1 :: LINE, (level - 2) * CELL - 1]
            shares = np.sqrt([(level_map >= level).double().mean().item() for level_map in maps])
            assert np.array_equal(corners, np.round(255 - np.outer(shares, 255 - np.array(BLUE))))


def test_a_picture_is_the_middle_of_an_image() -> None:
    image = torch.rand(1, 3, 301, 40)
    found = pictures_of({'lq': image, 'result': image, 'gt': image[:, :1]})
    middle = np.round(image[0, :, 54:246].permute(1, 2, 0).numpy() * 255)
    assert np.array_equal(np.asarray(found['result']), middle)
    assert np.array_equal(np.asarray(found['gt']), middle[..., :1].repeat(3, axis=2))
    clip = torch.rand(1, 2, 3, 8, 8)
    assert pictures_of({'result': clip, 'gt': clip}) == pictures_of({}) == {}


class Double(torch.nn.Module):
    """A network for video."""

    def __init__(self, middle: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 3, padding=1)
        self.middle = middle

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        frames = torch.nn.functional.pixel_shuffle(self.conv(clip[0]), 2)[None]
        return frames[:, 1] if self.middle else frames


@pytest.mark.parametrize('model_type', ['VideoBaseModel', 'VideoRecurrentModel'])
def test_video_classes(model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What upscales frames one by one shows the first, what upscales a clip shows none; tags are without the set."""
    from tensorboard.plugins.hparams import metadata
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Double', Double)
    middle = model_type == 'VideoBaseModel'
    network_g = {'type': 'MSSR', 'sparsity': [0, 0.5], 'backbone': {'type': 'Double', 'middle': middle}}
    opt = {'num_gpu': 0, 'is_train': False, 'dist': False, 'rank': 0, 'name': 'x', 'scale': 2}
    model = build_model({
        **opt, 'model_type': 'MSSRModel', 'base_model_type': model_type, 'network_g': network_g,
        'datasets': {'val': {'name': 'clips'}}, 'path': {'visualization': '', 'results_root': str(tmp_path)},
        'val': {'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}},
    })  # fmt: skip
    model.network.prune(1, CRITERION_REGISTRY.get('global_magnitude'), torch.Generator())
    clip, gt = torch.rand(3, 3, 4, 4), torch.ones(3, 3, 8, 8)
    frames = [{'lq': clip, 'gt': gt[0], 'idx': f'{i}/3', 'lq_path': 'x.png'} for i in range(3)]
    with SummaryWriter(str(tmp_path / 'tb_logger' / 'x')) as writer:
        clips = Clips(frames if middle else [{'lq': clip, 'gt': gt}])
        model.validation(SimpleNamespace(dataset=clips), 5, writer)
    events = events_of(tmp_path / 'experiments' / 'x')
    columns = events.PluginTagToContent('hparams')[metadata.EXPERIMENT_TAG]
    tags = [metric.name.tag for metric in metadata.parse_experiment_plugin_data(columns).metric_infos]
    assert tags == ['metrics/psnr_level0', 'metrics/psnr_level1']
    assert set(tags) <= set(events.Tags()['scalars'])
    assert events.Tags()['images'] == ['layer_density/percent', *['validation/clips'] * middle]
    if middle:
        assert images(events, 'validation/clips')[5].shape == (LINE + 8, 3 * 8, 3)


def test_hparams_name_the_options_and_the_metrics(
    logged_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    from tensorboard.plugins.hparams import metadata

    backward_opt['logger']['use_tb_logger'] = True
    columns = []
    for opt in (logged_opt, backward_opt):
        opt['datasets']['val_2'] = {**opt['datasets']['val'], 'name': 'other'}
        experiment = run(opt)
        assert len(list((experiment.parents[1] / 'tb_logger' / opt['name']).iterdir())) == 1
        events = events_of(experiment)
        written = events.PluginTagToContent('hparams')
        row = metadata.parse_session_start_info_plugin_data(written[metadata.SESSION_START_INFO_TAG]).hparams
        assert row['train.optim_g.lr'].number_value == 1e-3
        assert row['network_g.sparsity'].string_value == '[0.0, 0.5, 0.75]'
        assert row['network_g.backbone.type'].string_value == 'EDSR'
        assert row['train.precision'].string_value == 'fp32'
        assert ('train.criterion' in row) == (opt is logged_opt)
        parsed = metadata.parse_experiment_plugin_data(written[metadata.EXPERIMENT_TAG])
        columns.append({column.name for column in parsed.hparam_infos})
        tags = [metric.name.tag for metric in parsed.metric_infos]
        assert tags == [f'metrics/{name}/psnr_level{level}' for name in ('toyval', 'other') for level in range(3)]
        assert set(tags) <= set(events.Tags()['scalars'])
    assert columns[0] == columns[1]


def test_a_number_as_a_name(logged_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run) -> None:
    """YAML reads a set's name 291 as a number, which BasicSR accepts. Another set's may be a text."""
    from tensorboard.plugins.hparams import metadata

    backward_opt['logger']['use_tb_logger'] = True
    for opt in (logged_opt, backward_opt):
        opt['datasets']['val_2'] = {**opt['datasets']['val'], 'name': 291}
        experiment = run(opt)
        events = events_of(experiment)
        *_, charts = events.Tensors('custom_scalars__config__')
        assert b'^metrics/(291/)?psnr_level' in charts.tensor_proto.string_val[0]
        columns = events.PluginTagToContent('hparams')[metadata.EXPERIMENT_TAG]
        tags = {metric.name.tag for metric in metadata.parse_experiment_plugin_data(columns).metric_infos}
        assert 'metrics/291/psnr_level2' in tags <= set(events.Tags()['scalars'])
    models = experiment / 'models'
    recorded = {str(record['level']): record['metrics'] for record in json.loads((models / 'levels.json').read_text())}
    with ScalableFile(models / 'net_g.mssr') as file:
        assert file.header.metrics.keys() == recorded.keys()
        for level, sets in recorded.items():
            assert file.header.metrics[level] == {key: pytest.approx(sets[key], rel=1e-5) for key in ('toyval', '291')}


class OwnScalars(SRModel):
    """It logs a scalar of its own in validation."""

    def nondist_validation(self, dataloader: Any, current_iter: int, tb_logger: Any, save_img: bool) -> None:
        super().nondist_validation(dataloader, current_iter, tb_logger, save_img)
        tb_logger.add_scalar('own/toyval', 0.5, current_iter)


def test_a_validation_without_metrics(logged_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'OwnScalars', OwnScalars)
    del logged_opt['val']['metrics']
    events = events_of(run({**logged_opt, 'base_model_type': 'OwnScalars'}))
    assert {f'own/toyval_level{level}' for level in range(3)} <= set(events.Tags()['scalars'])


def test_tensorboard_changes_no_bit(forward_opt: dict[str, Any], run: Run) -> None:
    """Nor does it when a run resumes; the dataset draws from the generators that validation must leave alone."""
    forward_opt['train']['criterion'] = 'random'
    without = contents(run(forward_opt) / 'models')
    forward_opt['logger'].update(use_tb_logger=True, save_checkpoint_freq=2)
    forward_opt['val']['val_freq'] = 1
    experiment = run(forward_opt)
    assert contents(experiment / 'models') == without
    forget_after(experiment, 6)
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == without
