"""The .mssr file: every level in one file, bit for bit, and every prefix is a model."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import BACKBONES, assert_same, call, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.model_zoo import load_url
from torchvision.models import VGG11_Weights
from toy import Merging

from mssr_basicsr import ScalableFile, ScalableFileError, ScalableModel, level_state, pack, verify
from mssr_basicsr.commands.main import main
from mssr_basicsr.scalable.building import AllocationLimit, _TooLarge, build_backbone, loading_refused
from mssr_basicsr.scalable.container import join_file
from mssr_basicsr.scalable.frames import MAX_WINDOW, compress_parts, compress_text, decompress
from mssr_basicsr.scalable.positions import choose, decode_positions, encode_positions
from mssr_basicsr.scalable.quantisation import quantise
from mssr_basicsr.scalable.values import TORCH_DTYPES, from_planes, to_planes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'scripts' / 'checks'))
import fuzz_file
from benchmark_file import entropy_bound


def dequantised(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """What an int8 file makes of a weight."""
    integers, scales = quantise(weight, levels)
    return integers.float() * scales.float().reshape(-1, *[1] * (weight.dim() - 1))


# ------------------------------ positions ------------------------------ #


def decode(data: bytes, counts: list[int], candidates: list[int]) -> list[list[int]]:
    """The numbers of the chosen candidates, layer by layer; ``data`` must have nothing else."""
    choices, used = decode_positions(np.frombuffer(data, np.uint8), counts, candidates)
    if used != len(data):
        raise ScalableFileError('positions: bytes are left')
    return [choose(np.arange(n), choice).tolist() for choice, n in zip(choices, candidates)]


def test_positions_of_a_hand_made_choice() -> None:
    chosen = np.zeros(1000, np.bool_)
    chosen[[0, 3, 4, 300, 810]] = True
    half = np.arange(10) % 2 == 0
    data = encode_positions([chosen, ~chosen, half, np.ones(7, np.bool_)])
    distances = [0, 3, 1, 255, 41, 255, 255, 0]
    assert list(data) == [*distances, *distances, 0b10101010, 0b10000000]
    few, most, some, everything = decode(data, [5, 995, 5, 7], [1000, 1000, 10, 7])
    assert few == [0, 3, 4, 300, 810]
    assert most == [i for i in range(1000) if i not in few]
    assert some == [0, 2, 4, 6, 8]
    assert everything == [0, 1, 2, 3, 4, 5, 6]


@given(st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 9)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_positions_round_trip(layers: list[tuple[int, float, int]]) -> None:
    chosen = [np.random.default_rng(seed).random(n) < share for n, share, seed in layers]
    counts, candidates = [int(which.sum()) for which in chosen], [which.size for which in chosen]
    decoded = decode(encode_positions(chosen), counts, candidates)
    assert decoded == [np.flatnonzero(which).tolist() for which in chosen]


@pytest.mark.parametrize('share', [0.01, 1 / 16, 1 / 7, 0.24, 1 / 3, 0.42, 0.5, 0.7, 0.9])
def test_positions_are_within_5_percent_of_the_entropy(share: float) -> None:
    chosen = [np.random.default_rng(i).random(37_000) < share for i in range(20)]
    bound = entropy_bound([int(which.sum()) for which in chosen], [which.size for which in chosen])
    assert bound < len(compress_parts([encode_positions(chosen)])) < 1.05 * bound


def test_entropy_bound_by_hand() -> None:
    # A quarter of 16 positions: 16 * (1/4 * 2 + 3/4 * log2(4/3)) bits. All or none: nothing to say.
    assert entropy_bound([4, 0, 5], [16, 9, 5]) == pytest.approx(16 * (0.5 + 0.75 * np.log2(4 / 3)) / 8)


@pytest.mark.parametrize(('counts', 'candidates'), [([4], [1000]), ([6], [1000]), ([5], [800]), ([5, 1], [1000, 9])])
def test_positions_that_do_not_fit_the_header_are_refused(counts: list[int], candidates: list[int]) -> None:
    chosen = np.zeros(1000, np.bool_)
    chosen[[0, 3, 4, 300, 810]] = True
    with pytest.raises(ScalableFileError, match='positions'):
        decode(encode_positions([chosen]), counts, candidates)


# ------------------------------ frames, planes, int8 ------------------------------ #


def test_a_frame_is_refused_before_it_takes_memory() -> None:
    frame = compress_parts([bytes(10**6)])
    assert len(frame) < 1000 and decompress(frame, 10**6) == bytes(10**6)
    allowed = 'up to 999,999 bytes with a window of up to 131,072'
    with pytest.raises(ScalableFileError, match=f'found 1,000,000 bytes with a window of 131,072; allowed: {allowed}'):
        decompress(frame, 10**6 - 1)
    wide = zstandard.ZstdCompressionParameters(window_log=20)
    noise = np.random.default_rng(0).bytes(2 * MAX_WINDOW) * 2
    for bad in (
        frame[:-1],
        frame + b'0',
        frame + frame,
        b'',
        b'no frame at all',
        zstandard.ZstdCompressor(compression_params=wide).compress(noise),
        zstandard.ZstdCompressor(write_content_size=False).compress(b'of a length that it does not state'),
    ):
        with pytest.raises(ScalableFileError, match='frame'):
            decompress(bad, 10**6)


def test_planes_by_hand() -> None:
    # 1.0 is 3F800000, its bits rotated left by one 7F000000; -2.0 is C0000000, and 80000001.
    planes = to_planes(torch.tensor([1.0, -2.0]))
    assert planes == [b'\x7f\x80', b'\0\0', b'\0\0', b'\x00\x01']
    assert to_planes(torch.tensor([1, -2], dtype=torch.int16)) == [b'\x00\xff', b'\x01\xfe']


@pytest.mark.parametrize('name', TORCH_DTYPES)
@pytest.mark.parametrize('count', [0, 1, 1000])
def test_planes_keep_every_bit(name: str, count: int) -> None:
    dtype = TORCH_DTYPES[name]
    noise = np.random.default_rng(0).integers(0, 2 if name == 'BOOL' else 256, count * dtype.itemsize, np.uint8)
    values = torch.empty(count, dtype=dtype)
    values.view(torch.uint8).copy_(torch.from_numpy(noise))  # NaN of every kind among them
    planes = to_planes(values)
    assert [len(plane) for plane in planes] == [count] * dtype.itemsize
    again = from_planes(np.frombuffer(b''.join(planes), np.uint8).reshape(dtype.itemsize, count), dtype)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)) and again.dtype == dtype


@pytest.mark.parametrize('shape', [(8, 4, 3, 3), (5, 70), (6,), (3, 0), (2, 9, 1, 1)])
def test_int8_weights_are_within_a_step_and_sums_within_half_a_step_at_every_level(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    levels = torch.randint(3, shape, generator=generator, dtype=torch.uint8)
    integers, scales = quantise(weight, levels)
    assert (integers.dtype, scales.dtype, integers.shape, scales.shape) == (
        torch.int8, torch.bfloat16, weight.shape, weight.shape[:1],
    )  # fmt: skip
    error = (dequantised(weight, levels) - weight) / scales.float().reshape(-1, *[1] * (weight.dim() - 1))
    assert int(integers.abs().max() if integers.numel() else 0) <= 127 and (error.abs() <= 1).all()
    for level in range(3):
        kept = torch.where(levels >= level, error, 0.0)
        assert (kept.flatten(1).sum(1).abs() <= 0.5 + 1e-4).all() if weight.dim() > 1 else True
        if weight.dim() == 4 and shape[2] == 3:  # the channel may have moved one weight of a kernel once more
            assert (kept.sum((2, 3)).abs() <= 1.5 + 1e-4).all()


def test_int8_of_smaller_levels_does_not_depend_on_larger_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    weight[:, 0, 0, 0] = 5  # the largest of each channel, which gives the scale, in the smallest level
    levels = torch.randint(3, weight.shape, generator=generator, dtype=torch.uint8)
    levels[:, 0, 0, 0] = 2
    other = torch.where(levels == 0, torch.randn(weight.shape, generator=generator), weight)
    first, second = quantise(weight, levels)[0], quantise(other, levels)[0]
    assert torch.equal(first[levels > 0], second[levels > 0]) and not torch.equal(first, second)


# ------------------------------ round trips ------------------------------ #


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('empty', [(), (1,), (0, 2)])
def test_every_level_round_trips_bit_for_bit(name: str, empty: tuple[int, ...]) -> None:
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


@pytest.mark.slow
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


@pytest.mark.parametrize('name', ['EDSR', 'SwinIR'])
def test_torchs_defaults_change_no_bit(name: str) -> None:
    """Another program may have set another dtype, or another device, for all new tensors."""
    packed = network(BACKBONES[name])
    data = pack(packed, 2)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device('meta'):
            assert_same(level_state(io.BytesIO(data), 1), packed.export(1))
            assert_same(ScalableModel(io.BytesIO(data), level=1).network.state_dict(), packed.export(1))
            assert pack(packed, 2) == data
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


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


def test_int8_has_the_same_integers_at_every_level() -> None:
    packed = network(levels=4)
    file = pack(packed, 2, dtype='I8')
    assert len(file) < 0.5 * len(pack(packed, 2))
    model = ScalableModel(io.BytesIO(file), level=3)
    level_map, exact = packed.get_level_map(), packed.export(0)
    expected = {
        name: dequantised(weight.detach(), level_map[name]) for name, weight in packed.prunable_weights().items()
    }
    for level in (3, 2, 1, 0):
        model.expand(level)
        state = model.network.state_dict()
        for name, tensor in exact.items():
            if name in expected:
                tensor = torch.where(level_map[name] >= level, expected[name], 0.0)
            assert torch.equal(state[name], tensor)
    packed.prunable_weights()['conv_last.weight'].data.flatten()[0] = float('nan')
    with pytest.raises(ScalableFileError, match=r'conv_last.weight: found a weight that is not finite; allowed: F32'):
        pack(packed, 2, dtype='I8')


# Each shipped file's run in docs/results.json, and its size compared with the dense network's in fp32.
SHIPPED = {
    'EDSR_8x32_x2_291': ('main_backward_teacher', 0.91),
    'EDSR_8x32_x4_291': ('x4_backward', 0.91),
    'EDSR_8x32_x4_291_int8': ('x4_backward', 0.3),
    'SRVGGNetCompact_10x32_x2_291': ('srvgg_backward', 0.93),
    'SRVGGNetCompact_10x32_x2_291_int8': ('srvgg_backward', 0.3),
}


def test_the_shipped_models_meet_their_limits() -> None:
    folder = Path(__file__).parents[1]
    results = json.loads((folder / 'docs' / 'results.json').read_text())
    assert {path.stem for path in folder.glob('models/*.mssr')} == SHIPPED.keys()
    for name, (run, share) in SHIPPED.items():
        path = folder / 'models' / f'{name}.mssr'
        with ScalableModel(path) as model:
            header = model.header
            dense = 4 * sum(tensor.numel() for tensor in model.network.state_dict().values())
        assert header.sections[-1].end == path.stat().st_size < min(share * dense, 1.5e6)
        assert header.metadata['license'] == 'Apache-2.0' and 'T91' in header.metadata['training_data']
        assert run in header.metadata['description'] or 'options/' in header.metadata['description']
        if run == 'main_backward_teacher':
            assert header.metrics['4']['Set5']['psnr'] == pytest.approx(37.0229, abs=1e-4)
        for record in results[run]['levels']:
            for dataset, expected in record['metrics'].items():
                found = header.metrics[str(record['level'])][dataset]
                # Rounding to int8 costs a little.
                assert found['psnr'] == pytest.approx(expected['psnr'], abs=0.05 if header.dtype == 'I8' else 2e-4)


# ------------------------------ header ------------------------------ #


def header_of(file: bytes) -> dict[str, Any]:
    """The header's JSON value, read by hand."""
    length = int.from_bytes(file[12:16], 'little')
    fields: dict[str, Any] = json.loads(decompress(file[24 : 24 + length], 1 << 20))
    return fields


