"""The protocol of published results: values by hand, BasicSR's values and, if the sets are there, bicubic's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

import cv2
import numpy as np
import pytest
import skimage
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.metrics import calculate_metric, calculate_psnr, calculate_ssim
from basicsr.utils import bgr2ycbcr, img2tensor, tensor2img
from basicsr.utils.lmdb_util import LmdbMaker
from conftest import TOY_EDSR, Run, load

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.scalable.evaluation import resize_bicubic, validation_pairs
from mssr_basicsr.scalable.metrics import metrics, published_metrics

PHOTOGRAPHS = Path(skimage.__file__).parent / 'data'
#: Set5, Set14, BSD100 in folders; they are nobody's to commit.
SETS = Path(os.environ.get('MSSR_TEST_SETS', Path(__file__).resolve().parents[2] / 'shared' / 'data'))


def test_values_by_hand() -> None:
    grey = np.full((20, 20), 100.0)
    brighter = published_metrics(grey + 5, grey, 2)
    assert brighter['psnr'] == pytest.approx(10 * np.log10(255**2 / 25))
    c1 = (0.01 * 255) ** 2  # of flat images all variances are 0
    assert brighter['ssim'] == pytest.approx((2 * 105 * 100 + c1) / (105**2 + 100**2 + c1))
    assert published_metrics(grey, grey, 2) == {'psnr': float('inf'), 'ssim': pytest.approx(1)}
    # White and black have a Y of 235 and 16: in colour, 255 levels apart are 219.
    black, white = np.zeros((20, 20, 3)), np.full((20, 20, 3), 255.0)
    assert published_metrics(white, black, 2)['psnr'] == pytest.approx(20 * np.log10(255 / 219), abs=1e-4)
    # What lies in the border does not count.
    framed = np.pad(grey, 2)
    assert published_metrics(framed + np.pad(np.zeros((20, 20)), 2, constant_values=9), framed, 2)['psnr'] == float(
        'inf'
    )
    # One grey level up in all channels is 0.86 of Y up: rounded, all of it or nothing.
    colour = np.full((20, 20, 3), 100.0)
    assert published_metrics(colour + 1, colour, 2)['psnr'] == pytest.approx(20 * np.log10(255 / (219 / 255)), abs=1e-3)
    assert published_metrics(colour + 1, colour, 2, round_y=True)['psnr'] == pytest.approx(20 * np.log10(255))


@pytest.mark.parametrize('name', ['coffee.png', 'camera.png'])
def test_against_basicsr(name: str) -> None:
    truth = cv2.imread(str(PHOTOGRAPHS / name), cv2.IMREAD_UNCHANGED)
    image = cv2.GaussianBlur(truth, (5, 5), 1)
    coloured = truth.ndim == 3
    for round_y in (False, True):
        pair = (image, truth)
        if round_y and coloured:
            pair = tuple((bgr2ycbcr(one.astype(np.float32) / 255, y_only=True) * 255).round() for one in pair)
        options = {'crop_border': 3, 'test_y_channel': coloured and not round_y}
        found = published_metrics(image, truth, 3, round_y)
        assert found['psnr'] == pytest.approx(calculate_psnr(*pair, **options), abs=1e-4)
        assert found['ssim'] == pytest.approx(calculate_ssim(*pair, **options), abs=1e-6)


def test_a_grey_file_is_its_y(tmp_path: Path) -> None:
    """Upscaled by bicubic, LR and truth both from the file; as colours it would have seemed 1.32 dB better."""
    camera = cv2.imread(str(PHOTOGRAPHS / 'camera.png'), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(tmp_path / 'camera.png'), camera)
    ((small, truth),) = validation_pairs(tmp_path, None, 2)
    assert small.shape == (256, 256) and np.array_equal(truth, camera)
    upscaled = resize_bicubic(small, 2)
    error = np.square(upscaled.astype(float) - camera)[2:-2, 2:-2].mean()
    assert metrics(upscaled, truth, 2)['psnr'] == pytest.approx(10 * np.log10(255**2 / error))
    as_colours = [np.dstack([grey] * 3) for grey in (upscaled, camera)]
    squeezed = published_metrics(*as_colours, border=2)['psnr'] - metrics(upscaled, truth, 2)['psnr']
    assert squeezed == pytest.approx(20 * np.log10(255 / 219), abs=1e-3)
    # A colour network gives colours, which count as their grey: of equal channels, these.
    assert published_metrics(as_colours[0], camera, 2)['psnr'] == pytest.approx(metrics(upscaled, truth, 2)['psnr'])


@pytest.mark.parametrize(
    ('small', 'truth', 'text'),
    [
        ((12, 10), (24, 20, 3), r'lq/a.png: found a grey image; allowed: a colour one, like .*gt/a\.png'),
        ((24, 20, 3), (24, 20, 3), r'lq/a.png: found 20x24 pixels; allowed: 10x12, like .*gt/a\.png / 2'),
        (None, (24, 20, 3), r'lq/a.png: the LR image of .*gt/a\.png is missing'),
        ((8, 7), (17, 15), r'gt/a.png: found 15x17 pixels; allowed: at least 16 per side, to be compared'),
        ((1, 6), (1, 12), r'gt/a.png: found 12x1 pixels; allowed: at least 16 per side, to be compared'),
    ],
)
def test_images_that_cannot_be_compared_are_named(small: Any, truth: Any, text: str, tmp_path: Path) -> None:
    for name, shape in (('lq', small), ('gt', truth)):
        (tmp_path / name).mkdir()
        if shape:
            cv2.imwrite(str(tmp_path / name / 'a.png'), np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=text):
        list(validation_pairs(tmp_path / 'gt', tmp_path / 'lq', 2))


def test_the_lr_image_of_a_grey_one_may_be_stored_in_colour(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    for name, image in (('lq', np.dstack([grey] * 3)), ('gt', np.zeros((25, 21), np.uint8))):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / 'a.png'), image)
    ((small, truth),) = validation_pairs(tmp_path / 'gt', tmp_path / 'lq', 2)
    assert np.array_equal(small, grey) and truth.shape == (24, 20)


@pytest.mark.parametrize(
    ('image', 'truth', 'text'),
    [
        ((20, 20), (20, 21), 'found 21x20 pixels; allowed: 20x20'),
        ((20, 20), (20, 20, 3), 'found a colour image; allowed: a grey one'),
        ((14, 20), (14, 20), 'found 20x14 pixels; allowed: at least 15 per side'),
    ],
)
def test_what_cannot_be_compared(image: Any, truth: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        published_metrics(np.zeros(image), np.zeros(truth), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'psnr', 'rounded'), [('Set5', 33.68, 33.65), ('Set14', 30.24, 30.22), ('BSD100', 29.56, 29.55)]
)
def test_published_figures_of_bicubic(name: str, psnr: float, rounded: float) -> None:
    if not (SETS / name).is_dir():
        pytest.skip(f'{SETS / name} is not there')
    pairs = [(resize_bicubic(small, 2), truth) for small, truth in validation_pairs(SETS / name, None, 2)]
    for round_y, expected in ((False, psnr), (True, rounded)):
        found = mean(published_metrics(image, truth, 2, round_y)['psnr'] for image, truth in pairs)
        assert round(found, 2) == expected


# ------------------------------ in BasicSR ------------------------------ #


@pytest.fixture
def grey_and_colour(toy_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a validation set of two images: one a grey file, one the same grey as colours."""
    for part in ('gt', 'lq'):
        (tmp_path / part).mkdir()
        image = cv2.imread(str(toy_data / part / '0.png'), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(tmp_path / part / 'grey.png'), image)
        cv2.imwrite(str(tmp_path / part / 'rgb.png'), np.dstack([image] * 3))
    return {
        'name': 'greyval', 'type': 'PairedEvaluationDataset', 'io_backend': {'type': 'disk'},
        'dataroot_gt': str(tmp_path / 'gt'), 'dataroot_lq': str(tmp_path / 'lq'),
    }  # fmt: skip


