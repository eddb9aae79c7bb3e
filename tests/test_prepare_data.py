"""scripts/prepare_data.py and quickstart_data.py: what is stored and refused, and that it is complete or absent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / 'scripts'))

import prepare_data
import quickstart_data
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.matlab_functions import imresize
from PIL import Image
from prepare_data import DataError, prepare


def write(folder: Path, name: str, height: int, width: int, channels: int = 3, dtype: str = 'uint8') -> Any:
    """Write noise, which no codec makes smaller; return it."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name))
    image = rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)
    assert cv2.imwrite(str(folder / name), image.squeeze())
    return image


def read(output: Path, scale: int) -> dict[str, tuple[Any, Any]]:
    """What PairedImageDataset yields from `output`: key -> (HR, LR), 8-bit BGR."""
    dataset = PairedImageDataset(
        {
            'dataroot_gt': str(output / 'gt.lmdb'),
            'dataroot_lq': str(output / f'lq_x{scale}.lmdb'),
            'io_backend': {'type': 'lmdb'},
            'scale': scale,
            'phase': 'val',
        }
    )

    def image(tensor: Any) -> Any:
        return (tensor.numpy()[::-1].transpose(1, 2, 0) * 255).round().astype(np.uint8)

    return {dataset[i]['gt_path']: (image(dataset[i]['gt']), image(dataset[i]['lq'])) for i in range(len(dataset))}


