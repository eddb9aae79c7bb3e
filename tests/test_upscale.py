"""Upscaling images with a .mssr file, in Python and on the command line, and exporting levels to other programs."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.spynet_arch import SpyNet
from basicsr.utils import img2tensor, tensor2img
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import BACKBONES, assert_same, needs_onnx_export, network, pruned_mssr
from torch import nn
from torch.nn import functional as F

from mssr_basicsr import ScalableModel, extract, pack, to_onnx
from mssr_basicsr.commands.main import main
from mssr_basicsr.commands.upscale import parse_size
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.scalable import measuring, plotting, upscaling

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts'))
import side_by_side


def model_of(name: str = 'EDSR', level: int = 1) -> ScalableModel:
    return ScalableModel(io.BytesIO(pack(network(BACKBONES[name]), 2)), level=level)


def picture(*shape: int, dtype: str = 'uint8') -> Any:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def test_initial_weight_files_are_not_needed_for_loading(tmp_path: Path) -> None:
    """BasicVSR takes SPyNet's weights from a file; a .mssr file has them."""
    spynet = {name: weight for name, weight in SpyNet().state_dict().items() if name not in ('mean', 'std')}
    torch.save({'params': spynet}, tmp_path / 'spynet.pth')
    options = {'type': 'BasicVSR', 'num_feat': 4, 'num_block': 1, 'spynet_path': str(tmp_path / 'spynet.pth')}
    data = pack(pruned_mssr(options), 4)
    (tmp_path / 'spynet.pth').unlink()
    assert b'spynet_path' not in data
    model = ScalableModel(io.BytesIO(data), level=0)
    assert torch.equal(
        model.network.spynet.state_dict()['basic_module.0.basic_module.0.weight'],
        spynet['basic_module.0.basic_module.0.weight'],
    )


def test_an_architecture_from_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It is registered by the module that --import names, here one of the current folder."""
    (tmp_path / 'their_archs.py').write_text(
        'from basicsr.archs.edsr_arch import EDSR\nfrom basicsr.utils.registry import ARCH_REGISTRY\n'
        "ARCH_REGISTRY._obj_map['Theirs'] = EDSR\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'Theirs': EDSR})
    Path('x.mssr').write_bytes(pack(network({**BACKBONES['EDSR'], 'type': 'Theirs'}), 2))
    del ARCH_REGISTRY._obj_map['Theirs']
    cv2.imwrite('small.png', picture(8, 9, 3))
    upscale = ['upscale', 'x.mssr', 'small.png', '-o', 'large.png']
    assert main(upscale) == 1
    assert (
        'Theirs is not registered with BasicSR; first import the package that registers it' in capsys.readouterr().err
    )
    assert main([*upscale, '--import', 'no_archs']) == 1
    assert "--import: found 'no_archs'; allowed: a module (ModuleNotFoundError: " in capsys.readouterr().err
    assert main([*upscale, '--import', 'their_archs']) == 0
    del sys.modules['their_archs']


# ------------------------------ in Python ------------------------------ #


def test_an_image_is_upscaled_as_by_basicsr() -> None:
    model, image = model_of(), picture(21, 34, 3)  # BGR, as BasicSR reads it
    with torch.no_grad():
        expected = tensor2img(model.network(img2tensor(image.astype(np.float32) / 255)[None]))
    assert np.array_equal(model.upscale(image, bgr=True), expected)
    assert np.array_equal(model.upscale(image[..., ::-1]), expected[..., ::-1])


@pytest.mark.parametrize('shape', [(9, 13), (9, 13, 1), (9, 13, 2), (9, 13, 3), (9, 13, 4), (1, 1, 3)])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
def test_kinds_of_images(shape: tuple[int, ...], dtype: str) -> None:
    image = picture(*shape, dtype=dtype)
    if dtype == 'float32':
        image = image / np.float32(255)
    result = model_of().upscale(image)
    assert result.dtype == dtype
    assert result.shape == (2 * shape[0], 2 * shape[1], *shape[2:])


@pytest.mark.parametrize('dtype', ['<u2', '>u2', '<f4', '>f4'])
def test_the_order_of_the_bytes_makes_no_difference(dtype: str) -> None:
    """Readers of TIFF give big-endian values."""
    image, model = picture(9, 13, 3), model_of()
    image = image / np.float32(255) if 'f' in dtype else image.astype(np.uint16) * 257
    assert np.array_equal(model.upscale(image.astype(dtype)), model.upscale(image))
    with pytest.raises(ValueError, match='image: found float32 values from 0 to 255'):
        model.upscale(np.array([[0, 255]], '>f4'))


def test_opaque_stays_opaque_and_colours_ignore_alpha() -> None:
    model, image = model_of(), picture(9, 13, 4)
    image[..., 3] = 255
    result = model.upscale(image)
    assert (result[..., 3] == 255).all()
    assert np.array_equal(result[..., :3], model.upscale(image[..., :3]))


def test_grey_images_through_a_network_for_grey() -> None:
    backbone = {**BACKBONES['SRVGGNetCompact'], 'num_in_ch': 1, 'num_out_ch': 1}
    model = ScalableModel(io.BytesIO(pack(network(backbone), 2)))
    grey = picture(9, 13)
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=2)
    result = model.upscale(colour)
    assert np.array_equal(result[..., 0], model.upscale(grey))
    assert np.array_equal(result[..., 1], model.upscale(grey[::-1]))


def test_grey_images_through_a_network_for_colour() -> None:
    """Its three channels are grey, and what comes out is the luma of the network's colours, here as OpenCV has it."""
    model, grey = model_of(), picture(9, 13, dtype='float32') / np.float32(255)
    with torch.no_grad():
        (colours,) = model.network(torch.from_numpy(np.stack([grey] * 3))[None])
    assert all((colours[i] - colours[j]).abs().max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))
    expected = cv2.cvtColor(colours.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY).clip(0, 1)
    assert np.abs(model.upscale(grey) - expected).max() <= 1e-5
    assert np.abs(model.upscale(grey, bgr=True) - expected).max() <= 1e-5
    eight_bits = model.upscale(picture(9, 13))
    assert np.abs(eight_bits - 255 * expected).max() <= 0.501