def with_header(file: bytes, **changes: Any) -> bytes:
    """The file with other values in its header, its checksum right."""
    sections = [file[section.start : section.end] for section in ScalableFile(io.BytesIO(file)).header.sections]
    return join_file(compress_text(json.dumps({**header_of(file), **changes}).encode()), sections)


def test_metadata_and_unknown_keys_travel_with_the_file() -> None:
    packed = network()
    metadata = {'license': 'Apache-2.0', 'author': 'Zoë', 'training_data': 'none'}
    file = pack(packed, 2, metadata=metadata)
    assert ScalableFile(io.BytesIO(file)).header.metadata == metadata
    newer = with_header(file, unknown={'key': [1, None]})
    newer = newer[:10] + b'\x07\x00' + newer[12:]  # version 2.7
    model = ScalableModel(io.BytesIO(newer), level=1)
    assert_same(model.network.state_dict(), packed.export(1))
    prefix = model.file.read_prefix(1)
    assert header_of(prefix)['unknown'] == {'key': [1, None]} and prefix == newer[: len(prefix)]


def test_sections_start_at_multiples_of_64_and_padding_is_zero() -> None:
    file = pack(network(), 2)
    end = 24 + int.from_bytes(file[12:16], 'little')
    for section in ScalableFile(io.BytesIO(file)).header.sections:
        assert section.start % 64 == 0 and section.start - end == section.padding < 64
        assert not any(file[end : section.start])
        if section.padding:
            bad = file[: section.start - 1] + b'\1' + file[section.start :]
            with pytest.raises(ScalableFileError, match=f'the section of level {section.level} is corrupted'):
                ScalableModel(io.BytesIO(bad))
        end = section.end
    assert end == len(file)


