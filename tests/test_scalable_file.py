"""The .mssr file: every level in one file, bit for bit, and every prefix of it a model."""

from __future__ import annotations

import io
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKBONES, TOY_EDSR, call
from hypothesis import given, settings
from hypothesis import strategies as st

from mssr_basicsr import ScalableFile, ScalableFileError, ScalableModel, pack
from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.scalable.building import AllocationLimit, _TooLarge, build_backbone
from mssr_basicsr.scalable.positions import decode_positions, encode_positions, entropy_bound

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts' / 'checks'))
import fuzz_file


def network(backbone: dict[str, Any] = TOY_EDSR, levels: int = 3, seed: int = 0, empty: tuple[int, ...] = ()) -> MSSR:
    """An MSSR network with random weights and level map, in which the levels ``empty`` add nothing."""
    torch.manual_seed(seed)
    built = MSSR(deepcopy(backbone), [k / levels for k in range(levels)])
    used = torch.tensor([k for k in range(levels) if k not in empty], dtype=torch.uint8)
    built.set_level_map({name: used[torch.randint(len(used), m.shape)] for name, m in built.get_level_map().items()})
    return built


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


# ------------------------------ positions ------------------------------ #


def test_positions_of_a_hand_made_choice() -> None:
    chosen = np.zeros(1000, np.bool_)
    chosen[[0, 3, 4, 300, 810]] = True
    few, most, half = chosen, ~chosen, np.arange(10) % 2 == 0
    data = encode_positions([few, most, half])
    numbers = decode_positions(data, [5, 995, 5], [1000, 1000, 10])
    assert numbers[0].tolist() == [0, 3, 4, 300, 810]
    assert numbers[1].tolist() == [i for i in range(1000) if i not in (0, 3, 4, 300, 810)]
    assert numbers[2].tolist() == [0, 2, 4, 6, 8]


@given(st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 9)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_positions_round_trip(layers: list[tuple[int, float, int]]) -> None:
    chosen = [np.random.default_rng(seed).random(n) < share for n, share, seed in layers]
    counts, candidates = [int(which.sum()) for which in chosen], [which.size for which in chosen]
    decoded = decode_positions(encode_positions(chosen), counts, candidates)
    assert [numbers.tolist() for numbers in decoded] == [np.flatnonzero(which).tolist() for which in chosen]


@pytest.mark.parametrize('share', [0.01, 1 / 16, 1 / 7, 0.24, 1 / 3, 0.42, 0.5, 0.7, 0.9])
def test_positions_are_within_5_percent_of_the_entropy(share: float) -> None:
    chosen = [np.random.default_rng(i).random(37_000) < share for i in range(20)]
    bound = entropy_bound([int(which.sum()) for which in chosen], [which.size for which in chosen])
    assert bound < len(encode_positions(chosen)) < 1.05 * bound


def test_entropy_bound_by_hand() -> None:
    # A quarter of 16 positions: 16 * (1/4 * 2 + 3/4 * log2(4/3)) bits. All or none: nothing to say.
    assert entropy_bound([4, 0, 5], [16, 9, 5]) == pytest.approx(16 * (0.5 + 0.75 * np.log2(4 / 3)) / 8)


@pytest.mark.parametrize(('counts', 'candidates'), [([4], [1000]), ([6], [1000]), ([5], [800]), ([5, 1], [1000, 9])])
def test_positions_that_do_not_fit_the_header_are_refused(counts: list[int], candidates: list[int]) -> None:
    chosen = np.zeros(1000, np.bool_)
    chosen[[0, 3, 4, 300, 810]] = True
    with pytest.raises(ScalableFileError, match='positions'):
        decode_positions(encode_positions([chosen]), counts, candidates)


# ------------------------------ round trips ------------------------------ #


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('empty', [(), (1,), (0, 2)])
def test_every_level_comes_back_bit_for_bit(name: str, empty: tuple[int, ...]) -> None:
    packed = network(BACKBONES[name], levels=4, empty=empty)
    model = ScalableModel(io.BytesIO(pack(packed, 2)), level=3)
    for level in (3, 2, 1, 0):
        if level < 3:
            model.expand()
        assert model.level == level
        assert_same(model.network.state_dict(), packed.export(level))
    model.shrink(2)
    assert_same(model.network.state_dict(), packed.export(2))
    model.expand(0)
    assert_same(model.network.state_dict(), packed.export(0))


@given(levels=st.integers(2, 6), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=25, deadline=None)
def test_round_trip_of_random_level_maps(levels: int, seed: int, data: st.DataObject) -> None:
    empty = data.draw(st.sets(st.integers(0, levels - 1), max_size=levels - 1))
    packed = network(levels=levels, seed=seed, empty=tuple(empty))
    whole = data.draw(st.sampled_from(sorted(packed.get_level_map())))
    level_map = {name: m.clone() for name, m in packed.get_level_map().items()}
    level_map[whole].fill_(data.draw(st.integers(0, levels - 1)))  # a layer that smaller levels do without
    packed.set_level_map(level_map)
    file = pack(packed, 2)
    for level in range(levels):
        assert_same(ScalableModel(io.BytesIO(file), level=level).network.state_dict(), packed.export(level))