@pytest.mark.parametrize('image', [picture(4, 4, 5), picture(4, 4, 3).astype(np.int64), picture(0, 4, 3), picture(4)])
def test_what_is_not_an_image_is_refused(image: Any) -> None:
    with pytest.raises(ValueError, match=r'image: found .*; allowed: '):
        model_of().upscale(image)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in BACKBONES if name != 'RCAN'])
def test_the_size_of_the_tiles_makes_no_difference(name: str) -> None:
    model = model_of(name)
    image = picture(75, 62, 3, dtype='float32') / np.float32(255)
    whole = model.upscale(image, tile=0)
    for tile in (8, 19, 40):
        assert np.abs(model.upscale(image, tile=tile) - whole).max() <= 1e-6


def test_tiles_overlap_by_exactly_the_receptive_field() -> None:
    # 3 x 3 convolutions, a pixel each: the first, 3 blocks of 2, the body's last, the upsampler's; and the last one,
    # which sees a pixel of the upscaled image farther, that is in the next one of the input.
    assert model_of('EDSR').upscaler.reach() == 10


def test_tiles_of_a_network_that_sees_the_whole_image_are_refused() -> None:
    model = model_of('RCAN')
    with pytest.raises(ValueError, match='tile: found 16; allowed: 0, since RCAN looks at the whole image'):
        model.upscale(picture(40, 40, 3), tile=16)
    assert model.upscale(picture(40, 40, 3)).shape == (80, 80, 3)


def test_tile_size_follows_from_the_network_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = model_of('EDSR'), picture(300, 500, 3)  # 8 features x2, and sees 10 pixels beyond a tile
    whole = model.upscale(image, tile=0)
    counts = []

    def counted(tiles: list[Any]) -> list[Any]:
        counts.append(len(tiles))
        return tiles

    for cache, side in ((2**10, 120), (4 * 8 * 4 * 150**2, 130), (2**40, 512)):
        monkeypatch.setattr(upscaling, '_last_cache', lambda cache=cache: cache)
        assert model.upscaler.automatic_tile() == side
        result = model.upscaler.upscale(image, progress=counted)
        # To the last of 8 bits: float32 may round otherwise in a window of another width.
        difference = np.abs(result.astype(int) - whole)
        assert difference.max() <= 1
        assert difference.mean() < 1e-4
    assert counts == [3 * 5, 3 * 4, 1]


