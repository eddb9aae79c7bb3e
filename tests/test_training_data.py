"""Bad training data: the error names it."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY
from conftest import Run, parsed

from mssr_basicsr.foundation.checks import OptionError


@pytest.fixture
def data(toy_data: Path, tmp_path: Path, forward_opt: dict[str, Any]) -> Path:
    """A copy of the toy data, which ``forward_opt`` then trains on."""
    folder = tmp_path / 'data'
    shutil.copytree(toy_data, folder)
    for dataset in forward_opt['datasets'].values():
        dataset.update(dataroot_gt=str(folder / 'gt'), dataroot_lq=str(folder / 'lq'))
    return folder


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('damaged', ['gt', 'lq'])
def test_a_corrupt_image_is_named_with_its_pair(
    damaged: str, workers: int, data: Path, forward_opt: dict[str, Any], run: Run
) -> None:
    for name in ('0', '1', '2', '3'):
        (data / damaged / f'{name}.png').write_bytes(b'\x89PNG, cut short')
    forward_opt['datasets']['train']['num_worker_per_gpu'] = workers
    with pytest.raises(ValueError, match=r'datasets\.train: cannot read ') as caught:
        run(forward_opt)
    files = [(str(data / 'lq' / f'{i}.png'), str(data / 'gt' / f'{i}.png')) for i in range(4)]
    assert any(lq in str(caught.value) and gt in str(caught.value) for lq, gt in files)


def test_a_corrupt_image_in_the_validation_set(data: Path, forward_opt: dict[str, Any], run: Run) -> None:
    shutil.copytree(data, data.with_name('val'))
    for name in ('gt', 'lq'):
        forward_opt['datasets']['val'][f'dataroot_{name}'] = str(data.with_name('val') / name)
    (data.with_name('val') / 'lq' / '2.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'datasets\.val: cannot read .*lq/2\.png'):
        run(forward_opt)


class Retrying(PairedImageDataset):
    """Another project's dataset: it takes the next image where one cannot be read, and knows its length late."""

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.length = len(self.paths)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except AttributeError:  # BasicSR's, of an image that OpenCV could not decode
            return self[(index + 1) % len(self)]


