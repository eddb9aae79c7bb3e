"""The import hook: its cost at every start of Python, and that every way to import BasicSR finds the plugin."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import call

PTH = Path(__file__).resolve().parent.parent / 'mssr_basicsr.pth'

REGISTERED = """
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
assert 'MSSR' in ARCH_REGISTRY and 'SSDLoss' in LOSS_REGISTRY and 'MSSRForwardModel' in MODEL_REGISTRY
"""
# Lets stock BasicSR be imported without the hook.
IMPORTABLE = 'from mssr_basicsr.adapter import compat; compat.before_import()\n'
# A `basicsr` and a plugin that cost nothing to import, to try the finder on.
TOY = """
import sys
from mssr_basicsr.adapter import discovery
discovery._prepare = discovery._repair = lambda: None
discovery.REGISTERING = ('toy_plugin',)
"""


def python(
    code: str, *, hook: bool = True, path: Path | None = None, options: tuple[str, ...] = (), cwd: Path | None = None
) -> str:
    """What a new Python that runs ``code`` prints on both channels; it must succeed."""
    environment = {'MSSR_BASICSR_DISCOVERY': '1' if hook else '0'}
    if path is not None:
        environment['PYTHONPATH'] = str(path)
    return call(sys.executable, *options, '-c', code, cwd=cwd, **environment)


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    (tmp_path / 'basicsr').mkdir()
    (tmp_path / 'basicsr' / '__init__.py').write_text('import os\nassert "FAULT" not in os.environ\ndone = True\n')
    (tmp_path / 'toy_plugin.py').write_text('import basicsr\nassert basicsr.done\nprint("registered")\n')
    return tmp_path


def test_start_imports_nothing() -> None:
    code = 'import sys; loaded = list(sys.modules); import json; print(json.dumps(loaded))'
    on, off = (set(json.loads(python(code, hook=hook))) for hook in (True, False))
    assert on == off


@pytest.mark.parametrize('hook', [True, False])
def test_environment_variable_switches_the_hook_off(hook: bool) -> None:
    code = 'import sys; print([getattr(finder, "__name__", "") for finder in sys.meta_path].count("BasicSRHook"))'
    assert python(code, hook=hook).strip() == str(int(hook))


@pytest.mark.parametrize(
    ('fault', 'error'),
    [
        (None, "ModuleNotFoundError: No module named 'mssr_basicsr'"),
        ('no python', 'SyntaxError: '),
        ('raise RuntimeError("why")', 'RuntimeError: why'),
        ('import no_such_module', "ModuleNotFoundError: No module named 'no_such_module'"),
        ('\0', '(SyntaxError|ValueError): source code .*null bytes'),
        ('', "ImportError: cannot import name 'find_basicsr' from 'mssr_basicsr.adapter.discovery'"),
    ],
)
def test_broken_plugin_breaks_neither_python_nor_basicsr(toys: Path, fault: str | None, error: str) -> None:
    """The hook is installed; its package is not there (``fault=None``), or the module that it imports is broken."""
    (toys / PTH.name).write_text(PTH.read_text())
    if fault is not None:
        (toys / 'mssr_basicsr' / 'adapter').mkdir(parents=True)
        (toys / 'mssr_basicsr' / 'adapter' / 'discovery.py').write_text(fault)
    # -S, and a current folder without one: neither the plugin that is really installed, nor this repository's.
    options, start = ('-S',), f'import site; site.addsitedir({str(toys)!r})'
    assert python(start, path=toys, options=options, cwd=toys) == ''
    said = python(start + '\nimport basicsr; assert basicsr.done', path=toys, options=options, cwd=toys)
    warning = 'RuntimeWarning: BasicSR continues without the mssr_basicsr plugin: '
    assert said.count(warning) == len(re.findall(warning + error, said)) == 1, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ('first', 'hook'),
    [('basicsr', True), ('mssr_basicsr.archs.mssr_arch', True), ('mssr_basicsr.models.backward_stage', False)],
)
def test_import_registers_the_plugin(first: str, hook: bool) -> None:
    python(f'import {first}' + REGISTERED, hook=hook)


@pytest.mark.slow
def test_plugin_joins_a_basicsr_imported_without_the_hook() -> None:
    code = IMPORTABLE + 'from basicsr.utils.registry import ARCH_REGISTRY\nassert "MSSR" not in ARCH_REGISTRY'
    python(code + '\nimport mssr_basicsr.losses' + REGISTERED, hook=False)


@pytest.mark.slow
def test_basicsr_continues_without_a_failing_plugin_and_says_why() -> None:
    code = """
