"""The bytes of the format: small files pinned in tests/data/, and a reader in another language.

Each ``KIND.mssr`` has beside it ``KIND.safetensors``: the tensors of its level 0, and for each prunable weight its
level map, ``level_map.NAME`` (uint8). At level k a weight's elements whose level is below k are zero.

    python tests/test_format_vectors.py    writes them anew, after a change of the format
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
import zstandard
from conftest import HANGING, assert_same
from torch import Tensor, nn

from mssr_basicsr import ScalableModel
from mssr_basicsr.scalable.building import computed_checksum
from mssr_basicsr.scalable.container import ScalableFile, write_file
from mssr_basicsr.scalable.frames import decompress
from mssr_basicsr.scalable.quantisation import quantise
from mssr_basicsr.scalable.sections import encode_section
from mssr_basicsr.scalable.values import TORCH_DTYPES

DATA = Path(__file__).parent / 'data'
READER = Path(__file__).parents[1] / 'docs' / 'read_mssr.mjs'
KINDS = {'f32': 'F32', 'f16': 'F16', 'bf16': 'BF16', 'i8': 'I8'}
SMALLEST = 3
#: Shape, and the percentage of the elements that each level from 3 to 0 adds. Level 1 adds nothing.
WEIGHTS: dict[str, tuple[tuple[int, ...], tuple[int, int, int, int]]] = {
    'bits': ((6, 4, 3, 3), (50, 20, 0, 30)),  # as bits
    'few': ((40, 30), (1, 5, 0, 94)),  # as distances, some of them above 255
    'most': ((5, 3, 3, 3), (90, 9, 0, 1)),  # as distances of the others
    'all': ((3, 7), (100, 0, 0, 0)),
    'none': ((4, 4, 1, 1), (0, 0, 0, 100)),
    'empty': ((0, 5), (0, 0, 0, 100)),
    'vector': ((9,), (30, 30, 0, 40)),
}
OTHERS: dict[str, tuple[str, tuple[int, ...]]] = {
    'bias': ('F32', (6,)),
    'counter': ('I64', ()),
    'mean': ('F64', (3,)),
    'flags': ('BOOL', (2, 2)),
    'slope': ('F32', (4,)),
    'codes': ('I16', (5,)),
    'halves': ('BF16', (3,)),
}


def noise(seed: int, count: int) -> np.ndarray:
    """``count`` integers from 0 to 2^31 - 1, the same on every machine."""
    steps = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(1000 * seed)
    with np.errstate(over='ignore'):
        return ((steps * np.uint64(6364136223846793005)) ** 2 >> np.uint64(33)).astype(np.int64)


def tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and others of the vectors, and the weights' level maps."""
    state, level_map = {}, {}
    for seed, (name, (shape, shares)) in enumerate(WEIGHTS.items()):
        count = int(np.prod(shape))
        values = (noise(seed, count) % 20001 - 10000) / 10000.0
        state[name] = torch.from_numpy((values * values * values).astype(np.float32)).reshape(shape)
        bounds = np.cumsum(shares)
        levels = SMALLEST - np.searchsorted(bounds, noise(seed + 50, count) % 100, side='right')
        level_map[name] = torch.from_numpy(levels.astype(np.uint8)).reshape(shape)
    for seed, (name, (dtype, shape)) in enumerate(OTHERS.items()):
        values = noise(seed + 100, int(np.prod(shape))) % 1000 - 500
        numbers = torch.from_numpy(values % 2 if dtype == 'BOOL' else values)
        if dtype in ('F32', 'F64', 'BF16'):
            numbers = numbers.double() / 64
        state[name] = numbers.to(TORCH_DTYPES[dtype]).reshape(shape)
    return state, level_map