def test_the_dataset_keeps_grey_files_grey(grey_and_colour: dict[str, Any]) -> None:
    dataset = build_dataset({**grey_and_colour, 'phase': 'val', 'scale': 2})
    grey, coloured = sorted((dataset[i] for i in range(2)), key=lambda pair: pair['gt_path'])
    assert grey['gt'].shape == (1, 32, 32) and coloured['gt'].shape == (3, 32, 32)
    assert grey['lq'].shape == coloured['lq'].shape == (3, 16, 16)
    upscaled = {'img': np.full((32, 32, 3), 128, np.uint8)}
    found = [
        calculate_metric({**upscaled, 'img2': tensor2img(pair['gt'])}, {'type': kind, 'crop_border': 2})
        for pair in (grey, coloured)
        for kind in ('calculate_psnr_published', 'calculate_ssim_published')
    ]
    truth = cv2.imread(grey['gt_path'], cv2.IMREAD_UNCHANGED)
    assert found[:2] == pytest.approx(list(published_metrics(upscaled['img'], truth, 2).values()))
    assert found[2] == pytest.approx(found[0] + 20 * np.log10(255 / 219), abs=1e-3)


@pytest.mark.parametrize('backend', ['disk', 'lmdb'])
def test_a_grey_file_is_its_own_y(backend: str, grey_and_colour: dict[str, Any], tmp_path: Path) -> None:
    """BasicSR's ``color: y`` is for networks with one channel; of colours, Y is what BasicSR computes.

    A ground truth that is a grey file has an LR image with the same range of values, however that is stored. One that
    is larger than ``scale`` times its LR image is cropped.
    """
    for part, side in (('gt', 33), ('lq', 16)):
        folder = Path(grey_and_colour[f'dataroot_{part}'])
        cv2.imwrite(str(folder / 'coloured_lq.png'), np.random.default_rng(0).integers(0, 256, (side, side), np.uint8))
    shown = cv2.imread(str(tmp_path / 'lq' / 'coloured_lq.png'))
    cv2.imwrite(str(tmp_path / 'lq' / 'coloured_lq.png'), shown)
    opt = {**grey_and_colour, 'phase': 'val', 'scale': 2, 'color': 'y', 'mean': [0.25], 'std': [0.5]}
    if backend == 'lmdb':
        opt['io_backend'] = {'type': 'lmdb'}
        for part in ('gt', 'lq'):
            opt[f'dataroot_{part}'] = str(tmp_path / f'{part}.lmdb')
            maker = LmdbMaker(opt[f'dataroot_{part}'], map_size=1 << 20)
            for path in (tmp_path / part).iterdir():
                maker.put(path.read_bytes(), path.stem, cv2.imread(str(path)).shape)
            maker.close()
    dataset = build_dataset(opt)
    found = {Path(pair['gt_path']).stem: pair for pair in (dataset[i] for i in range(3))}
    for name, pair in found.items():
        for part, side in (('gt', 32), ('lq', 16)):
            values = cv2.imread(str(tmp_path / part / f'{name}.png')).astype(np.float32)[:side, :side] / 255
            expected = bgr2ycbcr(values, y_only=True) if name == 'rgb' else values[..., 0]
            assert np.array_equal(pair[part].numpy(), (expected[None] - 0.25) / 0.5), (name, part)


