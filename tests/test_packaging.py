"""Both ways of installing include the import hook, uninstalling removes it; an sdist includes what its tests read."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import call

ROOT = Path(__file__).resolve().parent.parent
PTH = 'mssr_basicsr.pth'
READ_BY_TESTS = ('docs', 'models', 'options', 'scripts', 'tests')
HOOKED = 'import sys; print("BasicSRHook" in str(sys.meta_path))'
BUILD = 'import sys; from setuptools.build_meta import __legacy__; getattr(__legacy__, sys.argv[1])(sys.argv[2])'

pytest.importorskip('setuptools', minversion='64')


@pytest.fixture(scope='module', autouse=True)
def _installed_only() -> Iterator[None]:
    """What is started here sees this project through an installation only."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ('PYTHONPATH', 'MSSR_BASICSR_DISCOVERY'):
            monkeypatch.delenv(name, raising=False)
        yield


def copy_of_sources(target: Path) -> Path:
    """So that no build leavings come into the working tree."""
    target.mkdir(exist_ok=True)
    for path in ROOT.iterdir():
        if path.name in ('mssr_basicsr', *READ_BY_TESTS):
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns('__pycache__', '*.so'))
        elif path.is_file():
            shutil.copy(path, target)
    return target


@pytest.fixture(scope='module', params=['build_wheel', 'build_editable'])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_of_sources(tmp_path_factory.mktemp('source'))
    target = tmp_path_factory.mktemp('wheel')
    call(sys.executable, '-c', BUILD, request.param, target, cwd=source)
    (built,) = target.glob('*.whl')
    return built


@pytest.mark.slow
def test_wheel_has_the_pth_at_its_root(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        assert archive.read(PTH) == (ROOT / PTH).read_bytes()
        (record,) = (name for name in archive.namelist() if name.endswith('/RECORD'))
        assert f'{PTH},sha256=' in archive.read(record).decode()
        assert not [name for name in archive.namelist() if name.startswith(('tests/', 'scripts/'))]
        assert '.data/' not in ' '.join(archive.namelist())
        if 'editable' not in wheel.name:
            assert 'mssr_basicsr/py.typed' in archive.namelist()


@pytest.mark.slow
def test_install_arms_the_hook_and_uninstall_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=os.name != 'nt')
    python = tmp_path / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    pip = (sys.executable, '-m', 'pip', '--python', python)
    assert call(python, '-c', HOOKED) == 'False\n'
    call(*pip, 'install', '--no-deps', '--no-index', wheel)
    assert call(python, '-c', HOOKED) == 'True\n'
    call(*pip, 'uninstall', '--yes', 'mssr-basicsr')
    assert call(python, '-c', HOOKED) == 'False\n'
    assert not list(tmp_path.rglob('*mssr*'))


def test_a_source_distribution_has_what_its_tests_read(tmp_path: Path) -> None:
    source = copy_of_sources(tmp_path / 'source')
    call(sys.executable, '-c', BUILD, 'build_sdist', tmp_path, cwd=source)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        found = {source / name.partition('/')[2] for name in archive.getnames()}
    assert {path for name in READ_BY_TESTS for path in (source / name).rglob('*') if path.is_file()} <= found


def test_pth_is_one_line_that_python_executes() -> None:
    # Python takes every other line for a folder, and decodes the file as the locale says.
    lines = (ROOT / PTH).read_bytes().decode('ascii').splitlines()
    assert [line[0:7] for line in lines if not line.startswith('#')] == ['import ']