class Network(nn.Module):
    """A network that has tensors of the vectors' names, and a buffer that it computes."""

    def __init__(self) -> None:
        super().__init__()
        for name, (shape, _) in WEIGHTS.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        for name, (dtype, shape) in OTHERS.items():
            self.register_buffer(name, torch.ones(shape, dtype=TORCH_DTYPES[dtype]))
        self.register_buffer('table', torch.arange(6).reshape(2, 3))


def write(dtype: str) -> tuple[bytes, dict[str, Tensor]]:
    """A file, and what stands beside it."""
    state, level_map = tensors()
    stored = {name: state[name].to(TORCH_DTYPES[dtype]) for name in WEIGHTS} if dtype != 'I8' else {}
    scales = []
    expected = {**state, **{f'level_map.{name}': levels for name, levels in level_map.items()}}
    for name, levels in level_map.items():
        if dtype == 'I8':
            stored[name], scale = quantise(state[name], levels)
            scales.append(scale)
            expected[name] = stored[name].float() * scale.float().reshape(-1, *[1] * (levels.dim() - 1))
        else:
            expected[name] = stored[name].float()
    others = [state[name] for name in OTHERS]
    counts, sections = [], []
    for level in range(SMALLEST, -1, -1):
        chosen = [levels[levels <= level] == level for levels in level_map.values()]
        values = [stored[name][levels == level] for name, levels in level_map.items()]
        counts.append([int(which.sum()) for which in chosen])
        first = (scales, others) if level == SMALLEST else None
        sections.append(encode_section([which.numpy() for which in chosen], values, first))
    fields = {
        'backbone': {'type': 'Vectors', 'options': [1, 0.5, True, None, 'word']},
        'scale': 2,
        'dtype': dtype,
        'weights': [[name, list(shape)] for name, (shape, _) in WEIGHTS.items()],
        'others': [[name, list(shape), kind] for name, (kind, shape) in OTHERS.items()],
        'num_other_parameters': 10,
        'computed': ['table'],
        'computed_checksum': computed_checksum(Network(), ('table',)),
        'metrics': {'0': {'Set': {'psnr': 31.25}}},
        'metadata': {'license': 'CC0-1.0', 'description': 'Zahlen für Prüfungen'},
        'key_of_a_newer_version': {'to': ['be', 'ignored', None]},
    }
    return write_file(fields, counts, sections), expected


def at_level(expected: dict[str, Tensor], level: int) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in expected.items() if not name.startswith('level_map.')}
    for name in WEIGHTS:
        state[name] = torch.where(expected[f'level_map.{name}'] >= level, state[name], 0.0)
    return state


@pytest.mark.parametrize('kind', KINDS)
def test_vectors_decode_to_the_tensors_beside_them(kind: str) -> None:
    expected = safetensors.torch.load_file(DATA / f'{kind}.safetensors')
    with ScalableModel(DATA / f'{kind}.mssr', level=SMALLEST, network=Network()) as model:
        assert model.header.section(1).counts == (0,) * len(WEIGHTS)
        for level in range(SMALLEST, -1, -1):
            model.expand(level)
            state = model.network.state_dict()
            del state['table']
            assert_same(state, at_level(expected, level))


@pytest.mark.parametrize('kind', KINDS)
def test_the_writer_gives_the_pinned_bytes(kind: str) -> None:
    pinned = (DATA / f'{kind}.mssr').read_bytes()
    file, expected = write(KINDS[kind])
    assert_same(expected, safetensors.torch.load_file(DATA / f'{kind}.safetensors'))
    assert unpacked(file) == unpacked(pinned)
    if zstandard.ZSTD_VERSION == (1, 5, 7):  # another version may compress in another way
        assert file == pinned


def unpacked(file: bytes) -> tuple[Any, list[bytes]]:
    """What a writer is not free in: the header but for lengths and checksums of frames, and what the frames hold."""
    fields = json.loads(decompress(file[24 : 24 + int.from_bytes(file[12:16], 'little')], 1 << 20))
    for section in fields['sections']:
        del section['bytes'], section['xxh64']
    with ScalableFile(io.BytesIO(file)) as reader:
        return fields, [decompress(reader.read_section(level), 1 << 20) for level in range(SMALLEST, -1, -1)]


