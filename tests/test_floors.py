"""The package's floors (imports come from the same floor or below), and what works without BasicSR."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONES, assert_same, call, network

import mssr_basicsr
from mssr_basicsr import pack

PACKAGE = Path(mssr_basicsr.__file__).parent
#: The floor of each folder. What stands beside the folders is the entrance, above all of them.
FLOORS = {
    'foundation': 1, 'method': 1,
    'scalable': 2, 'sparse': 2,
    'adapter': 3,
    'archs': 4, 'data': 4, 'losses': 4, 'metrics': 4, 'models': 4,
    'commands': 5,
}  # fmt: skip
ENTRANCE = 6
#: Who imports by a name that is made at run time: the door to BasicSR, its opener, and the entrance.
BY_NAME = {'foundation/on_demand.py', 'adapter/discovery.py', 'commands/main.py', '__init__.py'}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))
NOT_IN_LOWER_FLOORS = {  # what the floors up to 2 do without at import; 1 needs torch alone
    1: ('basicsr', 'torchvision', 'cv2', 'safetensors', 'yaml', 'matplotlib', 'tqdm'),
    2: ('basicsr', 'torchvision', 'yaml', 'matplotlib', 'onnx'),
}


def floor_of(module: str) -> int:
    """The floor of a dotted name in the package."""
    part = module.split('.')[1] if '.' in module else ''
    return FLOORS.get(part, ENTRANCE)


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, wherever in it, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text('utf-8'))
    inside = {id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute here'
            yield str(node.module), id(node) not in inside


def test_every_folder_has_a_floor() -> None:
    folders = {path.parts[0] for path in MODULES if len(path.parts) > 1}
    assert folders <= FLOORS.keys()


@pytest.mark.parametrize('module', MODULES, ids=str)
def test_no_module_imports_from_above(module: Path) -> None:
    floor = FLOORS.get(module.parts[0], ENTRANCE)
    for imported, at_once in imports_of(PACKAGE / module):
        root = imported.split('.')[0]
        if root == 'mssr_basicsr' and imported != 'mssr_basicsr':
            assert floor_of(imported) <= floor, f'{module} imports {imported}'
        elif imported == 'mssr_basicsr':
            assert floor >= FLOORS['commands'], f'{module} imports the entrance'
        if root == 'basicsr':  # floor 2 may reach for it when it is asked to, through the door
            assert floor > 2 or (floor == 2 and not at_once), f'{module} imports {imported}'


@pytest.mark.parametrize('module', [path for path in MODULES if path.as_posix() not in BY_NAME], ids=str)
def test_no_module_circumvents_its_floor_by_name(module: Path) -> None:
    constants = [
        node.value
        for node in ast.walk(ast.parse((PACKAGE / module).read_text('utf-8')))
        if isinstance(node, ast.Constant)
    ]
    assert not [text for text in constants if isinstance(text, str) and re.fullmatch(r'mssr_basicsr(\.\w+)+', text)]


@pytest.mark.slow
@pytest.mark.parametrize('floor', [1, 2, 3])
def test_a_floor_stands_without_what_is_above_it(floor: int) -> None:
    """Each of its modules is imported in a Python that cannot import higher floors nor, up to floor 2, BasicSR."""
    modules = ['.'.join(('mssr_basicsr', *path.with_suffix('').parts)) for path in MODULES]
    wanted = [name.removesuffix('.__init__') for name in modules if floor_of(name) == floor]
    above = [f'mssr_basicsr.{folder}' for folder, its in FLOORS.items() if its > floor]
    # BasicSR itself may need what the adapter repairs, and must not load the plugin's upper floors here.
    repaired = 'from mssr_basicsr.adapter.compat import before_import\nbefore_import()\n' if floor == 3 else ''
    code = f"""
import importlib, sys
for name in {[*above, *NOT_IN_LOWER_FLOORS.get(floor, ())]}:
    sys.modules[name] = None
{repaired}
for name in {wanted}:
    importlib.import_module(name)
