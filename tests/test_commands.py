"""The command mssr: what it refuses to overwrite, one line for every failure, and what Tab completes."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import EXPORTS_ONNX, TOY_EDSR, call, needs_onnx_export, network

from mssr_basicsr import ScalableFile, ScalableModel, evaluate, extract, load_checkpoint, pack, plot, to_onnx, verify
from mssr_basicsr.commands.main import main
from mssr_basicsr.foundation.saving import write_whole
from mssr_basicsr.models.nested_levels import NestedLevels

METRICS = {'0': {'toy': {'psnr': 31.25}}, '2': {'toy': {'psnr': 30.5}}}


@pytest.fixture
def here(here: Path) -> Path:
    """The current folder has a model, a checkpoint, its options and an image."""
    built = network()
    Path('m.mssr').write_bytes(pack(built, 2, METRICS))
    torch.save({'params': built.state_dict()}, 'net.pth')
    write_options('net.yml')
    cv2.imwrite('a.png', np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return here


def write_options(path: str, **changes: Any) -> None:
    sparsity = [k / 3 for k in range(3)]
    options = {'scale': 2, 'network_g': {'type': 'MSSR', 'sparsity': sparsity, 'backbone': TOY_EDSR}, **changes}
    Path(path).write_text(yaml.safe_dump(options))


def error(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command says."""
    capsys.readouterr()
    assert main(command.split()) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith('mssr: error: ')
    return lines[0][len('mssr: error: ') :]


# ------------------------------ no output over an input ------------------------------ #

COMMANDS = {
    'extract m.mssr --level 2 -o {}': 'm.mssr',
    'export m.mssr --onnx {}': 'm.mssr',
    'plot m.mssr -o {}': 'm.mssr',
    'pack net.pth --opt net.yml -o {}': 'net.pth',
    'pack ./net.pth -opt net.yml -o {} --dtype fp16': 'net.yml',
    'upscale m.mssr a.png -o {}': 'a.png',
}
#: What a command reads without its being named: the images of a folder, and the records beside a checkpoint.
UNNAMED = {
    'pack net.pth --opt net.yml --gt gt -o {}': 'gt/a.png',
    'pack net.pth --opt net.yml --gt gt --lq lq -o {}': 'lq/a.png',
    'pack net.pth --opt net.yml -o {}': 'levels.json',
    'upscale m.mssr a.png --gt gt -o {}': 'gt/a.png',
    'upscale m.mssr a.png --gt gt -o {} --level 2': 'gt/b.png',  # not compared, since gt/b.bmp may be meant
}