from mssr_basicsr.adapter import discovery
discovery.REGISTERING = ('no_such_module',)
import basicsr
from basicsr.utils.registry import ARCH_REGISTRY
assert 'EDSR' in ARCH_REGISTRY
"""
    said = python(code)
    assert said.count('RuntimeWarning: ') == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in said


@pytest.mark.slow
def test_a_copy_of_basicsr_may_lack_what_it_does_not_use(forward_opt: dict[str, Any], tmp_path: Path) -> None:
    """As DAT's and SRFormer's do: what is there is repaired as ever, and trains."""
    basicsr = importlib.util.find_spec('basicsr')
    assert basicsr is not None and basicsr.submodule_search_locations is not None
    copy = tmp_path / 'basicsr'
    shutil.copytree(basicsr.submodule_search_locations[0], copy)
    for module in ('models/realesrnet_model', 'models/realesrgan_model', 'archs/basicvsrpp_arch'):
        (copy / f'{module}.py').unlink()
    (tmp_path / 'net.yml').write_text(yaml.safe_dump(forward_opt))
    (tmp_path / 'train.py').write_text(
        'import sys; from basicsr.train import train_pipeline; train_pipeline(sys.path[0])'
    )
    for arguments in ([], ['--auto_resume']):
        said = call(sys.executable, 'train.py', '-opt', 'net.yml', *arguments, cwd=tmp_path)
        assert 'RuntimeWarning' not in said
    assert (tmp_path / 'experiments' / 'forward' / 'models' / 'levels.json').is_file()

    (copy / 'data' / 'paired_image_dataset.py').unlink()  # what our own dataset extends
    (copy / 'archs' / 'basicvsrpp_arch.py').write_text('')
    said = python('import basicsr' + REGISTERED, path=tmp_path)
    assert said.count('RuntimeWarning: ') == 1
    assert 'BasicSR continues without mssr_basicsr.data.paired_evaluation_dataset: ModuleNotFoundError' in said


def test_looking_up_basicsr_does_not_use_up_the_hook(toys: Path) -> None:
    code = TOY + 'import importlib.util\nassert importlib.util.find_spec("basicsr")\nimport basicsr'
    assert python(code, path=toys) == 'registered\n'


def test_import_that_failed_can_be_tried_again(toys: Path) -> None:
    code = (
        TOY
        + """
import os
os.environ['FAULT'] = ''
try:
    import basicsr
except AssertionError:
    del os.environ['FAULT']
import basicsr
assert not any(getattr(finder, '__name__', '') == 'BasicSRHook' for finder in sys.meta_path)
"""
    )
    assert python(code, path=toys) == 'registered\n'


def test_registering_happens_once(toys: Path) -> None:
    code = TOY + 'import basicsr, importlib\nimportlib.reload(basicsr)\ndiscovery.load_basicsr()'
    assert python(code, path=toys) == 'registered\n'


def test_load_basicsr_from_within_basicsr(toys: Path) -> None:
    # BasicSR imports a module of ours before it is complete: the plugin waits until it is.
    circle = 'from mssr_basicsr.adapter.discovery import load_basicsr\nload_basicsr()\ndone = True'
    (toys / 'basicsr' / '__init__.py').write_text(circle)
    assert python(TOY + 'import basicsr', path=toys) == 'registered\n'


def test_mere_folder_and_missing_basicsr_behave_as_without_the_hook(tmp_path: Path) -> None:
    code = f"""
import site, sys
site.addsitedir({str(PTH.parent)!r})
try:
    import basicsr
except ModuleNotFoundError as error:
    assert error.name == 'basicsr'
else:
    raise AssertionError
sys.path.append({str(tmp_path)!r})
import basicsr
assert basicsr.__file__ is None
"""
    (tmp_path / 'basicsr').mkdir()
    # -S: without the site-packages that hold the real one.
    assert python(code, options=('-S',)) == ''