@pytest.mark.parametrize(
    ('changes', 'problem'),
    [
        ({'dtype': 'F8'}, "dtype: found 'F8'; allowed: F32, F16, BF16, I8"),
        ({'scale': 0}, 'scale: found 0; allowed: 1 to 281474976710655'),
        ({'weights': []}, 'weights: there are none'),
        ({'weights': [['a', [3, 0]]]}, 'weights: there are none, or none has an element'),
        ({'weights': [['a', [1] * 9]]}, 'shape: found 9 dimensions; allowed: 8'),
        ({'weights': [['a', [2**30, 2**30]]]}, 'shape: found 1152921504606846976; allowed'),
        ({'others': [['a', [1], 'C64']]}, "others: found 'C64'; allowed: F64, F32"),
        ({'others': [['a', [1]]]}, 'allowed: [name, shape, dtype]'),
        ({'computed': ['a']}, "computed_checksum: found 'None'; allowed: a JSON str"),
        ({'computed': ['conv_first.weight']}, 'a name occurs twice'),
        ({'metadata': {'license': 3}}, "metadata: license: found '3'; allowed: a JSON str"),
        ({'metadata': {'author': 'line\nfeed'}}, 'allowed: printable characters'),
        ({'sections': []}, 'sections: found 0; allowed: 2 to 255'),
        ({'sections': [{'bytes': 1, 'xxh64': 'x', 'counts': [0]}] * 2}, "counts for"),
    ],
)  # fmt: skip
def test_headers_that_contradict_the_specification_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScalableFileError, match=re.escape(problem)):
        ScalableFile(io.BytesIO(with_header(pack(network(), 2), **changes)))