@pytest.mark.parametrize('registered', [False, True])
def test_a_dataset_that_deals_with_bad_images_sees_them(
    registered: bool, data: Path, forward_opt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a class that it extends has been used before or not. If it gives up, the error names the image once."""
    opt = {**forward_opt['datasets']['train'], 'phase': 'train', 'scale': 2}
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'Retrying', Retrying)
    DATASET_REGISTRY.get('PairedImageDataset')
    for name in ('__init__', '__getitem__'):  # what is patched in it is undone
        monkeypatch.setattr(Retrying, name, vars(Retrying)[name])
    dataset = (DATASET_REGISTRY.get('Retrying') if registered else Retrying)(deepcopy(opt))
    files = [Path(paths['lq_path']) for paths in dataset.paths]
    for file in files[:2]:
        file.write_bytes(b'\x89PNG, cut short')
    assert dataset[0]['lq_path'] == str(files[2])

    class GivingUp(Retrying):
        def __getitem__(self, index: int) -> Any:
            return PairedImageDataset.__getitem__(self, index)

    if registered:
        monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'GivingUp', GivingUp)
        with pytest.raises(ValueError) as caught:
            DATASET_REGISTRY.get('GivingUp')(opt)[0]
        assert str(caught.value).count('cannot read') == 1 and str(files[0]) in str(caught.value)


class Decorated(PairedImageDataset):
    """Its method has another name, as with a decorator that does not copy it."""

    __getitem__ = lambda self, index: PairedImageDataset.__getitem__(self, index)  # noqa: E731


class Wrapping(torch.utils.data.Dataset[Any]):
    """It takes its items from another dataset, and has paths of its own."""

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt
        self.inner = DATASET_REGISTRY.get('Decorated')(opt)
        self.paths = ['one', 'two', 'three', 'four']

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


@pytest.mark.parametrize('name', ['Decorated', 'Wrapping'])
def test_the_innermost_dataset_names_its_file(
    name: str, data: Path, forward_opt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'Decorated', Decorated)
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'Wrapping', Wrapping)
    dataset = DATASET_REGISTRY.get(name)({**forward_opt['datasets']['train'], 'phase': 'train', 'scale': 2})
    paths = dataset.inner.paths if name == 'Wrapping' else dataset.paths
    Path(paths[1]['lq_path']).write_bytes(b'\x89PNG, cut short')
    with pytest.raises(ValueError) as caught:
        dataset[1]
    files = f'lq_path {paths[1]["lq_path"]}, gt_path {paths[1]["gt_path"]}'
    reason = "AttributeError: 'NoneType' object has no attribute 'astype'"
    assert str(caught.value) == f'datasets.train: cannot read {files} ({reason})'


class Skipping(Wrapping):
    """It goes on with the next item if one cannot be read, by the exceptions that stock datasets raise, or gives up."""

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        del self.opt

    def __getitem__(self, index: int) -> Any:
        for i in range(index, len(self)):
            try:
                return self.inner[i]
            except (TypeError, AttributeError, OSError) as error:
                last = error
        raise last


def test_a_dataset_that_wraps_another_sees_its_errors(
    data: Path, forward_opt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dataset_class in (Decorated, Skipping):
        monkeypatch.setitem(DATASET_REGISTRY._obj_map, dataset_class.__name__, dataset_class)
    dataset = DATASET_REGISTRY.get('Skipping')({**forward_opt['datasets']['train'], 'phase': 'train', 'scale': 2})
    paths = [Path(paths['lq_path']) for paths in dataset.inner.paths]
    paths[0].unlink()
    paths[1].write_bytes(b'\x89PNG, cut short')
    assert dataset[0]['lq_path'] == str(paths[2])
    paths[2].write_bytes(b'\x89PNG, cut short')
    paths[3].unlink()
    with pytest.raises(ValueError) as caught:
        dataset[0]
    assert str(caught.value).startswith(f'datasets.train: cannot read lq_path {paths[3]}, gt_path ')
    assert '(FileNotFoundError: ' in str(caught.value)


def test_a_missing_option_is_no_unreadable_image(forward_opt: dict[str, Any], run: Run) -> None:
    del forward_opt['datasets']['train']['gt_size']
    with pytest.raises(KeyError, match=r"^'gt_size'$"):
        run(forward_opt)


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_an_empty_folder_is_refused_before_training(
    phase: str, tmp_path: Path, forward_opt: dict[str, Any], run: Run
) -> None:
    for name in ('gt', 'lq'):
        (tmp_path / 'empty' / name).mkdir(parents=True)
        forward_opt['datasets'][phase][f'dataroot_{name}'] = str(tmp_path / 'empty' / name)
    with pytest.raises(OptionError, match=rf'datasets\.{phase}: found .*empty/gt.*; allowed: folders or LMDBs that'):
        run(forward_opt)
    assert not list(tmp_path.glob('experiments/forward/models/*'))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'found nothing; allowed: a mapping'),
        ('- name', 'found a list'),
        ('name: x\n\tscale: 2', 'line 2; allowed'),
    ],
)
def test_a_yaml_that_holds_no_options_is_named(text: str, message: str, tmp_path: Path) -> None:
    yml = tmp_path / 'net.yml'
    yml.write_text(text)
    with pytest.raises(ValueError) as caught:
        parsed(yml, tmp_path)
    assert str(caught.value).startswith(f'{yml}: ')
    assert message in str(caught.value)


def test_the_network_decides_the_scale_before_training(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['network_g']['backbone']['upscale'] = 4
    with pytest.raises(OptionError, match=r'scale: found 2; allowed: 4, the factor by which the network upscales'):
        run(forward_opt)