def test_the_preamble_by_hand() -> None:
    file = (DATA / 'f32.mssr').read_bytes()
    assert file[:12] == b'\x89MSSR\r\n\x1a' + b'\x02\x00\x00\x00'


def test_computed_checksum_by_hand() -> None:
    text = b'table I64 2 3\n' + b''.join(i.to_bytes(8, 'little') for i in range(6))
    assert computed_checksum(Network(), ('table',)) == xxhash.xxh64(text, seed=0).hexdigest()


def can_run_the_reader() -> bool:
    node = shutil.which('node')
    if node is None:
        return False
    asked = subprocess.run([node, '-p', '!!require("zlib").zstdDecompressSync'], capture_output=True, text=True)
    return asked.stdout.strip() == 'true' or shutil.which('zstd') is not None


@pytest.mark.skipif(not can_run_the_reader(), reason='needs node, and its Zstandard decoder or the program zstd')
@pytest.mark.parametrize('kind', KINDS)
def test_the_reader_in_javascript_gets_every_bit(kind: str, tmp_path: Path) -> None:
    file = DATA / f'{kind}.mssr'
    expected = safetensors.torch.load_file(file.with_suffix('.safetensors'))
    with ScalableFile(file) as reader:
        end = reader.header.section(2).end
    (tmp_path / 'prefix.mssr').write_bytes(file.read_bytes()[:end])
    for source, level in ((tmp_path / 'prefix.mssr', 2), (file, 0)):
        subprocess.run(['node', READER, source, str(level), tmp_path / 'out.safetensors'], check=True, timeout=HANGING)
        assert_same(safetensors.torch.load_file(tmp_path / 'out.safetensors'), at_level(expected, level))


@pytest.mark.skipif(not can_run_the_reader(), reason='needs node, and its Zstandard decoder or the program zstd')
def test_the_reader_in_javascript_detects_damage_and_missing_levels(tmp_path: Path) -> None:
    data = (DATA / 'f32.mssr').read_bytes()
    for bad, problem in (
        (data[:30] + b'?' + data[31:], 'the header is corrupted'),
        (data[:-1] + b'?', 'level 0 is corrupted'),
        (data[:-1], f'level 0 needs the first {len(data)} bytes'),
        (data[:8] + b'\3' + data[9:], 'major version 3; this program reads 2'),
    ):
        (tmp_path / 'bad.mssr').write_bytes(bad)
        command = ['node', READER, tmp_path / 'bad.mssr', '0', tmp_path / 'out.safetensors']
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING)
        assert done.returncode != 0 and problem in done.stderr


@pytest.mark.skipif(not can_run_the_reader(), reason='needs node, and its Zstandard decoder or the program zstd')
@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        *(
            ([level, 'out'], f'level {level}: this model has levels 0 to {SMALLEST}')
            for level in ('9', 'four', '-1', '1.5')
        ),
        (['', 'out'], f'level : this model has levels 0 to {SMALLEST}'),
        (['1'], 'usage: node read_mssr.mjs FILE.mssr [LEVEL OUT.safetensors]'),
    ],
)
def test_the_reader_in_javascript_refuses_what_is_no_level(arguments: list[str], problem: str, tmp_path: Path) -> None:
    command = ['node', READER, DATA / 'f32.mssr', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING, cwd=tmp_path)
    assert done.returncode != 0 and problem in done.stderr
    assert list(tmp_path.iterdir()) == []


if __name__ == '__main__':
    DATA.mkdir(exist_ok=True)
    for kind, dtype in KINDS.items():
        file, expected = write(dtype)
        (DATA / f'{kind}.mssr').write_bytes(file)
        safetensors.torch.save_file(expected, DATA / f'{kind}.safetensors')