def test_scales_of_channels_without_elements_take_no_memory() -> None:
    """Channels have an int8 file's scales even where a weight has no elements: 4 GB of them, compressed to nothing."""
    file = pack(network(), 2, dtype='I8')
    sections = header_of(file)['sections']
    weights = [*header_of(file)['weights'], ['x', [1 << 30, 0]]]
    hostile = with_header(file, weights=weights, sections=[{**one, 'counts': [*one['counts'], 0]} for one in sections])
    with pytest.raises(ScalableFileError, match=r'a network of 1,073,7.* weights is implausible in a file of'):
        verify(io.BytesIO(hostile))


def test_a_header_may_not_unpack_to_much_more_than_itself() -> None:
    sections = [b'', b'']
    bomb = join_file(compress_text(b' ' * (1 << 22) + b'{}'), sections)
    assert len(bomb) < 1000
    with pytest.raises(ScalableFileError, match='header: a frame: found 4,194,306 bytes with'):
        ScalableFile(io.BytesIO(bomb))


def test_buffers_that_the_architecture_computes_are_not_in_the_file() -> None:
    packed = network(BACKBONES['SwinIR'])
    file = ScalableFile(io.BytesIO(pack(packed, 2)))
    assert any('relative_position_index' in name for name in file.header.computed)
    assert not any('relative_position_index' in tensor.name for tensor in file.header.others)


def test_only_buffers_are_computed() -> None:
    """A parameter has the shape that the network gives it, too, but no file that lacks its values can be right."""
    file = pack(network(), 2)
    others = [entry for entry in header_of(file)['others'] if entry[0] != 'conv_first.bias']
    hostile = with_header(
        file, others=others, num_other_parameters=0, computed=['conv_first.bias'], computed_checksum='0' * 16
    )
    with pytest.raises(ScalableFileError, match=r"computed: found 'conv_first.bias'; allowed: buffers of the network"):
        ScalableModel(io.BytesIO(hostile))


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
    message = f'level 2 needs the first {first:,} bytes; there are {first - 1:,}'
    with pytest.raises(ScalableFileError, match=message):
        ScalableModel(io.BytesIO(file[: first - 1]))