def test_a_training_validates_by_the_protocol(
    forward_opt: dict[str, Any], grey_and_colour: dict[str, Any], run: Run
) -> None:
    """Each level's figure is what the published protocol gives for the network that is exported."""
    forward_opt['datasets']['val'] = grey_and_colour
    forward_opt['train'].update(level_iter=4, total_iter=12)
    forward_opt['val']['metrics'] = {'psnr': {'type': 'calculate_psnr_published', 'crop_border': 2}}
    models, expected = run(forward_opt) / 'models', []
    for level in range(3):
        plain = build_network(TOY_EDSR)
        plain.load_state_dict(load(models / f'net_g_level{level}.pth')['params'])
        found = []
        for name in ('grey.png', 'rgb.png'):
            small = cv2.imread(str(Path(grey_and_colour['dataroot_lq'], name)))
            truth = cv2.imread(str(Path(grey_and_colour['dataroot_gt'], name)), cv2.IMREAD_UNCHANGED)
            with torch.no_grad():
                upscaled = plain(img2tensor(small / np.float32(255))[None])
            found.append(published_metrics(tensor2img(upscaled), truth, 2)['psnr'])
        expected.append(mean(found))
    records = json.loads((models / 'levels.json').read_text())
    assert [record['metrics']['greyval']['psnr'] for record in records] == pytest.approx(expected)


def test_the_dataset_is_refused_for_training(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['datasets']['train']['type'] = 'PairedEvaluationDataset'
    with pytest.raises(
        OptionError, match=r"datasets\.train\.type: found 'PairedEvaluationDataset'; allowed: a training dataset"
    ):
        run(forward_opt)