def bicubic(image: Any, scale: int) -> Any:
    return np.clip(np.round(imresize(image / 255.0, 1 / scale) * 255), 0, 255).astype(np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / 'images'


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_whole_images(source: Path, tmp_path: Path, scale: int) -> None:
    image = write(source, 'odd.png', 41, 35)
    assert prepare(source, tmp_path / 'out', scale)
    gt, lq = read(tmp_path / 'out', scale)['odd']
    cropped = image[: 41 // scale * scale, : 35 // scale * scale]
    np.testing.assert_array_equal(gt, cropped)
    np.testing.assert_array_equal(lq, bicubic(cropped, scale))


def test_sub_images_are_cut_from_the_whole_lr_and_reach_every_border(source: Path, tmp_path: Path) -> None:
    image = write(source, 'a.png', 51, 40)
    prepare(source, tmp_path / 'out', 2, sub_image=16, step=12)
    pairs = read(tmp_path / 'out', 2)
    corners = [(top, left) for top in (0, 12, 24, 34) for left in (0, 12, 24)]
    assert sorted(pairs) == [f'a_s{i:03d}' for i in range(1, 13)]
    whole_lr = bicubic(image[:50], 2)
    for (top, left), (gt, lq) in zip(corners, (pairs[key] for key in sorted(pairs))):
        np.testing.assert_array_equal(gt, image[top : top + 16, left : left + 16])
        np.testing.assert_array_equal(lq, whole_lr[top // 2 : top // 2 + 8, left // 2 : left // 2 + 8])


def test_scale_augmentation(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, small = write(source, 'large.png', 41, 35), write(source, 'small.png', 15, 30)
    prepare(source, tmp_path / 'out', 2, scale_augment=[70, 45])
    pairs = read(tmp_path / 'out', 2)
    assert set(pairs) == {'large', 'large@70', 'large@45', 'small', 'small@70'}
    said = 'prepare_data: copies smaller than 8x8 are left out: small.png at 45 %\n'
    assert said in capsys.readouterr().err
    resized = np.clip(np.round(imresize(large / 255.0, 0.7) * 255), 0, 255).astype(np.uint8)
    assert resized.shape == (29, 25, 3)  # each side rounded up, as imresize does
    np.testing.assert_array_equal(pairs['large@70'][0], resized[:28, :24])
    np.testing.assert_array_equal(pairs['large@70'][1], bicubic(resized[:28, :24], 2))
    np.testing.assert_array_equal(pairs['small'][0], small[:14])


def test_scale_augmentation_of_sub_images(source: Path, tmp_path: Path) -> None:
    write(source, 'a.png', 40, 40)
    command = ['--input', str(source), '--output', str(tmp_path / 'out'), '--scale', '2', '--sub-image', '24']
    prepare_data.main([*command, '--scale-augment', '60'])
    assert set(read(tmp_path / 'out', 2)) == {*(f'a_s{i:03d}' for i in range(1, 5)), 'a@60_s001'}
    with pytest.raises(SystemExit, match=r'scale_augment \[60\] there, None asked for'):
        prepare_data.main(command)


def test_the_mark_of_copies_is_refused_in_names(source: Path, tmp_path: Path) -> None:
    write(source, 'a@70.png', 16, 16)
    prepare(source, tmp_path / 'whole', 2)
    with pytest.raises(DataError, match=r'a@70\.png: @ marks the copies of --scale-augment; rename it'):
        prepare(source, tmp_path / 'out', 2, scale_augment=[70])


def test_meta_info_gives_each_shape(source: Path, tmp_path: Path) -> None:
    write(source, 'a.png', 20, 30)
    prepare(source, tmp_path / 'out', 2)
    assert (tmp_path / 'out/gt.lmdb/meta_info.txt').read_text() == 'a.png (20,30,3) 1\n'
    assert (tmp_path / 'out/lq_x2.lmdb/meta_info.txt').read_text() == 'a.png (10,15,3) 1\n'


def test_grey_becomes_three_channels_and_alpha_is_dropped(source: Path, tmp_path: Path) -> None:
    grey, alpha = write(source, 'grey.png', 16, 16, 1), write(source, 'alpha.png', 16, 16, 4)
    prepare(source, tmp_path / 'out', 2)
    pairs = read(tmp_path / 'out', 2)
    np.testing.assert_array_equal(pairs['grey'][0], np.repeat(grey, 3, 2))
    np.testing.assert_array_equal(pairs['alpha'][0], alpha[..., :3])


def test_images_are_read_as_upscale_reads_them(source: Path, tmp_path: Path) -> None:
    image = write(source, 'sideways.png', 16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image[..., ::-1]).save(source / 'sideways.png', exif=exif)
    Image.new('CMYK', (16, 16), (0, 255, 0, 0)).save(source / 'inks.tif')
    prepare(source, tmp_path / 'out', 2)
    pairs = read(tmp_path / 'out', 2)
    np.testing.assert_array_equal(pairs['sideways'][0], np.rot90(image, -1))
    assert pairs['inks'][0][0, 0].tolist() == [255, 0, 255]


def test_what_is_skipped_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(source, 'a.png', 16, 16)
    (source / 'more').mkdir()
    (source / 'raw.dng').touch()
    prepare(source, tmp_path / 'out', 2)
    assert list(read(tmp_path / 'out', 2)) == ['a']
    said = f'prepare_data: skipped in {source}, not images by their names: more/, raw.dng\n'
    assert capsys.readouterr().err.startswith(said)  # then the progress bars


def test_noise_in_many_commits_fits_the_map(source: Path, tmp_path: Path) -> None:
    write(source, 'noise.png', 480, 480)
    prepare(source, tmp_path / 'out', 2, sub_image=64, step=16)
    assert len(read(tmp_path / 'out', 2)) == 27**2


def test_every_bad_file_is_named_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    write(source, 'good.png', 32, 32)
    write(source, 'small.png', 32, 15)
    write(source, 'deep.png', 32, 32, dtype='uint16')
    for name in ('cut.png', 'cut.jpg', 'cut.bmp'):
        write(source, name.replace('cut', 'cut_' + name[-3:]), 32, 32)
        path = source / name.replace('cut', 'cut_' + name[-3:])
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (source / 'text.png').write_text('not an image')
    (source / 'empty.png').touch()
    (source / 'notes.txt').write_text('passed over')
    with pytest.raises(DataError) as error:
        prepare(source, tmp_path / 'deep/out', 2, sub_image=16)
    lines = str(error.value).splitlines()
    assert lines[0].startswith('7 bad image(s)')
    assert [line.split(':')[0].strip() for line in lines[1:]] == sorted(
        ['small.png', 'deep.png', 'cut_png.png', 'cut_jpg.jpg', 'cut_bmp.bmp', 'text.png', 'empty.png']
    )
    assert '15x32 is too small, it must be at least 16x16' in str(error.value)
    assert 'uint16' in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize('names', [('a.png', 'a.jpg'), ('a.v1.png', 'a.v2.png'), ('caf\u00e9.png',)])
def test_names_that_cannot_be_keys_are_refused(source: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(source, name, 16, 16)
    with pytest.raises(DataError) as error:
        prepare(source, tmp_path / 'out', 2)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ((1,), '--scale 1 is too small'),
        ((2, 15), '--sub-image 15 is not a multiple of the scale, 2'),
        ((2, 16, 5), '--step 5 is not a multiple'),
        ((2, 16, 0), '--step 0 is too small'),
        ((2, 16, 18), 'pixels would be left out'),
        ((2, None, 8), 'needs a --sub-image'),
        ((2, None, None, [100]), '--scale-augment 100 is not a list of different percentages from 1 to 99'),
        ((2, None, None, [70, 70]), '--scale-augment 70 70 is not'),
    ],
)
def test_wrong_arguments(source: Path, tmp_path: Path, arguments: tuple[Any, ...], text: str) -> None:
    write(source, 'a.png', 32, 32)
    with pytest.raises(DataError, match=text):
        prepare(source, tmp_path / 'out', *arguments)


def test_no_folder_and_no_images(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='is not a folder'):
        prepare(source, tmp_path / 'out', 2)
    source.mkdir()
    with pytest.raises(DataError, match='found nothing; allowed: images'):
        prepare(source, tmp_path / 'out', 2)


def test_interrupted_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(source, 'a.png', 32, 32)
    write(source, 'b.png', 32, 32)
    pairs = prepare_data._pairs

    def interrupted(path: Path, *args: Any) -> Any:
        if path.stem == 'b':
            raise KeyboardInterrupt
        return pairs(path, *args)

    monkeypatch.setattr(prepare_data, '_pairs', interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / 'out', 2)
    assert list(tmp_path.iterdir()) == [source]
    monkeypatch.undo()
    assert prepare(source, tmp_path / 'out', 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['images', 'out']


def test_asking_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(source, 'a.png', 32, 32)
    command = ['--input', str(source), '--output', str(tmp_path / 'out'), '--scale']
    prepare_data.main([*command, '2'])
    assert capsys.readouterr().out.endswith('out: prepared\n')
    prepare_data.main([*command, '2'])
    assert capsys.readouterr().out.endswith('out: already prepared\n')
    with pytest.raises(SystemExit, match=r'scale 2 there, 4 asked for.*remove it or choose another folder'):
        prepare_data.main([*command, '4'])
    (tmp_path / 'out/lq_x2.lmdb/data.mdb').unlink()
    with pytest.raises(SystemExit, match=r'lq_x2\.lmdb is missing there'):
        prepare_data.main([*command, '2'])
    write(source, 'b.png', 32, 32)
    with pytest.raises(SystemExit, match='images 1 there, 2 asked for'):
        prepare_data.main([*command, '2'])


def test_the_users_own_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    write(source, 'a.png', 32, 32)
    (tmp_path / 'out').mkdir()
    with pytest.raises(DataError, match='was not made by this script'):
        prepare(source, tmp_path / 'out', 2)


@pytest.mark.slow
def test_quickstart_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(quickstart_data.TRAIN) & set(quickstart_data.VAL)
    quickstart_data.main(['--output', str(tmp_path)])
    assert {gt.shape for gt, _ in read(tmp_path / 'train', 2).values()} == {(96, 96, 3)}
    assert set(read(tmp_path / 'val', 2)) == set(quickstart_data.VAL)
    capsys.readouterr()
    quickstart_data.main(['--output', str(tmp_path)])
    assert capsys.readouterr().out.count('already prepared') == 2