def test_values_that_would_come_out_white_or_black_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r'found float32 values from 0 to 200; allowed: 0 \(black\) to 1 \(white\)'):
        model.upscale(np.array([[0, 200]], np.float32))
    with pytest.raises(ValueError, match='found float32 values from nan to nan'):
        model.upscale(np.array([[0, np.nan]], np.float32))
    assert model.upscale(np.array([[-0.01, 1.02]], np.float32)).shape == (2, 4)  # as resizing leaves behind
    with torch.no_grad():
        model.network.conv_last.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match='EDSR: outputs values that are not finite'):
        model.upscale(picture(4, 4, 3))


# ------------------------------ the command ------------------------------ #


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'model.mssr'
    path.write_bytes(pack(network(), 2, {'0': {'toy': {'psnr': 31.25}}, '2': {'toy': {'psnr': 30.5}}}))
    return path


def test_sizes() -> None:
    assert [parse_size(text) for text in ('200KB', '1.5MiB', '77', '2 mb')] == [200_000, 1_572_864, 77, 2_000_000]


def test_info(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['info', str(file)]) == 0
    table = capsys.readouterr().out
    assert 'EDSR x2' in table
    assert '31.2500' in table
    assert main(['info', str(file), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row['level'] for row in found['levels']] == [0, 1, 2]
    assert found['levels'][0]['cumulative_bytes'] == found['file_bytes'] == file.stat().st_size
    assert found['levels'][0]['sparsity'] == 0


def test_verify(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['verify', str(file)]) == 0
    assert 'OK, levels 0 to 2' in capsys.readouterr().out
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert main(['verify', str(file)]) == 1
    said = capsys.readouterr()
    assert 'OK, levels 1 to 2' in said.out
    assert re.search(r'the last [\d,]+ bytes are unusable, since level 0 has more', said.err)
    file.write_bytes(whole[:-1] + b'?')
    assert main(['verify', str(file)]) == 1
    assert 'the section of level 0 is corrupted' in capsys.readouterr().err
    file.write_bytes(whole + b'?')
    assert main(['verify', str(file)]) == 1


def test_a_pipe_is_read_once(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in mssr verify <(curl URL)."""
    whole = file.read_bytes()

    def call(command: str, data: bytes, status: int, *more: str) -> Any:
        reading, writing = os.pipe()
        try:
            assert os.write(writing, data) == len(data)
            os.close(writing)
            assert main([command, f'/dev/fd/{reading}', *more]) == status
        finally:
            os.close(reading)
        return capsys.readouterr()

    said = call('info', whole, 0)
    assert f'\n{len(whole):,} bytes if whole (a stream does not say how many it has), values F32\n' in said.out
    assert f': OK, levels 0 to 2, {len(whole):,} bytes (whole)\n' in call('verify', whole, 0).out
    said = call('verify', whole + b'more', 1)
    assert f': OK, levels 0 to 2, {len(whole):,} bytes (whole)\n' in said.out
    assert 'the last 4 bytes are unusable, since no level has them' in said.err
    assert f'needs the first {len(whole):,} bytes; there are {len(whole) - 1:,}' in call('verify', whole[:-1], 1).err
    call('extract', whole, 0, '--level', '1', '-o', str(tmp_path / 'level.pth'))
    assert_same(torch.load(tmp_path / 'level.pth')['params'], network().export(1))


def test_memory_is_counted_in_pages_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, page = measuring._resident(), os.sysconf('SC_PAGE_SIZE')
    if not resident:
        pytest.skip('the system does not say')
    monkeypatch.setattr(os, 'sysconf', lambda name: 16 * page)  # as on some ARM machines
    assert measuring._resident() > 8 * resident


def test_extract(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = network().export(1)
    smaller = file.with_name('smaller.mssr')
    for output in (file.with_suffix('.pth'), file.with_suffix('.safetensors'), smaller):
        assert main(['extract', str(file), '--level', '1', '-o', str(output)]) == 0
    assert main(['verify', str(smaller)]) == 0
    assert 'OK, levels 1 to 2' in capsys.readouterr().out
    assert_same(torch.load(file.with_suffix('.pth'))['params'], expected)
    assert_same(ScalableModel(smaller).network.state_dict(), expected)
    from safetensors.torch import load_file

    assert_same(load_file(file.with_suffix('.safetensors')), expected)
    assert main(['extract', str(file), '-o', 'x.onnx']) == 1
    assert "--output: found 'x.onnx'; allowed: a name that ends in .pth, .safetensors" in capsys.readouterr().err


def test_upscale_a_folder(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ('lq', 'gt'):
        (tmp_path / folder).mkdir()
    for name in ('a', 'b'):
        cv2.imwrite(str(tmp_path / 'lq' / f'{name}.png'), picture(12, 15, 3))
        cv2.imwrite(str(tmp_path / 'gt' / f'{name}.png'), picture(24, 31, 3))
    command = ['upscale', str(file), str(tmp_path / 'lq'), '-o', str(tmp_path / 'out'), '--gt', str(tmp_path / 'gt')]
    assert main([*command, '--level', '2', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['level'] == 2
    assert found['mean']['psnr'] == pytest.approx(np.mean([image['psnr'] for image in found['images']]))
    made = cv2.imread(str(tmp_path / 'out' / 'a.png'))
    assert np.array_equal(made, ScalableModel(file, level=2).upscale(picture(12, 15, 3), bgr=True))
    (tmp_path / 'lq' / 'c.png').write_bytes(b'no image')
    assert main([*command, '--budget', '1GB']) == 1
    printed = capsys.readouterr()
    assert 'c.png: not an image' in printed.err
    assert '2 of 3 images upscaled' in printed.out


def test_upscale_says_what_is_wrong(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), picture(12, 15, 3))
    for arguments, message in [
        ([str(image), '-o', str(tmp_path / 'x.txt')], '--output: found '),
        ([str(image), '-o', str(tmp_path)], 'allowed: a file other than the input'),
        ([str(tmp_path / 'none'), '-o', 'x.png'], 'No such file'),
        ([str(image), '-o', 'x.png', '--level', '7'], 'level 7: this model has levels 0 to 2'),
        ([str(image), '-o', 'x.png', '--budget', '1KB'], 'over the budget'),
        ([str(image), '-o', 'x.png', '--tile', '-3'], '--tile: found -3'),
    ]:
        assert main(['upscale', str(file), *arguments]) == 1
        assert message in capsys.readouterr().err
    for size in ('much', 'inf', 'nan', '1e3', '2XB', '9' * 400, '9' * 305 + 'MB'):
        with pytest.raises(SystemExit, match='2'):
            main(['upscale', str(file), str(image), '-o', 'x.png', '--budget', size])
        said = capsys.readouterr().err
        assert f'argument --budget: found {size[:80]!r}; allowed: a number of bytes, KB, MB' in said
    with pytest.raises(SystemExit, match='2'):
        main(['upscale', str(file), str(image), '-o', 'x.png', '--lvl', '4'])
    said = capsys.readouterr().err
    assert said.startswith('usage: mssr upscale ')
    assert said.endswith('mssr upscale: error: unrecognized arguments: --lvl 4\n')


def test_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['plot', str(file), '-o', str(tmp_path / 'plot.png')]) == 0
    assert cv2.imread(str(tmp_path / 'plot.png')) is not None
    file.write_bytes(pack(network(), 2))
    assert main(['plot', str(file), '-o', str(tmp_path / 'plot.png')]) == 1
    assert 'found no PSNR; allowed: a file packed with --gt' in capsys.readouterr().err


def test_plotted_files_of_the_same_name_are_told_apart(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ('a/net_g.mssr', 'b/net_g.mssr', 'b/other.mssr'):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(file.read_bytes())
    figures: list[Any] = []
    monkeypatch.setattr(plotting, 'save_figure', lambda figure, _: figures.append(figure))
    plotting.plot(['a/net_g.mssr', 'b/net_g.mssr', 'b/other.mssr'], 'plot.png')
    labels = figures[0].axes[0].get_legend_handles_labels()[1]
    assert labels == ['toy, a/net_g.mssr', 'toy, b/net_g.mssr', 'toy, other']


def test_a_set_whose_name_begins_with_an_underscore_is_in_the_legend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / 'net_g.mssr'
    path.write_bytes(pack(network(levels=2), 2, {'0': {'_toy': {'psnr': 30.0}}, '1': {'_toy': {'psnr': 29.0}}}))
    figures: list[Any] = []
    monkeypatch.setattr(plotting, 'save_figure', lambda figure, _: figures.append(figure))
    plotting.plot([path], tmp_path / 'plot.png')
    assert figures[0].axes[0].get_legend_handles_labels()[1] == [' _toy, net_g']


def test_any_name_can_be_plotted(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('$\\no mathematics$', os.fsdecode(b'caf\xe9')):
        path = tmp_path / f'{name}.mssr'
        path.write_bytes(file.read_bytes())
        assert main(['plot', str(path), '-o', str(tmp_path / 'plot.png')]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('a.png -o x.txt', "--output: found 'x.txt'; allowed: a name that ends in ."),
        ('a.png --levels 2 7', '--levels: found [2, 7]; allowed: 0 to 2, which m.mssr has.'),
        ('a.png --crop 20 9 12', '--crop: found [20, 9, 12]; allowed: X Y SIZE of a square within 30x20.'),
        ('a.png --crop 0 0 0', '--crop: found [0, 0, 0]; allowed: '),
        ('folder', "PHOTO: found 'folder'; allowed: an image."),
    ],
)
def test_side_by_side_upscales_nothing_in_vain(
    arguments: str, message: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('folder').mkdir()
    Path('m.mssr').write_bytes(file.read_bytes())
    cv2.imwrite('a.png', picture(20, 30, 3))
    side_by_side.main(['m.mssr', 'a.png', '-o', 'x.png'])
    assert cv2.imread('x.png') is not None
    monkeypatch.setattr(side_by_side, 'upscaled', pytest.fail)
    with pytest.raises(SystemExit) as ended:
        side_by_side.main(['m.mssr', *arguments.split()])
    assert str(ended.value).startswith(f'side_by_side: {message}')


# ------------------------------ other programs ------------------------------ #


@pytest.mark.parametrize('name', ['RCAN', 'SwinIR', 'RRDBNet', 'SRVGGNetCompact'])
def test_extracted_levels_open_in_spandrel(name: str, tmp_path: Path) -> None:
    from spandrel import ModelLoader

    # spandrel reads the options off the tensors; these have the sizes that such networks have, and a few blocks.
    backbone = {
        'RCAN': {**BACKBONES['RCAN'], 'num_block': 2},
        'RRDBNet': {**BACKBONES['RRDBNet'], 'num_feat': 32, 'num_grow_ch': 32, 'num_block': 2, 'scale': 4},
        'SwinIR': {**BACKBONES['SwinIR'], 'img_size': 64, 'embed_dim': 12, 'num_heads': [2, 2, 2]},
        'SRVGGNetCompact': BACKBONES['SRVGGNetCompact'],
    }[name]
    file = tmp_path / 'model.mssr'
    file.write_bytes(pack(network(backbone), 4 if name == 'RRDBNet' else 2))
    names = ['--spandrel'] if name == 'RCAN' else []
    assert main(['extract', str(file), '--level', '1', '-o', str(tmp_path / 'level.pth'), *names]) == 0
    loaded = ModelLoader().load_from_file(tmp_path / 'level.pth')
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    ours = ScalableModel(file, level=1).network
    with torch.no_grad():
        assert torch.allclose(loaded.model.eval()(x.clone()), ours(x), atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'option', 'value', 'allowed'),
    [
        ('RCAN', 'img_range', 1.0, '255.0'),
        ('RRDBNet', 'num_grow_ch', 4, '32'),
        ('SRVGGNetCompact', 'act_type', 'relu', 'prelu'),
        ('SwinIR', 'img_range', 255.0, '1'),
        ('SwinIR', 'ape', True, 'False'),
        ('SwinIR', 'patch_norm', False, 'True'),
        ('SwinIR', 'qkv_bias', False, 'True'),
        ('SwinIR', 'qk_scale', 0.5, 'None'),
    ],
)
def test_networks_that_spandrel_would_run_otherwise_are_refused(
    name: str, option: str, value: Any, allowed: str, tmp_path: Path
) -> None:
    file = tmp_path / 'model.mssr'
    file.write_bytes(pack(network({**BACKBONES[name], option: value}), 2))
    extract(file, tmp_path / 'level.pth')
    with pytest.raises(OptionError) as error:
        extract(file, tmp_path / 'level.pth', spandrel=True)
    assert str(error.value) == f"--spandrel: found '{option} = {value}'; allowed: {allowed}."


@pytest.mark.parametrize('name', ['SRVGGNetCompact_10x32_x2_291', 'SRVGGNetCompact_10x32_x2_291_int8'])
def test_every_level_of_the_shipped_srvgg_opens_in_spandrel(name: str, tmp_path: Path) -> None:
    from spandrel import ModelLoader

    shipped = Path(__file__).parents[1] / 'models' / f'{name}.mssr'
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    for level in range(5):
        path = tmp_path / f'level{level}.pth'
        assert main(['extract', str(shipped), '--level', str(level), '-o', str(path)]) == 0
        loaded = ModelLoader().load_from_file(path)
        assert (loaded.scale, loaded.input_channels) == (2, 3)
        with torch.no_grad():
            assert torch.allclose(loaded.model.eval()(x.clone()), ScalableModel(shipped, level).network(x), atol=1e-5)


@pytest.mark.slow
@needs_onnx_export
@pytest.mark.parametrize('name', ['EDSR', 'RCAN', 'SRVGGNetCompact'])
def test_exported_onnx_gives_the_same_image_at_any_size(name: str, tmp_path: Path) -> None:
    import onnxruntime

    file = tmp_path / 'model.mssr'
    file.write_bytes(pack(network(BACKBONES[name]), 2))
    assert main(['export', str(file), '--level', '1', '--onnx', str(tmp_path / 'level.onnx')]) == 0
    session = onnxruntime.InferenceSession(tmp_path / 'level.onnx')
    assert session.get_inputs()[0].shape[2:] == ['height', 'width']
    ours = ScalableModel(file, level=1).network
    for size in ((16, 24), (33, 10)):
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        (image,) = session.run(None, {'input': x.numpy()})
        with torch.no_grad():
            assert np.abs(image - ours(x).numpy()).max() < 1e-5


class Sized(nn.Module):
    """Takes sizes that are multiples of 3; or any, from which it computes another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head, self.tail = nn.Conv2d(3 if kind == 'pooled' else 27, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 1, 1)
        self.thirds = nn.Conv2d(8, 108, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 'thirds':
            return F.pixel_shuffle(self.thirds(self.head(F.pixel_unshuffle(x, 3))), 6)
        h, w = x.shape[2:]
        y = self.head(x)
        y = y + F.interpolate(F.adaptive_max_pool2d(y, (h // 8, w // 8)), size=(h, w))
        return F.pixel_shuffle(self.tail(y), 2)


@pytest.mark.slow
@needs_onnx_export
@pytest.mark.parametrize('kind', ['thirds', 'pooled'])
def test_an_onnx_model_that_is_right_at_one_size_alone_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'Sized': Sized})
    file, output = tmp_path / 'model.mssr', tmp_path / 'level.onnx'
    file.write_bytes(pack(network({'type': 'Sized', 'kind': kind}), 2))
    if kind == 'pooled':  # torch makes a constant of the size to which it pools
        allowed = 'one that torch exports for all sizes; its model is right for 24x16 pixels, but not for 26x17'
        with pytest.raises(OptionError, match=f"backbone: found 'Sized'; allowed: {allowed}"):
            to_onnx(file, output)
        assert not output.exists()
        return
    assert to_onnx(file, output).multiple == 3
    x = torch.rand(1, 3, 33, 12)
    (image,) = onnxruntime.InferenceSession(output).run(None, {'input': x.numpy()})
    with torch.no_grad():
        assert np.abs(image - ScalableModel(file, engine='torch').network(x).numpy()).max() < 1e-5