def test_the_same_model_gives_the_same_bytes() -> None:
    assert pack(network(seed=1), 2) == pack(network(seed=1), 2) != pack(network(seed=2), 2)


def test_values_of_two_bytes_are_rounded_to_nearest() -> None:
    packed = network()
    for dtype, kind in (('F16', torch.float16), ('BF16', torch.bfloat16)):
        file = pack(packed, 2, dtype=dtype)
        assert len(file) < 0.7 * len(pack(packed, 2))
        state = ScalableModel(io.BytesIO(file)).network.state_dict()
        expected = packed.export(0)
        for name in packed.prunable_names:
            assert torch.equal(state[name], expected[name].to(kind).float())
    packed.prunable_weights()['conv_first.weight'].data.flatten()[0] = 1e6
    with pytest.raises(ScalableFileError, match=r'conv_first.weight: 1e\+06 is too large for F16; allowed: F32, BF16'):
        pack(packed, 2, dtype='F16')


def test_buffers_that_the_architecture_computes_are_not_in_the_file() -> None:
    packed = network(BACKBONES['SwinIR'])
    file = ScalableFile(io.BytesIO(pack(packed, 2)))
    assert any('relative_position_index' in name for name in file.header.computed)
    assert not any('relative_position_index' in tensor.name for tensor in file.header.others)


# ------------------------------ prefixes, growing, shrinking ------------------------------ #


def test_every_prefix_is_a_model_of_its_levels() -> None:
    packed = network()
    file = pack(packed, 2)
    for section in ScalableFile(io.BytesIO(file)).header.sections:
        for cut in (section.end, min(section.end + 5, len(file))):
            model = ScalableModel(io.BytesIO(file[:cut]))
            assert model.level == section.level
            assert_same(model.network.state_dict(), packed.export(section.level))
    first = ScalableFile(io.BytesIO(file)).header.sections[0].end
    message = f'level 2 needs the first {first:,} bytes, there are {first - 1:,}'
    with pytest.raises(ScalableFileError, match=message):
        ScalableModel(io.BytesIO(file[: first - 1]))