"""
    call(sys.executable, '-c', code, MSSR_BASICSR_DISCOVERY='0')


# ------------------------------ without BasicSR ------------------------------ #


@pytest.fixture(scope='module')
def without_basicsr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has no BasicSR."""
    folder = tmp_path_factory.mktemp('without_basicsr')
    (folder / 'basicsr.py').write_text("raise ModuleNotFoundError('No module named basicsr')")
    return {'PYTHONPATH': str(folder), 'MSSR_BASICSR_DISCOVERY': '0'}


def mssr(*words: str | Path, expect: int = 0, **environment: str) -> str:
    return call(sys.executable, '-m', 'mssr_basicsr', *words, expect=expect, **environment)


@pytest.mark.slow
def test_what_works_without_basicsr(tmp_path: Path, without_basicsr: dict[str, str]) -> None:
    file = tmp_path / 'model.mssr'
    built = network()
    file.write_bytes(pack(built, 2))
    assert 'EDSR x2' in mssr('info', file, **without_basicsr)
    assert 'OK, levels 0 to 2' in mssr('verify', file, **without_basicsr)
    mssr('extract', file, '--level', '1', '-o', tmp_path / 'level.pth', **without_basicsr)
    assert_same(torch.load(tmp_path / 'level.pth')['params'], built.export(1))
    said = mssr('upscale', file, file, '-o', tmp_path / 'x.png', expect=1, **without_basicsr)
    assert said.startswith('mssr: error: to build EDSR (or give a network that you have built), basicsr is needed')
    assert 'Traceback' not in said


@pytest.mark.slow
@pytest.mark.parametrize('is_there', [True, False])
def test_a_network_built_by_the_user_needs_no_basicsr(
    is_there: bool, tmp_path: Path, without_basicsr: dict[str, str]
) -> None:
    """Where there is one, it is not imported."""
    file = tmp_path / 'model.mssr'
    built = network({**BACKBONES['SRVGGNetCompact'], 'num_conv': 0})  # a network that a few lines can write again
    file.write_bytes(pack(built, 2))
    code = """
import sys, numpy as np, torch
from torch import nn
from torch.nn import functional as F
from mssr_basicsr import ScalableModel

class Compact(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3, 1, 1), nn.PReLU(8), nn.Conv2d(8, 12, 3, 1, 1)])
    def forward(self, x):
        out = x
        for layer in self.body:
            out = layer(out)
        return F.pixel_shuffle(out, 2) + F.interpolate(x, scale_factor=2, mode='nearest')

image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
model = ScalableModel(sys.argv[1], 1, network=Compact())
assert model.level == 1 and not model.network.training
np.save(sys.argv[2], model.upscale(image))
assert not [name for name in sys.modules if name.split('.')[0] == 'basicsr']
"""
    environment = {} if is_there else without_basicsr
    call(sys.executable, '-c', code, file, tmp_path / 'image.npy', **environment)
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert np.array_equal(np.load(tmp_path / 'image.npy'), mssr_basicsr.ScalableModel(file, 1).upscale(image))


@pytest.mark.slow
def test_buffers_that_an_architecture_computes_need_its_code(tmp_path: Path, without_basicsr: dict[str, str]) -> None:
    file = tmp_path / 'model.mssr'
    file.write_bytes(pack(network(BACKBONES['SwinIR']), 2))
    assert 'OK, levels 0 to 2' in mssr('verify', file, **without_basicsr)
    mssr('extract', file, '--level', '1', '-o', tmp_path / 'small.mssr', **without_basicsr)
    said = mssr('extract', file, '-o', tmp_path / 'level.pth', expect=1, **without_basicsr)
    assert 'SwinIR computes ' in said
    assert 'basicsr is needed' in said
    assert not (tmp_path / 'level.pth').exists()