@pytest.mark.parametrize('spelling', ['plain', 'dots', 'absolute', 'symlink', 'hardlink'])
@pytest.mark.parametrize(('command', 'victim'), [*COMMANDS.items(), *UNNAMED.items()])
def test_an_input_is_never_overwritten(
    command: str, victim: str, spelling: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ('gt', 'lq'):
        Path(folder).mkdir()
        for name in ('a.png', 'b.png', 'b.bmp'):
            Path(folder, name).write_bytes(Path('a.png').read_bytes())
    Path('levels.json').write_text('[]')
    before = Path(victim).read_bytes()
    link = f'link{Path(victim).suffix}'
    if spelling == 'symlink':
        Path(link).symlink_to(victim)
    if spelling == 'hardlink':
        os.link(victim, link)
    names = {'plain': victim, 'dots': f'./x/../{victim}', 'absolute': str(here / victim)}
    Path('x').mkdir()
    said = error(command.format(names.get(spelling, link)), capsys)
    assert said.split(':')[0] in ('--output', '--onnx')
    assert 'allowed: a file other than the input ' in said
    assert Path(victim).read_bytes() == before


def test_an_input_is_never_overwritten_in_python(here: Path) -> None:
    for write in (
        lambda: extract('m.mssr', 'm.mssr', 2),
        lambda: to_onnx('m.mssr', here / 'm.mssr'),
        lambda: plot(['m.mssr'], './m.mssr'),
    ):
        with pytest.raises(ValueError, match=r'found .*m\.mssr.; allowed: a file other than the input m\.mssr'):
            write()


def test_another_file_is_overwritten(here: Path) -> None:
    Path('old.mssr').write_text('something else')
    assert main(['extract', 'm.mssr', '--level', '2', '-o', 'old.mssr']) == 0
    assert verify('old.mssr')['levels'] == [2]


def test_who_may_read_a_file_stays_as_it_is(here: Path) -> None:
    Path('private.pth').touch(0o600)
    for name in ('private.pth', 'new.pth'):
        assert main(['extract', 'm.mssr', '--level', '2', '-o', name]) == 0
    umask = os.umask(0)
    os.umask(umask)
    assert [Path(name).stat().st_mode & 0o777 for name in ('private.pth', 'new.pth')] == [0o600, 0o666 & ~umask]


def test_an_empty_argument_is_not_the_current_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (['upscale', 'm.mssr', '', '-o', 'out'], ['upscale', 'm.mssr', 'a.png', '-o', '']):
        with pytest.raises(SystemExit, match='2'):
            main(command)
        assert 'found an empty argument; allowed: a name' in capsys.readouterr().err


def test_what_an_imported_module_prints_is_not_among_the_results(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('talks.py').write_text("print('loading')\n")
    assert main(['upscale', 'm.mssr', 'a.png', '-o', 'x.png', '--json', '--import', 'talks']) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)['level'] == 0 and 'loading' in said.err


def test_paths_may_be_texts(here: Path) -> None:
    built, scale, _ = load_checkpoint('net.pth', 'net.yml')
    assert (scale, built.smallest_level) == (2, 2)
    plot('m.mssr', 'x.png')
    assert Path('x.png').is_file()


@pytest.mark.parametrize('command', ['extract m.mssr --level 2 -o {}.pth', 'upscale m.mssr a.png -o {}.png'])
def test_through_a_link_its_target_is_written(command: str, here: Path) -> None:
    kept = Path('other disk', 'kept')
    kept.parent.mkdir()
    kept.write_text('something else')
    link = Path(command.format('link').split()[-1])
    link.symlink_to(kept)
    assert main(command.format('link').split()) == 0
    assert link.is_symlink()
    assert main(command.format('plain').split()) == 0
    assert kept.read_bytes() == Path(command.format('plain').split()[-1]).read_bytes()
    assert [path.name for path in kept.parent.iterdir()] == ['kept']


@pytest.mark.parametrize(
    'command',
    [
        'extract m.mssr --level 2 -o {}.pth',
        pytest.param('export m.mssr --onnx {}.onnx', marks=[pytest.mark.slow, needs_onnx_export]),
        'plot m.mssr -o {}.png',
        'pack net.pth --opt net.yml -o {}.mssr',
        'upscale m.mssr a.png -o {}.png',
    ],
)
def test_missing_folders_are_made(command: str, here: Path) -> None:
    output = Path(command.format('new/folder/x').split()[-1])
    assert main(command.format('new/folder/x').split()) == 0
    assert output.is_file()


@pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='there is no folder in which even root cannot write')
@pytest.mark.parametrize('folder', ['/proc', '/proc/new', 'link'])
@pytest.mark.parametrize('command', COMMANDS)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    command: str, folder: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('link').symlink_to('/proc')
    output = f'{folder}/x{Path(COMMANDS[command]).suffix}'
    monkeypatch.setattr('mssr_basicsr.scalable.container.read_header', pytest.fail)
    monkeypatch.setattr('mssr_basicsr.archs.checkpoint.read_checkpoint', pytest.fail)
    said = error(command.format(output), capsys)
    assert said.split(':')[0] in ('--output', '--onnx')
    assert f': found {output!r}; allowed: a path in a folder that can be written in; ' in said


@pytest.mark.parametrize('command', COMMANDS)
def test_what_is_no_regular_file_is_never_replaced(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f'{name}{Path(COMMANDS[command]).suffix}' for name in ('pipe', 'link')]
    os.mkfifo(names[0])
    Path(names[1]).symlink_to(names[0])
    for name in names:
        said = error(command.format(name), capsys)
        assert said.endswith(f'found {name!r}; allowed: a file; this is a device, a pipe or a socket.')
        assert Path(name).is_fifo()
        with pytest.raises(OSError, match='it is a device, a pipe or a socket'):
            write_whole(name, b'')
    assert Path(names[1]).is_symlink()