def test_expand_reads_only_its_section_and_leaves_the_rest_in_place() -> None:
    packed = network()
    model = ScalableModel(io.BytesIO(pack(packed, 2)), level=2, engine='torch')
    weights = dict(model.network.named_parameters())
    storages = {name: weight.data_ptr() for name, weight in weights.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    read = model.file.bytes_read
    model.expand()
    section = model.header.section(1)
    assert model.file.bytes_read - read == section.padding + section.size
    assert section.padding < 64
    assert {name: weight.data_ptr() for name, weight in model.network.named_parameters()} == storages
    for name, level_map in packed.get_level_map().items():
        assert torch.equal(weights[name][level_map == 2], before[name][level_map == 2])


def test_a_download_in_progress_can_be_expanded(tmp_path: Path) -> None:
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


class Pipe(io.RawIOBase):
    """A stream that cannot seek, and gives few bytes at a time, as a socket does."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.data.readinto(memoryview(buffer)[:777])


def test_a_stream_that_cannot_seek_is_read_in_its_order() -> None:
    packed = network()
    model = ScalableModel(Pipe(pack(packed, 2)), level=2)  # type: ignore[arg-type]
    model.expand(0)
    assert_same(model.network.state_dict(), packed.export(0))


class Reader:
    """A stream with the few methods that files had to have before ``io``, as Python 3.9's SpooledTemporaryFile."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        self.read, self.tell = self.stream.read, self.stream.tell

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> None:
        self.stream.seek(offset, whence)


class Forward:
    """A stream with nothing but ``read``."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


def test_a_stream_that_does_not_say_whether_it_can_seek_is_tried() -> None:
    packed = network()
    data = pack(packed, 2)
    stream = Reader(b'other data' + data)
    stream.seek(10)
    model = ScalableModel(stream, level=2)  # type: ignore[arg-type]
    assert model.file.size == len(data)
    stream.seek(0)
    model.expand(0)
    assert_same(model.network.state_dict(), packed.export(0))
    forward = ScalableModel(Forward(data), level=2)  # type: ignore[arg-type]
    assert forward.file.size is None
    forward.expand(0)
    assert_same(forward.network.state_dict(), packed.export(0))


def test_a_prefix_of_a_stream_that_cannot_seek() -> None:
    data = pack(network(), 2)
    for level in (2, 1, 0):
        file = ScalableFile(Pipe(data))  # type: ignore[arg-type]
        prefix = file.read_prefix(level)
        assert prefix == data[: file.header.section(level).end] and file.bytes_read == len(prefix)
    with pytest.raises(ScalableFileError, match='the stream cannot seek'):
        file.read_prefix(2)
    cut = data[:-1]
    with pytest.raises(ScalableFileError, match=f'level 0 needs the first {len(data):,} bytes; there are {len(cut):,}'):
        ScalableFile(Pipe(cut)).read_prefix(0)  # type: ignore[arg-type]


def test_a_stream_that_its_owner_moved_is_read_where_the_section_is() -> None:
    packed = network()
    stream = io.BytesIO(pack(packed, 2))
    model = ScalableModel(stream, level=2)
    stream.seek(0)
    model.expand()
    stream.read()
    model.expand()
    assert_same(model.network.state_dict(), packed.export(0))


@pytest.mark.parametrize('name', ['EDSR', 'SwinIR'])  # SwinIR computes buffers, and so has to be built
def test_the_state_of_a_level_in_a_stream(name: str) -> None:
    packed = network(BACKBONES[name])
    data = pack(packed, 2)
    inside = io.BytesIO(b'other data' + data)
    inside.seek(10)
    for stream in (io.BytesIO(data), inside, Pipe(data)):
        assert_same(level_state(stream, 1), packed.export(1))


def test_a_section_that_cannot_be_read_leaves_the_level_before(tmp_path: Path) -> None:
    packed = network()
    data = bytearray(pack(packed, 2))
    data[-1] ^= 1
    model = ScalableModel(io.BytesIO(bytes(data)), level=2)
    with pytest.raises(ScalableFileError, match=r'the section of level 0 is corrupted \(checksum\)'):
        model.expand(0)
    assert model.level == 1
    assert_same(model.network.state_dict(), packed.export(1))


class Interruption:
    """Ctrl-C before the ``n``-th line of sparse/layers.py and scalable/placing.py that is run in the context."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()  # coverage's, for one
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(('layers.py', 'placing.py')):
            return None
        if event == 'line':
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize('engine', ['auto', 'torch'])
@pytest.mark.parametrize(('start', 'target'), [(2, 1), (1, 2)])
def test_an_interrupted_change_of_level_leaves_a_whole_level(start: int, target: int, engine: str) -> None:
    packed = network()
    data = pack(packed, 2)
    for n in range(1, 10_000, 7):
        model = ScalableModel(io.BytesIO(data), start, engine=engine)
        try:
            with Interruption(n):
                model.expand(target) if target < start else model.shrink(target)
            break
        except KeyboardInterrupt:
            assert model.level in (start, target)
            assert_same(model.network.state_dict(), packed.export(model.level))
            model.expand(0)
            assert_same(model.network.state_dict(), packed.export(0))
    assert n > 100


def test_budgets_choose_the_largest_level_that_fits() -> None:
    data = pack(network(), 2)
    header = ScalableFile(io.BytesIO(data)).header
    for level in (0, 1, 2):
        end, parameters = header.section(level).end, header.num_parameters(level)
        assert ScalableModel(io.BytesIO(data), max_bytes=end).level == level
        assert ScalableModel(io.BytesIO(data), max_parameters=parameters).level == level
    with pytest.raises(ScalableFileError, match='which is over the budget'):
        ScalableModel(io.BytesIO(data), max_bytes=header.section(2).end - 1)


@pytest.mark.parametrize('kind', ['layer', 'buffer', 'weight'])
@pytest.mark.parametrize('built_by', ['user', 'file'])
def test_a_network_that_merges_weights_in_eval_mode_merges_those_of_its_level(
    kind: str, built_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the stock network does that loads the level's checkpoint; in training, it has the level's weights."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Merging', Merging)
    trained = network({'type': 'Merging', 'kind': kind})
    data, x = pack(trained, 2), torch.rand(1, 3, 16, 16)
    model = ScalableModel(io.BytesIO(data), 2, network=Merging(kind).eval() if built_by == 'user' else None)
    for change, level in ((model.expand, 2), (model.expand, 0), (model.shrink, 1), (model.expand, 0)):
        change(level)
        assert_same(level_state(io.BytesIO(data), level), trained.export(level))
        stock = Merging(kind)
        stock.load_state_dict(trained.export(level), strict=True)
        with torch.no_grad():
            output, expected = model.network(x), stock.eval()(x)
        # Only what is merged into a weight itself is taken out of it again, which rounds.
        assert torch.allclose(output, expected, rtol=0, atol=1e-6 if kind == 'weight' else 0)
    assert torch.allclose(
        model.network.train().get_parameter('wide.weight'), trained.export(0)['wide.weight'], atol=1e-6
    )


def test_networks_in_other_layouts_and_dtypes_grow_too() -> None:
    packed = network()
    model = ScalableModel(io.BytesIO(pack(packed, 2)), level=2)
    model.network.to(memory_format=torch.channels_last)
    model.network.double()
    model.expand(0)
    for name, weight in packed.export(0).items():
        assert torch.equal(model.network.state_dict()[name], weight.double())


class Counts(tuple[int, ...]):
    """The counts of a section, which tell how often they have been read."""

    times_read = 0

    def __iter__(self) -> Iterator[int]:
        self.times_read += 1
        return super().__iter__()


def test_describing_a_file_reads_each_count_once() -> None:
    """Otherwise its time would grow with the square of the levels, and a file of 140 KB would take minutes."""
    file = ScalableFile(io.BytesIO(pack(network(levels=20), 2)))
    expected = file.describe()
    sections = tuple(replace(section, counts=Counts(section.counts)) for section in file.header.sections)
    file.header = replace(file.header, sections=sections)
    assert file.describe() == expected
    assert [section.counts.times_read for section in sections] == [1] * 20  # type: ignore[attr-defined]


def test_describing_a_file_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / 'model.mssr').write_bytes(pack(network(), 2))
    code = "import sys; from mssr_basicsr import ScalableFile; ScalableFile('model.mssr').describe()"
    call(sys.executable, '-c', code + "; assert 'torch' not in sys.modules", cwd=tmp_path)


# ------------------------------ what is refused ------------------------------ #


def test_clear_errors(tmp_path: Path) -> None:
    data = pack(network(), 2)

    def error(file: bytes, **arguments: Any) -> str:
        with pytest.raises(ScalableFileError) as caught:
            ScalableModel(io.BytesIO(file), **arguments)
        return str(caught.value)

    assert 'not a scalable model file' in error(b'')
    assert 'not a scalable model file' in error(b'PK\x03\x04' + data)
    version = 'format version: found {}; allowed: 2.x ({})'
    assert version.format('1.0', 'pack the model again') in error(data[:8] + b'\1\0' + data[10:])
    assert version.format('3.0', 'update mssr-basicsr') in error(data[:8] + b'\3\0' + data[10:])
    assert 'the header is corrupted' in error(data[:100] + b'?' + data[101:])
    long = data[:12] + (1 << 21).to_bytes(4, 'little') + data[16:]
    assert 'length of the header: found 2,097,152 bytes; allowed: up to 1,048,576' in error(long)
    needed = 24 + int.from_bytes(data[12:16], 'little')
    assert f'the header needs the first {needed:,} bytes; there are 100' in error(data[:100])
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
    assert "metrics: found '1000" in error({'0': {'set': {'psnr': 10**400}}})


@pytest.mark.parametrize('number', ['1e999', '-1e999', 'Infinity', 'NaN'])
def test_numbers_of_a_header_are_finite(number: str) -> None:
    file = pack(network(), 2)
    sections = [file[section.start : section.end] for section in ScalableFile(io.BytesIO(file)).header.sections]
    for key in ('metrics', 'backbone', 'unknown'):
        text = json.dumps({**header_of(file), key: {'type': 'EDSR', '0': {'set': {'psnr': 'number'}}}})
        with pytest.raises(ScalableFileError, match=f'header: not JSON .{number} is not a finite number'):
            ScalableFile(io.BytesIO(join_file(compress_text(text.replace('"number"', number).encode()), sections)))


def test_a_file_has_no_metric_that_is_not_finite() -> None:
    """A training's, too: those that BasicSR measures become the file's."""
    metrics = {'0': {'set': {'psnr': float('inf'), 'ssim': 1.0, 'niqe': float('nan')}}, '1': {'set': {'psnr': 30.5}}}
    header = ScalableFile(io.BytesIO(pack(network(), 2, metrics))).header
    assert header.metrics == {'0': {'set': {'ssim': 1.0}}, '1': {'set': {'psnr': 30.5}}}


def test_options_of_a_file_are_no_paths() -> None:
    with pytest.raises(ScalableFileError, match=r"found '../weights.pth'; allowed: words"):
        build_backbone({'type': 'SpyNet', 'load_path': '../weights.pth'})
    # A word is a path, too: of a file in the current folder.
    for options in ({'load_path': 'weights'}, {'parts': [{'Path': ['weights']}]}, {'dict_path': {'face': {'a': 'w'}}}):
        with pytest.raises(ScalableFileError, match=r"th: found '\w+'; allowed: null, since it could be a path"):
            build_backbone({'type': 'SpyNet', **options})
    assert build_backbone({'type': 'SpyNet', 'load_path': None}).state_dict()
    # A rate is none: it gets as far as the architecture, here one that does not know it.
    with pytest.raises(ScalableFileError, match=r"unexpected keyword argument 'block'"):
        build_backbone({'type': 'SpyNet', 'block': {'drop_path': 0.1}})


URL = 'http://localhost/weights.pth'
FETCHING: dict[str, Callable[[], Any]] = {
    'load': lambda: torch.load('weights'),
    'hub': lambda: torch.hub.load_state_dict_from_url(URL),
    'model_zoo': lambda: load_url(URL),
    'torchvision': lambda: VGG11_Weights.DEFAULT.get_state_dict(),
}


class Fetches(torch.nn.Module):
    """A network that gets initial weights from elsewhere, as BasicSR's VGGFeatureExtractor does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fetched = FETCHING[how]()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in the current folder, and on a server from which they can be downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Fetches', Fetches)
    torch.save({'weight': 1}, 'weights')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, path, *_, **__: shutil.copy('weights', path))


@pytest.mark.parametrize('how', FETCHING)
def test_a_network_in_a_file_gets_no_weights_from_elsewhere(how: str, elsewhere: None) -> None:
    hostile = with_header(pack(network(), 2), backbone={'type': 'Fetches', 'how': how})
    before = torch.load, torch.hub.download_url_to_file
    with pytest.raises(ScalableFileError, match='its weights there; no others are loaded or downloaded'):
        ScalableModel(io.BytesIO(hostile))
    assert not list(Path().rglob('*.pth'))
    assert (torch.load, torch.hub.download_url_to_file) == before
    assert build_backbone({'type': 'Fetches', 'how': how}).fetched == {'weight': 1}  # the user's own, as in pack


def test_other_threads_load_weights_while_a_file_is_opened(elsewhere: None) -> None:
    before, inside, left = torch.load, threading.Event(), threading.Event()

    def other_file() -> None:
        with loading_refused():
            inside.set()
            left.wait()

    with ThreadPoolExecutor(2) as threads:
        with loading_refused():
            assert threads.submit(lambda: torch.load('weights')).result() == {'weight': 1}
            opened = threads.submit(other_file)
            inside.wait(0.2)  # in vain: otherwise the two would leave in the order in which they came
            kept = torch.load  # as by a module that is imported meanwhile
        left.set()
        opened.result()
    assert torch.load is before and kept('weights') == {'weight': 1}


def test_an_architecture_may_not_take_more_memory_than_it_is_allowed() -> None:
    with pytest.raises(_TooLarge, match='a tensor of 4,000,000,000,000 bytes'), AllocationLimit(10**6, 10**6, 9):
        torch.empty(10**12)
    with pytest.raises(_TooLarge), AllocationLimit(single=400, total=1000, tensors=9):
        [torch.zeros(100) for _ in range(3)]
    with pytest.raises(_TooLarge, match='more tensors'), AllocationLimit(single=400, total=1000, tensors=9):
        [torch.zeros(0) for _ in range(10)]


def test_an_architecture_may_not_make_more_tensors_than_the_header_accounts_for() -> None:
    """Those without elements take no memory, but time: these, which no list in the header states, two seconds."""
    backbone = {'type': 'SRVGGNetCompact', 'num_in_ch': 0, 'num_feat': 0, 'num_conv': 1000, 'upscale': 2}
    with pytest.raises(ScalableFileError, match=r'SRVGGNetCompact.* is not what the header lists \(more tensors\)'):
        ScalableModel(io.BytesIO(with_header(pack(network(), 2), backbone=backbone)))


@pytest.mark.slow
def test_no_corrupted_file_gives_a_wrong_weight() -> None:
    outcomes, faults = fuzz_file.fuzz(cases=1000, seed=1)
    assert faults == []
    assert {outcome for _, outcome in outcomes} >= {
        'refused',
        'read to the last level',
        'read to level 1, the rest refused',
    }


# ------------------------------ from the backward stage ------------------------------ #


@pytest.mark.slow
def test_the_backward_stage_writes_the_file(
    run: Any, forward_opt: dict[str, Any], backward_opt: dict[str, Any], capsys: pytest.CaptureFixture[str]
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
    packing = ['pack', str(checkpoint), '--opt', str(yml), '-o', 'int8.mssr', '--dtype', 'int8']
    assert main([*packing, '--metadata', 'license=CC0-1.0', '--metadata', 'description=a = b']) == 0
    capsys.readouterr()
    assert main(['info', 'int8.mssr']) == 0
    printed = capsys.readouterr().out
    assert 'values I8' in printed and 'license: CC0-1.0\n' in printed and 'description: a = b\n' in printed
    assert main([*packing, '--metadata', 'license=A', '--metadata', 'license=B']) == 1
    assert "--metadata: found ['license', 'license']; allowed: each key only once" in capsys.readouterr().err
    for wrong in ('license', '=x', 'license=\x1b[2J'):
        with pytest.raises(SystemExit, match='2'):
            main([*packing, '--metadata', wrong])
        assert f'found {wrong!r}; allowed: key=text' in capsys.readouterr().err
    forward = 'experiments/forward/models/net_g_latest.pth'
    assert 'from the forward stage' in call(*mssr, 'pack', forward, '--opt', yml, expect=1)
    plain = models / 'net_g_level1.pth'
    assert 'not of an MSSR network' in call(*mssr, 'pack', plain, '--opt', yml, expect=1)