def test_expand_reads_its_section_alone_and_leaves_the_rest_in_place() -> None:
    packed = network()
    model = ScalableModel(io.BytesIO(pack(packed, 2)), level=2, engine='torch')
    weights = dict(model.network.named_parameters())
    storages = {name: weight.data_ptr() for name, weight in weights.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    read = model.file.bytes_read
    model.expand()
    assert model.file.bytes_read - read == model.header.section(1).size
    assert {name: weight.data_ptr() for name, weight in model.network.named_parameters()} == storages
    for name, level_map in packed.get_level_map().items():
        assert torch.equal(weights[name][level_map == 2], before[name][level_map == 2])


def test_a_download_that_goes_on_can_be_expanded(tmp_path: Path) -> None:
    packed = network()
    data, path = pack(packed, 2), tmp_path / 'model.mssr'
    end = ScalableFile(io.BytesIO(data)).header.sections[0].end
    path.write_bytes(data[:end])
    with ScalableModel(path) as model:
        with pytest.raises(ScalableFileError, match='level 1 needs the first'):
            model.expand()
        with open(path, 'ab') as file:
            file.write(data[end:])
        model.expand(0)
        assert_same(model.network.state_dict(), packed.export(0))


def test_a_stream_that_cannot_seek_is_read_in_its_order() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return self.data.readinto(memoryview(buffer)[:777])  # few at a time, as a socket gives

    packed = network()
    model = ScalableModel(Pipe(pack(packed, 2)), level=2)  # type: ignore[arg-type]
    model.expand(0)
    assert_same(model.network.state_dict(), packed.export(0))


def test_a_section_that_cannot_be_read_leaves_the_level_before(tmp_path: Path) -> None:
    packed = network()
    data = bytearray(pack(packed, 2))
    data[-1] ^= 1
    model = ScalableModel(io.BytesIO(bytes(data)), level=2)
    with pytest.raises(ScalableFileError, match=r'the section of level 0 is corrupted \(checksum\)'):
        model.expand(0)
    assert model.level == 1
    assert_same(model.network.state_dict(), packed.export(1))


def test_budgets_choose_the_largest_level_that_fits() -> None:
    data = pack(network(), 2)
    header = ScalableFile(io.BytesIO(data)).header
    for level in (0, 1, 2):
        end, parameters = header.section(level).end, header.num_parameters(level)
        assert ScalableModel(io.BytesIO(data), max_bytes=end).level == level
        assert ScalableModel(io.BytesIO(data), max_parameters=parameters).level == level
    with pytest.raises(ScalableFileError, match='which is over the budget'):
        ScalableModel(io.BytesIO(data), max_bytes=header.section(2).end - 1)


def test_other_layouts_and_types_of_the_network_grow_too() -> None:
    packed = network()
    model = ScalableModel(io.BytesIO(pack(packed, 2)), level=2)
    model.network.to(memory_format=torch.channels_last)
    model.network.double()
    model.expand(0)
    for name, weight in packed.export(0).items():
        assert torch.equal(model.network.state_dict()[name], weight.double())


def test_an_own_network_needs_no_basicsr(tmp_path: Path) -> None:
    (tmp_path / 'model.mssr').write_bytes(pack(network({'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1}), 4))
    code = """
import sys
from torch import nn
from mssr_basicsr import ScalableModel
class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 4, 3), nn.PReLU(4), nn.Conv2d(4, 48, 3)
        self.body = nn.ModuleList(layers)
model = ScalableModel('model.mssr', level=0, network=Mine())
print(model.level, 'basicsr' in sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == '0 False\n'


# ------------------------------ what is refused ------------------------------ #


def test_clear_errors(tmp_path: Path) -> None:
    data = pack(network(), 2)

    def error(file: bytes, **arguments: Any) -> str:
        with pytest.raises(ScalableFileError) as caught:
            ScalableModel(io.BytesIO(file), **arguments)
        return str(caught.value)

    assert 'not a scalable model file' in error(b'')
    assert 'not a scalable model file' in error(b'PK\x03\x04' + data)
    assert 'format version 2; this program reads version 1' in error(data[:8] + b'\x02' + data[9:])
    assert 'the header is corrupted' in error(data[:100] + b'?' + data[101:])
    assert 'level 3: this model has levels 0 to 2' in error(data, level=3)
    assert 'differs in' in error(data, network=torch.nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError):
        ScalableModel(tmp_path / 'none.mssr')


def test_texts_and_metrics_are_fit_to_be_printed() -> None:
    def error(metrics: Any) -> str:
        with pytest.raises(ScalableFileError) as caught:
            pack(network(), 2, metrics)
        return str(caught.value)

    assert "found '\\x1b[2J'; allowed: printable characters" in error({'0': {'\x1b[2J': {'psnr': 1.0}}})
    assert "metrics: found 'much'; allowed: a number" in error({'0': {'set': {'psnr': 'much'}}})


def test_options_of_a_file_are_no_paths() -> None:
    with pytest.raises(ScalableFileError, match=r"found '../weights.pth'; allowed: words"):
        build_backbone({'type': 'SpyNet', 'load_path': '../weights.pth'})


def test_an_architecture_may_not_take_more_memory_than_it_is_allowed() -> None:
    with pytest.raises(_TooLarge, match='a tensor of 4,000,000,000,000 bytes'), AllocationLimit(10**6, 10**6):
        torch.empty(10**12)
    with pytest.raises(_TooLarge), AllocationLimit(single=400, total=1000):
        [torch.zeros(100) for _ in range(3)]


def test_no_corrupted_file_gives_a_wrong_weight() -> None:
    outcomes, faults = fuzz_file.fuzz(cases=1000, seed=1)
    assert faults == []
    assert {outcome for _, outcome in outcomes} >= {
        'refused',
        'read to the last level',
        'read to level 1, the rest refused',
    }


# ------------------------------ from the backward stage ------------------------------ #


def test_the_backward_stage_writes_the_file(
    run: Any, forward_opt: dict[str, Any], backward_opt: dict[str, Any]
) -> None:
    run(forward_opt)
    models = run(backward_opt) / 'models'
    with ScalableModel(models / 'net_g.mssr', level=2) as model:
        for level in (2, 1, 0):
            if level < 2:
                model.expand()
            expected = torch.load(models / f'net_g_level{level}.pth')['params']
            assert_same(model.network.state_dict(), expected)
            assert model.header.metrics[str(level)]['toyval']['psnr'] > 0
    yml, checkpoint = models.parents[2] / 'backward.yml', models / 'net_g_latest.pth'
    mssr = (sys.executable, '-m', 'mssr_basicsr')
    call(*mssr, 'pack', checkpoint, '--opt', yml, '-o', 'again.mssr')
    assert Path('again.mssr').read_bytes() == (models / 'net_g.mssr').read_bytes()
    forward = 'experiments/forward/models/net_g_latest.pth'
    assert 'of the forward stage' in call(*mssr, 'pack', forward, '--opt', yml, expect=1)
    plain = models / 'net_g_level1.pth'
    assert 'of no MSSR network' in call(*mssr, 'pack', plain, '--opt', yml, expect=1)