@pytest.mark.parametrize('command', COMMANDS)
def test_a_read_only_file_is_not_replaced_even_by_root(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(f'kept{Path(COMMANDS[command]).suffix}')
    output.touch(0o444)
    said = error(command.format(output), capsys)
    assert said.endswith(f'found {str(output)!r}; allowed: a file that can be written; this one is read-only.')
    assert output.read_bytes() == b''


@pytest.mark.parametrize('command', COMMANDS)
def test_a_read_only_file_is_not_replaced(
    command: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(f'kept{Path(COMMANDS[command]).suffix}')
    output.touch(0o444)
    access = os.access  # root may write whatever the mode
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path).name != output.name and access(path, mode))
    said = error(command.format(output), capsys)
    assert said.endswith(f'found {str(output)!r}; allowed: a file that can be written; this one is read-only.')
    assert output.read_bytes() == b''


@pytest.mark.parametrize('command', COMMANDS)
def test_a_name_that_no_file_can_have_is_refused_before_the_work(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = Path(COMMANDS[command]).suffix
    Path(f'circle{suffix}').symlink_to(f'circle{suffix}')
    monkeypatch.setattr('mssr_basicsr.scalable.container.read_header', pytest.fail)
    monkeypatch.setattr('mssr_basicsr.archs.checkpoint.read_checkpoint', pytest.fail)
    assert 'File name too long' in error(command.format('n' * 300 + suffix), capsys)
    assert 'Too many levels of symbolic links' in error(command.format(f'circle{suffix}'), capsys)
    assert Path(f'circle{suffix}').is_symlink()


@pytest.mark.parametrize('command', ['extract', 'export', 'plot', 'pack', 'upscale'])
def test_help_says_what_is_overwritten(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='0'):
        main([command, '--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert 'overwritten' in said
    assert '--debug' in said


# ------------------------------ the network's own scale ------------------------------ #


def test_the_network_decides_the_scale(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_options('four.yml', scale=4)
    said = error('pack net.pth --opt four.yml -o x.mssr', capsys)
    assert said == 'scale: found 4; allowed: 2, the factor by which the network upscales.'
    assert not Path('x.mssr').exists()
    with pytest.raises(ValueError, match='scale: found 4; allowed: 2, the factor by which the network upscales'):
        pack(network(), 4)
    write_options('none.yml', scale=None)
    assert load_checkpoint(Path('net.pth'), Path('none.yml'))[1] == 2


def test_a_checkpoint_may_have_the_names_of_a_ddp_wrapper(here: Path) -> None:
    assert main(['pack', 'net.pth', '--opt', 'net.yml', '-o', 'x.mssr']) == 0
    state = torch.load('net.pth', weights_only=True)['params']
    torch.save({'params': {f'module.{name}': tensor for name, tensor in state.items()}}, 'net.pth')
    assert main(['pack', 'net.pth', '--opt', 'net.yml', '-o', 'y.mssr']) == 0
    assert Path('x.mssr').read_bytes() == Path('y.mssr').read_bytes()


def test_records_of_equal_images_are_json_and_can_be_packed(here: Path) -> None:
    """JSON has no infinite numbers: Python alone would read Infinity, and jq or JavaScript refuse the whole file."""
    records = {0: {'level': 0, 'metrics': {'toy': {'psnr': float('inf'), 'ssim': 1.0}}}}
    opt = {'rank': 0, 'is_train': True, 'path': {'models': str(here)}}
    NestedLevels.write_records(cast(Any, SimpleNamespace(opt=opt, records=records)))
    (written,) = json.loads(Path('levels.json').read_text(), parse_constant=pytest.fail)
    assert written['metrics'] == {'toy': {'psnr': None, 'ssim': 1.0}}
    Path('net.pth').rename('net_g_latest.pth')
    assert main(['pack', 'net_g_latest.pth', '--opt', 'net.yml', '-o', 'x.mssr']) == 0
    assert ScalableFile('x.mssr').header.metrics == {'0': {'toy': {'ssim': 1.0}}}


def test_a_checkpoint_from_the_middle_of_a_run_has_no_metrics_of_its_end(here: Path) -> None:
    records = [{'level': int(level), 'metrics': metrics} for level, metrics in METRICS.items()]
    Path('levels.json').write_text(json.dumps(records))
    for checkpoint, expected in (('net_g_latest.pth', METRICS), ('net_g_3.pth', {})):
        Path(checkpoint).write_bytes(Path('net.pth').read_bytes())
        assert main(['pack', checkpoint, '--opt', 'net.yml', '-o', 'x.mssr']) == 0
        assert ScalableFile('x.mssr').header.metrics == expected


# ------------------------------ one line for every failure ------------------------------ #

FAULTS = {
    'info none.mssr': 'none.mssr: No such file or directory',
    'info x': 'x: Is a directory',
    'info a.png': 'a.png: not a scalable model file',
    'verify none.mssr': 'none.mssr: No such file or directory',
    'extract m.mssr -o x': "--output: found 'x'; allowed: a name that ends in .pth, .safetensors or .mssr",
    'extract m.mssr -o a.png/x.pth': "--output: found 'a.png/x.pth'; allowed: a path inside a folder; a.png is not one",
    'extract m.mssr -o broken/x.pth': (
        "--output: found 'broken/x.pth'; allowed: a path inside a folder; broken is not one"
    ),
    'extract m.mssr -o x.pth --level 1': "--output: found 'x.pth'; allowed: a file; this is a folder",
    'pack net.pth --opt net.yml -o x': "--output: found 'x'; allowed: a file; this is a folder",
    'export m.mssr --onnx x': "--onnx: found 'x'; allowed: a file; this is a folder",
    'extract m.mssr -o y.pth --level 7': 'level 7: this model has levels 0 to 2',
    'extract m.mssr -o y.pth --spandrel': "--spandrel: found 'EDSR'; allowed: RCAN, RRDBNet, SRVGGNetCompact, SwinIR",
    'extract m.mssr -o x.mssr --spandrel': (
        "--output: found 'x.mssr'; allowed: with --spandrel, a name that ends in .pth"
    ),
    'export m.mssr --onnx y.onnx --opset -1': (
        '--opset: found -1; allowed: a whole number from 1 to '
        if EXPORTS_ONNX
        else 'onnx: torch 2.7 or newer is needed'
    ),
    'export m.mssr --onnx y.onnx --opset 3': (
        '--opset: found 3; allowed: ' if EXPORTS_ONNX else 'onnx: torch 2.7 or newer is needed'
    ),
    'plot m.mssr -o x.xyz': "--output: found 'x.xyz'; allowed: a name that ends in .",
    'plot m.mssr none.mssr -o x.png': 'none.mssr: No such file or directory',
    'upscale m.mssr none.png -o x.png': 'none.png: No such file or directory',
    'upscale m.mssr a.png -o x.png --device cuda:77': "--device: found 'cuda:77'; allowed: cpu",
    'upscale m.mssr a.png -o x.png --device quark': "--device: found 'quark'; allowed: cpu",
    'upscale m.mssr a.png -o x.png --tile -3': '--tile: found -3; allowed: a whole number of at least 0',
    'upscale m.mssr a.png -o x.png --gt none': "--gt: found 'none'; allowed: a folder of images",
    'upscale m.mssr text.png -o x.png': 'text.png: not an image',
    'pack net.pth --opt none.yml': 'none.yml: No such file or directory',
    'pack net.pth --opt empty.yml': 'empty.yml: found nothing; allowed: a mapping of options',
    'pack net.pth --opt list.yml': 'list.yml: found a list; allowed: a mapping of options',
    'pack net.pth --opt tabs.yml': 'tabs.yml: found a tab character that violates indentation in line 2; allowed: ',
    'pack net.pth --opt latin.yml': 'latin.yml: found bytes that are not UTF-8; allowed: a YAML file',
    'pack net.pth --opt a.png': 'a.png: found bytes that are not UTF-8',
    'pack net.pth --opt words.yml': "network_g.type: found 'EDSR'; allowed: MSSR, in words.yml",
    'pack net.pth --opt half.yml': "scale: found 'two'; allowed: a whole number of at least 1",
    'pack none.pth --opt net.yml': 'none.pth: there is no such file',
    'pack text.png --opt net.yml': 'text.png: it is not a checkpoint',
    'pack nan.pth --opt net.yml': 'nan.pth: conv_first.bias in it is not finite (NaN or infinity)',
    'pack net.pth --opt net.yml -o y.png': "--output: found 'y.png'; allowed: a name that ends in .mssr",
    'export m.mssr --onnx y.png': "--onnx: found 'y.png'; allowed: a name that ends in .onnx",
    'benchmark m.mssr --threads 100000': '--threads: found 100000; allowed: a whole number from 1 to ',
    'upscale m.mssr a.png -o x.png --import leaves': "--import: found 'leaves'; allowed: a module (SystemExit: 0)",
    'pack bare.pth --opt net.yml': 'bare.pth: it has no network under params_ema, but is itself one',
    'pack net.pth --opt net.yml --lq x': "--lq: found ['x']; allowed: one folder for each --gt, of which there are 0",
    'pack net.pth --opt net.yml --gt x --gt a/x': "--gt: found ['x', 'a/x']; allowed: folders with different names",
    'pack net.pth --opt net.yml --gt x': 'x: ',
    'pack net.pth --opt net.yml --gt y': "--gt: found 'y'; allowed: a folder of images",
    'pack net.pth --opt net.yml --gt x --lq y': "--lq: found 'y'; allowed: a folder of images",
    'pack net.pth --opt two.yml': 'net.pth: its smallest level is 2, but that of network_g.sparsity is 1',
    'pack net.pth --opt four.yml': 'net.pth: its smallest level is 2, but that of network_g.sparsity is 3',
    'pack records/net_g_latest.pth --opt net.yml': 'records/levels.json: ',
}


@pytest.mark.parametrize(('command', 'message'), FAULTS.items())
def test_a_failure_is_one_line(command: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ('x', 'x.pth', 'records'):
        Path(folder).mkdir()
    Path('broken').symlink_to('gone')
    Path('text.png').write_text('no image\n')
    torch.save(network().state_dict(), 'bare.pth')
    state = network().state_dict()
    state['backbone.conv_first.bias'][0] = float('nan')
    torch.save({'params': state}, 'nan.pth')
    Path('leaves.py').write_text('raise SystemExit(0)\n')
    Path('records/net_g_latest.pth').write_bytes(Path('net.pth').read_bytes())
    Path('records/levels.json').write_text('[{"level": 0, "metr')
    Path('empty.yml').touch()
    Path('list.yml').write_text('- scale\n- network_g\n')
    Path('tabs.yml').write_text('scale: 2\n\tnetwork_g: 3\n')
    Path('latin.yml').write_bytes('name: Café'.encode('latin-1'))
    write_options('words.yml', network_g='EDSR')
    write_options('half.yml', scale='two')
    for name, sparsity in (('two', [0, 0.5]), ('four', [0, 0.25, 0.5, 0.75])):
        write_options(f'{name}.yml', network_g={'type': 'MSSR', 'sparsity': sparsity, 'backbone': TOY_EDSR})
    assert error(command, capsys).startswith(message)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('m.mssr -o x.txt', "--output: found 'x.txt'; allowed: a name that ends in ."),
        ('m.mssr bare.mssr -o x.png', 'bare.mssr: found no PSNR; allowed: a file packed with --gt'),
    ],
)
def test_plot_times_nothing_in_vain(
    arguments: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('bare.mssr').write_bytes(pack(network(), 2))
    monkeypatch.setattr('mssr_basicsr.scalable.measuring.measure_levels', pytest.fail)
    assert error(f'plot {arguments} --time', capsys).startswith(message)


@pytest.mark.parametrize(
    ('raised', 'line'),
    [
        (
            RuntimeError('DefaultCPUAllocator:\n  not enough memory'),
            'RuntimeError: DefaultCPUAllocator: not enough memory',
        ),
        (MemoryError(), 'MemoryError: '),
        (KeyError('conv'), "KeyError: 'conv'"),
        (RuntimeError('x ' * 5000), 'RuntimeError: ' + 'x ' * 150 + '...'),
    ],
)
def test_an_unexpected_error_is_one_line_too(
    raised: Exception, line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(file: Any) -> Any:
        raise raised

    monkeypatch.setattr(ScalableFile, 'describe', fail)
    assert error('info m.mssr', capsys) == f'{line} (--debug shows where)'
    assert main(['info', 'm.mssr', '--debug']) == 1
    assert 'Traceback' in capsys.readouterr().err


def test_a_file_that_ends_early_is_used_up_to_its_last_whole_level(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [section.end for section in ScalableFile('m.mssr').header.sections]  # of levels 2, 1, 0
    Path('cut.mssr').write_bytes(Path('m.mssr').read_bytes()[: ends[1] + 1])
    assert main(['upscale', 'cut.mssr', 'a.png', '-o', 'b.png']) == 0
    assert capsys.readouterr().err == 'mssr: cut.mssr ends before level 0 does: using level 1\n'
    assert main(['extract', 'cut.mssr', '-o', 'cut.pth']) == 0
    assert capsys.readouterr().err == 'mssr: cut.mssr ends before level 0 does: using level 1\n'
    assert main(['upscale', 'cut.mssr', 'a.png', '-o', 'b.png', '--level', '1']) == 0
    assert capsys.readouterr().err == ''
    said = error('upscale cut.mssr a.png -o b.png --level 0', capsys)
    assert said == f'cut.mssr: level 0 needs the first {ends[2]:,} bytes; there are {ends[1] + 1:,}'


def test_a_set_whose_name_cannot_be_stored_is_not_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('control\x1bcharacter', os.fsdecode(b'caf\xe9')):
        Path(name).mkdir()
        said = error(f'pack none.pth --opt none.yml --gt {name}', capsys)
        assert said == f'--gt: found {name!r}; allowed: a folder with a printable name, which the file holds.'


@pytest.mark.slow
def test_file_names_that_are_not_text(here: Path) -> None:
    name = os.fsdecode(b'caf\xe9.pth')
    said = call(sys.executable, '-m', 'mssr_basicsr', 'extract', 'm.mssr', '--level', '2', '-o', name, cwd=here)
    assert said.startswith('caf\\udce9.pth: level 2, ')
    assert Path(name).is_file()


def test_an_interruption_says_what_was_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mssr_basicsr.foundation import saving

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.os, 'fsync', interrupt)
    assert main(['extract', 'm.mssr', '--level', '2', '-o', 'x.pth']) == 130
    assert capsys.readouterr().err == 'mssr: interrupted; nothing was written\n'
    assert sorted(path.name for path in here.iterdir()) == ['a.png', 'm.mssr', 'net.pth', 'net.yml']


@pytest.mark.slow
def test_a_closed_pipe(here: Path) -> None:
    said = call('bash', '-c', f'"{sys.executable}" -m mssr_basicsr info m.mssr | true', cwd=here)
    assert said == ''


@pytest.mark.slow
def test_a_model_from_a_pipe(here: Path) -> None:
    def said(command: str, expect: int = 0) -> str:
        line = f'cat m.mssr | "{sys.executable}" -m mssr_basicsr {command}'
        return call('bash', '-c', line, cwd=here, expect=expect)

    assert main(['extract', 'm.mssr', '--level', '1', '-o', 'x.mssr']) == 0
    assert said('extract /dev/stdin --level 1 -o y.mssr').startswith('y.mssr: levels 1 to 2, ')
    assert Path('x.mssr').read_bytes() == Path('y.mssr').read_bytes()
    for command in ('benchmark /dev/stdin', 'plot /dev/stdin --time -o x.png'):
        several = 'mssr: error: /dev/stdin: found a pipe; allowed: a file, since it is read several times\n'
        assert said(command, expect=1) == several


@pytest.mark.slow
def test_closed_streams_are_no_reason_to_fail(here: Path) -> None:
    for closed in ('>&-', '2>&-'):
        upscale = f'"{sys.executable}" -m mssr_basicsr upscale m.mssr a.png -o b.jpg --json {closed}'
        said = call('bash', '-c', upscale, cwd=here)
        assert json.loads(said)['level'] == 0 if closed == '2>&-' else said == ''
        Path('b.jpg').unlink()
    said = call('bash', '-c', f'"{sys.executable}" -m mssr_basicsr info none.mssr 2>&-', cwd=here, expect=1)
    assert said == ''


# ------------------------------ in the shell ------------------------------ #


def test_info_answers_at_once(here: Path) -> None:
    """It imports neither torch nor NumPy, which take longer than all the rest, nor anything else that is heavy."""
    program = """
import sys
from mssr_basicsr.commands.main import main
main(['info', 'm.mssr'])
heavy = {'torch', 'numpy', 'basicsr', 'torchvision', 'cv2', 'matplotlib', 'scipy', 'yaml'}
print(sorted(heavy & sys.modules.keys()))
"""
    assert call(sys.executable, '-c', program, cwd=here).endswith('\n[]\n')


@pytest.mark.parametrize(
    ('line', 'offered'),
    [
        ('mssr ex', ['extract', 'export']),
        ('mssr info ', ['m.mssr', 'gt/']),
        ('mssr upscale m.mssr ', ['m.mssr', 'a.png', 'net.pth', 'net.yml', 'gt/']),
        ('mssr upscale m.mssr a.png --l', ['--level ']),
        ('mssr upscale --engine ', ['auto', 'torch']),
        ('mssr upscale --level ', ['']),
        ('mssr upscale --gt ', ['gt/']),
        ('mssr pack net.pth --opt ', ['net.yml', 'gt/']),
    ],
)
def test_completion(line: str, offered: list[str], here: Path) -> None:
    pytest.importorskip('argcomplete')
    Path('gt').mkdir()
    # Tab must answer at once: nothing heavy can be imported here.
    said = pressing_tab(line, here, lacking=['torch', 'basicsr', 'cv2', 'numpy', 'PIL', 'yaml'])
    assert sorted(said.split('\v')) == sorted(offered)


def pressing_tab(line: str, folder: Path, lacking: list[str], expect: int = 0) -> str:
    """What the shell is told when Tab is pressed after ``line``, where packages cannot be imported."""
    absent = dict.fromkeys(lacking)
    code = f'import sys; sys.modules.update({absent}); from mssr_basicsr.commands.main import main; sys.exit(main())'
    shell = {'_ARGCOMPLETE': '1', 'COMP_LINE': line, 'COMP_POINT': str(len(line))}
    python = 'exec "$0" "$@" 8>&1 9>&2'
    return call('bash', '-c', python, sys.executable, '-c', code, cwd=folder, expect=expect, **shell)


def test_without_argcomplete_nothing_is_completed(here: Path) -> None:
    """The shell calls ``mssr`` without arguments, and that is how it runs."""
    said = pressing_tab('mssr ex', here, lacking=['argcomplete'], expect=2)
    assert said.startswith('usage: mssr ') and said.endswith('the following arguments are required: COMMAND\n')


# ------------------------------ in Python ------------------------------ #


def test_evaluate_gives_what_pack_measures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path('gt').mkdir()
    cv2.imwrite('gt/a.png', np.random.default_rng(1).integers(0, 256, (24, 22, 3), dtype=np.uint8))
    assert main(['pack', 'net.pth', '--opt', 'net.yml', '-o', 'x.mssr', '--gt', 'gt']) == 0
    measured = evaluate('x.mssr', Path('gt'))
    assert list(measured) == ['0', '1', '2']
    assert evaluate('x.mssr', 'gt') == measured
    cv2.imwrite('a.png', np.random.default_rng(2).integers(0, 256, (12, 11, 3), dtype=np.uint8))
    assert evaluate('x.mssr', 'gt', '.') == evaluate('x.mssr', Path('gt'), Path('.')) != measured
    assert f'level 1: PSNR {measured["1"]["psnr"]:.4f} dB on gt' in capsys.readouterr().out


def test_what_is_not_measured_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('one', 'two'):
        Path(name, 'more').mkdir(parents=True)
        cv2.imwrite(f'{name}/a.png', np.zeros((24, 22, 3), np.uint8))
    for name in ('b.heic', 'c.txt', 'd.txt'):
        Path('two', name).touch()
    packing = 'pack net.pth --opt net.yml -o x.mssr --json --gt one --gt two'
    assert main(packing.split()) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if 'skipped' in line]
    found = {'one': 'more/', 'two': 'b.heic, c.txt, d.txt, ...'}
    texts = [f'skipped in {name}, not images by their names: {others}' for name, others in found.items()]
    assert said == [f'mssr: {text}' for text in texts]
    for name, text in zip(found, texts):
        with pytest.warns(UserWarning, match=f'^{re.escape(text)}$'):
            evaluate('x.mssr', name)


def test_pack_prints_json_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path('gt').mkdir()
    cv2.imwrite('gt/a.png', np.random.default_rng(1).integers(0, 256, (24, 22, 3), dtype=np.uint8))
    levels, measured = {}, {}
    for dtype in ('fp32', 'int8'):
        output = f'{dtype}.mssr'
        packing = ['pack', 'net.pth', '--opt', 'net.yml', '-o', output, '--gt', 'gt', '--dtype', dtype, '--json']
        capsys.readouterr()
        assert main(packing) == 0
        said = capsys.readouterr()
        levels[dtype], measured[dtype] = json.loads(said.out)['levels'], evaluate(output, Path('gt'))
        assert f'level 1: PSNR {measured[dtype]["1"]["psnr"]:.4f} dB on gt' in said.err
    assert not any('compared_with_F32' in row for row in levels['fp32'])
    for row in levels['int8']:
        rounded, exact = (measured[dtype][str(row['level'])] for dtype in ('int8', 'fp32'))
        expected = {key: pytest.approx(rounded[key] - exact[key], abs=1e-9) for key in ('psnr', 'ssim')}
        assert row['compared_with_F32'] == {'gt': expected}
        assert row['compared_with_F32']['gt']['psnr'] != 0


def test_pack_measures_several_sets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(('one', 'two')):
        for folder, size in ((name, (24, 22)), (f'{name}_lq', (12, 11))):
            Path(folder).mkdir()
            cv2.imwrite(f'{folder}/a.png', np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    packing = 'pack net.pth --opt net.yml -o x.mssr --dtype int8 --json --gt one --gt two --lq one_lq --lq two_lq'
    assert main(packing.split()) == 0
    compared = json.loads(capsys.readouterr().out)['levels'][1]['compared_with_F32']
    metrics = ScalableFile('x.mssr').header.metrics['1']
    assert list(compared) == list(metrics) == ['one', 'two']
    for name, found in metrics.items():
        assert found == pytest.approx(evaluate('x.mssr', Path(name), Path(f'{name}_lq'))['1'], rel=1e-4)


@pytest.mark.parametrize('size', [(12, 12), (1, 12)])
def test_pack_refuses_an_image_too_small_before_it_measures_any(
    size: tuple[int, int], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, shape in (('one', (24, 22, 3)), ('two', (*size, 3))):
        Path(folder).mkdir()
        cv2.imwrite(f'{folder}/a.png', np.zeros(shape, np.uint8))
    monkeypatch.setattr(ScalableModel, 'upscale', pytest.fail)
    said = error('pack net.pth --opt net.yml -o x.mssr --gt one --gt two', capsys)
    assert said == f'two/a.png: found 12x{size[0]} pixels; allowed: at least 16 per side, to be compared'
    with pytest.raises(ValueError, match=re.escape(said)):
        evaluate('m.mssr', Path('two'))


@pytest.mark.parametrize('dtype', ['fp32', 'int8'])
def test_the_psnr_of_equal_images_is_infinite(dtype: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = network()
    for tensor in (built.backbone.conv_last.weight, built.backbone.conv_last.bias):
        torch.nn.init.zeros_(tensor)  # every image becomes the mean of EDSR's training data
    torch.save({'params': built.state_dict()}, 'net.pth')
    for folder in ('lq', 'gt'):
        Path(folder).mkdir()
    cv2.imwrite('lq/a.png', np.zeros((12, 11, 3), np.uint8))
    mean = ScalableModel(io.BytesIO(pack(built, 2))).upscale(np.zeros((12, 11, 3), np.uint8), bgr=True)
    cv2.imwrite('gt/a.png', mean)

    packing = ['pack', 'net.pth', '--opt', 'net.yml', '-o', 'x.mssr', '--gt', 'gt', '--lq', 'lq', '--dtype', dtype]
    assert main(packing) == 0
    cost = '' if dtype == 'fp32' else ' as I8, +0.0000 dB compared with F32'
    assert f'level 1: PSNR inf dB on gt{cost}\n' in capsys.readouterr().out
    assert ScalableFile('x.mssr').header.metrics['1'] == {'gt': {'ssim': pytest.approx(1)}}
    assert main(['upscale', 'x.mssr', 'lq', '-o', 'out', '--gt', 'gt', '--json']) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found['mean']['psnr'] is found['images'][0]['psnr'] is None
    assert main(['upscale', 'x.mssr', 'lq', '-o', 'out', '--gt', 'gt']) == 0
    assert 'PSNR inf dB, SSIM 1.0000 on Y of 1 images' in capsys.readouterr().out


@pytest.mark.slow
def test_pack_without_the_import_hook(here: Path) -> None:
    command = ['pack', 'net.pth', '--opt', 'net.yml', '-o', 'x.mssr']
    said = call(sys.executable, '-m', 'mssr_basicsr', *command, cwd=here, MSSR_BASICSR_DISCOVERY='0')
    assert 'EDSR x2' in said
    assert Path('x.mssr').read_bytes() == pack(network(), 2)
