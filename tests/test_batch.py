"""Folders of images: which output each image gets, and that neither a bad image nor Ctrl-C affects the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from conftest import HANGING, network

from mssr_basicsr import pack
from mssr_basicsr.commands.batch import plan_batch
from mssr_basicsr.commands.main import main
from mssr_basicsr.scalable.images import skipped_message

# A Python that hears Ctrl-C, which a background job and all that it starts ignore, and the end of the terminal, which
# nohup lets them ignore; and then becomes another command.
INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope='module')
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('model') / 'model.mssr'
    path.write_bytes(pack(network(), 2))
    return path


def picture(path: str, seed: int = 0) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    assert cv2.imwrite(path, np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8))


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def plan(source: str, output: str, *others: str) -> list[tuple[str, str]]:
    jobs = plan_batch(Path(source), output, [Path(other) for other in others]).jobs
    return [(str(one), str(other)) for one, other in jobs]


# ------------------------------ which output for which input ------------------------------ #


def test_files_and_folders(here: Path) -> None:
    touch('in/b.jpg', 'in/a.png', 'in/c.gif', 'in/.hidden.png')
    Path('exist.d').mkdir()
    assert plan('in/a.png', 'x.jpg') == [('in/a.png', 'x.jpg')]
    assert plan('in/b.jpg', 'out') == [('in/b.jpg', 'out/b.png')]
    for folder in ('out', 'exist.d', 'exist.d/', 'new.d/', 'new.d', 'new.png/'):
        names = [f'{folder.rstrip("/")}/{name}.png' for name in 'abc']
        assert [target for _, target in plan('in', folder)] == names
    assert plan('in/a.png', 'exist.d') == [('in/a.png', 'exist.d/a.png')]


def test_files_that_are_not_images_are_reported(here: Path) -> None:
    touch('in/a.png', 'in/notes.txt', 'in/more/b.png', 'in/odd.png/c.png', 'in/out/a.png', 'in/.hidden/a.png')
    others = [Path('in', name) for name in ('more', 'notes.txt', 'odd.png', 'out')]
    assert plan_batch(Path('in'), 'out').passed_over == others
    assert plan_batch(Path('in'), 'in/out').passed_over == others[:3]


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='Windows has no such pipes')
def test_pipes_are_not_read_but_links_to_files_are(here: Path) -> None:
    touch('photo')
    Path('in').mkdir()
    os.mkfifo('in/p.png')
    Path('in/q.png').symlink_to('p.png')
    with pytest.raises(ValueError, match='in: found 2 pipes, sockets or devices; allowed: images'):
        plan('in', 'out')
    Path('in/a.png').symlink_to('../photo')
    batch = plan_batch(Path('in'), 'out')
    assert batch.jobs == [(Path('in/a.png'), Path('out/a.png'))]
    assert batch.passed_over == [Path('in/p.png'), Path('in/q.png')]
    assert skipped_message('in', batch.passed_over).endswith(': p.png (no regular file), q.png (no regular file)')


def test_names_that_differ_only_in_the_extension_keep_it(here: Path) -> None:
    touch('in/a.png', 'in/a.jpg', 'in/b.png')
    assert [target for _, target in plan('in', 'out')] == ['out/a.jpg.png', 'out/a.png.png', 'out/b.png']
    touch('in/a.png.gif')
    with pytest.raises(ValueError, match=r"--output: found 'out/a.png.png'; allowed: different names for"):
        plan('in', 'out')


def test_outputs_that_exist_are_not_compared_with_each_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch('in/a.png', 'in/b.png', 'out/a.png', 'out/b.png')
    monkeypatch.setattr(os.path, 'samefile', pytest.fail)  # of thousands of frames, that would take an hour
    assert plan('in', 'out') == [('in/a.png', 'out/a.png'), ('in/b.png', 'out/b.png')]


@pytest.mark.parametrize(
    ('source', 'output', 'message'),
    [
        ('in', 'x.png', "found 'x.png'; allowed: a folder, as the input is one"),
        ('in', 'plain', "found 'plain'; allowed: a folder; this is a file"),
        ('in/a.png', 'x.gif', r"found 'x.gif'; allowed: a folder, or a name that ends in .png, .*jpg, "),
        ('in/a.png', 'in/a.png', "found 'in/a.png'; allowed: a file other than the input in/a.png"),
        ('in/a.png', 'in', "found 'in/a.png'; allowed: a file other than the input in/a.png"),
        ('in', '../{here}/in', 'allowed: a file other than the input in/a.png'),
        ('in/a.png', 'symlink.png', "found 'symlink.png'; allowed: a file other than the input in/a.png"),
        ('in/a.png', 'hardlink.png', "found 'hardlink.png'; allowed: a file other than the input in/a.png"),
        ('in', 'linked', "found 'linked/a.png'; allowed: a file other than the input in/a.png"),
        ('two', 'plain/out', "found 'plain/out/a.png'; allowed: a path inside a folder; plain is not one"),
        ('in/a.png', 'gt/a.png', "found 'gt/a.png'; allowed: a file other than the input gt/a.png"),
        ('in', 'plain/out', "found 'plain/out/a.png'; allowed: a path inside a folder; plain is not one"),
        ('empty', 'out', r'empty: found nothing; allowed: images \(.*\.jpg.*\.gif.*\)'),
        ('texts', 'out', r'texts: found 1 files, none of which is an image by its name; allowed'),
        ('folders', 'out', r'folders: found 2 folders, which are not searched; allowed: images'),
        ('both', 'out', r'both: found 1 files, none of .* by its name and 1 folders, which are not searched; allowed'),
    ],
)
def test_what_is_refused(source: str, output: str, message: str, here: Path) -> None:
    touch('in/a.png', 'gt/a.png', 'texts/a.txt', 'plain', 'folders/1/a.png', 'folders/2/a.png', 'both/1/a', 'both/b')
    touch('two/a.png', 'two/b.png')
    Path('empty').mkdir()
    Path('symlink.png').symlink_to('in/a.png')
    os.link('in/a.png', 'hardlink.png')
    Path('linked').symlink_to('in')
    with pytest.raises(ValueError, match=message):
        plan(source, output.format(here=here.name), 'gt/a.png')


def test_another_file_is_overwritten(here: Path, file: Path) -> None:
    picture('a.png')
    touch('b.png')
    assert main(['upscale', str(file), 'a.png', '-o', 'b.png']) == 0
    assert cv2.imread('b.png').shape == (16, 18, 3)


# ------------------------------ a batch goes on ------------------------------ #


def test_a_bad_image_does_not_stop_the_batch(
    here: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(('1', '3', '5', '7')):
        picture(f'in/{name}.png', i)
    Path('in/2.png').write_text('no image')
    Path('in/9.png').symlink_to('nowhere')
    from mssr_basicsr.scalable.upscaling import Upscaler

    upscale, errors = Upscaler.upscale, [torch.cuda.OutOfMemoryError('no memory\nis left'), cv2.error('Bad argument')]

    def failing(upscaler: Any, *args: Any, **kwargs: Any) -> Any:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls in (2, 3):  # type: ignore[attr-defined]
            raise errors[failing.calls - 2]  # type: ignore[attr-defined]
        return upscale(upscaler, *args, **kwargs)

    failing.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Upscaler, 'upscale', failing)
    assert main(['upscale', str(file), 'in', '-o', 'out']) == 1
    said = capsys.readouterr()
    assert '2 of 6 images upscaled' in said.out
    lines = [line for line in said.err.splitlines() if line.startswith('mssr: error: ')]
    assert [line.split(':')[2].strip() for line in lines] == ['in/2.png', 'in/3.png', 'in/5.png', 'in/9.png']
    assert 'in/3.png: OutOfMemoryError: no memory is left' in lines[1]
    assert sorted(path.name for path in Path('out').iterdir()) == ['1.png', '7.png']


def test_metrics_are_of_the_images_that_have_a_ground_truth(
    here: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ('a', 'b'):
        picture(f'in/{name}.png')
    Path('gt').mkdir()
    cv2.imwrite('gt/a.png', np.zeros((16, 18, 3), np.uint8))
    assert main(['upscale', str(file), 'in', '-o', 'out', '--gt', 'gt', '--json']) == 1
    said = json.loads(capsys.readouterr().out)
    assert [Path(image['input']).name for image in said['images'] if 'psnr' in image] == ['a.png']
    assert len(said['failures']) == 1
    assert said['failures'][0].startswith("in/b.png: --gt: found 'gt'; allowed: one file there called b")
    assert os.listdir('out') == ['a.png']  # b was not upscaled in vain
    Path('gt/b.png').write_text('no image')
    assert main(['upscale', str(file), 'in', '-o', 'out', '--gt', 'gt']) == 1
    assert 'in/b.png: gt/b.png: not an image' in capsys.readouterr().err
    assert os.listdir('out') == ['a.png']
    cv2.imwrite('gt/b.png', np.zeros((16, 20, 3), np.uint8))
    assert main(['upscale', str(file), 'in', '-o', 'out', '--gt', 'gt']) == 1
    assert 'in/b.png: the ground truth: found 20x16 pixels; allowed: 18x16, like the upscaled image' in (
        capsys.readouterr().err
    )
    assert os.listdir('out') == ['a.png']


def test_files_of_other_kinds_are_named(here: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture('in/a.png')
    touch('in/notes.txt', 'in/more/a.png')
    assert main(['upscale', str(file), 'in', '-o', 'out']) == 0
    assert 'skipped in in, not images by their names: more/, notes.txt\n' in capsys.readouterr().err


def test_long_names(here: Path, file: Path) -> None:
    name = 'n' * 251 + '.png'  # 255 bytes, the most that file systems take
    picture('a.png')
    assert main(['upscale', str(file), 'a.png', '-o', name]) == 0
    assert main(['upscale', str(file), name, '-o', 'out']) == 0
    assert sorted(path.name for path in Path('out').iterdir()) == [name]


def stopped(file: Path, number: int, expect: int) -> str:
    """What a batch of 300 images says that gets a signal after the first, and ends with ``expect``."""
    for i in range(300):
        picture(f'in/{i:03}.png', i)
    command = [sys.executable, '-m', 'mssr_basicsr', 'upscale', str(file), 'in', '-o', 'out']
    process = subprocess.Popen([sys.executable, '-c', INTERRUPTIBLE, *command], text=True, stderr=subprocess.PIPE)
    try:
        while process.poll() is None and not list(Path('.').glob('out/???.png')):
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=HANGING)
    finally:
        process.kill()
    assert process.returncode == expect
    return said


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_batch_that_is_told_to_end_leaves_no_partial_file(number: signal.Signals, here: Path, file: Path) -> None:
    """Whenever it comes; a signal in the middle of writing is what os.fsync sends here."""
    stopped(file, number, 128 + number)
    assert all(cv2.imread(str(path)) is not None for path in Path('out').iterdir())
    before = signal.signal(number, signal.SIG_DFL)
    try:
        killing = mock.patch.object(os, 'fsync', lambda descriptor: os.kill(os.getpid(), number))
        with killing, pytest.raises(SystemExit, match=str(128 + number)):
            main(['upscale', str(file), 'in/000.png', '-o', 'other/x.png'])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert list(Path('other').iterdir()) == []


@pytest.mark.slow
def test_ctrl_c(here: Path, file: Path) -> None:
    said = stopped(file, signal.SIGINT, 130)
    done = [path for path in Path('out').iterdir() if not path.name.startswith('.')]
    found = re.search(r'mssr: interrupted; (\d+) of 300 images were upscaled', said)
    assert found is not None, said
    assert len(done) - int(found[1]) in (0, 1)  # the signal may come when an image is there, but not yet counted
    assert 'Traceback' not in said
    assert all(cv2.imread(str(path)) is not None for path in Path('out').iterdir())


@pytest.mark.slow
def test_standard_input_and_output(here: Path, file: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    cv2.imwrite('a.png', image)
    assert main(['upscale', str(file), 'a.png', '-o', 'b.png']) == 0
    command = [sys.executable, '-m', 'mssr_basicsr', 'upscale', str(file)]
    done = subprocess.run([*command, '-', '-o', '-'], input=Path('a.png').read_bytes(), capture_output=True, check=True)
    assert done.stdout == Path('b.png').read_bytes()
    assert b'1 of 1 images upscaled' in done.stderr
    failed = subprocess.run([*command, '-', '-o', '-'], input=b'no image', capture_output=True)
    assert (failed.returncode, failed.stdout) == (1, b'')
    assert b'\nmssr: error: -: not an image' in failed.stderr
    command += ['-', '-o', '-', '--json']
    reported = subprocess.run(command, input=Path('a.png').read_bytes(), capture_output=True)
    assert b'"input": "-",' in reported.stderr and b'"output": "-",' in reported.stderr
    (here / 'folder').mkdir()
    for arguments in (['folder', '-o', '-'], ['-', '-o', 'folder'], ['-', '-o', 'c.png', '--gt', 'folder']):
        assert main(['upscale', str(file), *arguments]) == 1
    Path('-').write_bytes(Path('a.png').read_bytes())
    assert main(['upscale', str(file), './-', '-o', 'c.png']) == 0
