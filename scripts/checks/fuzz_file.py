"""Corrupts a scalable model file in every way we could think of, and reads it: no wrong weight may come out.

    python scripts/checks/fuzz_file.py [--cases 20000] [--seed 0]

Each case is read to the right bits (a cut behind a section leaves the smaller levels whole), or refused with one
ScalableFileError. Anything else ends the script with status 1: a wrong weight, another exception, more than 10 s of
processor time, or tensors and buffers of more than 4 times the uncorrupted file. Cases that lie have right checksums:
they come from someone who knows the format. Those that sign other positions or values are other models, and their
weights are not compared.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Callable

import torch
import xxhash
import zstandard
from torch.utils._python_dispatch import TorchDispatchMode

from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.commands.info import level_table
from mssr_basicsr.scalable.container import _PREAMBLE, ScalableFile, join_file
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.frames import compress_parts, compress_text, decompress
from mssr_basicsr.scalable.model import ScalableModel
from mssr_basicsr.scalable.packing import pack

EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 16, 'num_block': 2, 'upscale': 2}
LIES: tuple[Any, ...] = (
    -1, 0, 1, 2, 7, 64, 255, 256, 4096, 10**6, 2**31, 2**32, 2**47, 2**63, 10**30, 0.5, 1e308, True, None, '', 'x',
    '../../x', '/etc/passwd', 'F16', 'BF16', 'RRDBNet', [], [[]], {}, [0] * 100, [2**40] * 8, 'a' * 10000,
)  # fmt: skip
SECONDS = 10  # of processor time: a machine that has other work to do is no fault


class TensorBytes(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made while the context is open, however short it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != 'meta':
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def sound_file(dtype: str) -> tuple[bytes, dict[int, dict[str, torch.Tensor]]]:
    """A file, and what each of its levels must be."""
    torch.manual_seed(0)
    network = MSSR(EDSR, [0, 0.5, 0.75, 0.9])
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1])
    level_map = {
        name: torch.multinomial(shares, levels.numel(), replacement=True).to(torch.uint8).view_as(levels)
        for name, levels in network.get_level_map().items()
    }
    network.set_level_map(level_map)
    metrics = {str(level): {'set': {'psnr': 30.0 + level}} for level in range(4)}
    file = pack(network, 2, metrics, dtype, {'license': 'Apache-2.0'})
    if dtype == 'F32':
        return file, {level: network.export(level) for level in range(4)}
    # What int8 makes of the weights, tests say; here the uncorrupted file does.
    return file, {level: ScalableModel(io.BytesIO(file), level).network.state_dict() for level in range(4)}


def fields_and_frames(file: bytes, sound: ScalableFile) -> tuple[Any, list[bytes]]:
    """The header's JSON value, and the frames of the sections."""
    length = _PREAMBLE.unpack(file[: _PREAMBLE.size])[3]
    text = decompress(file[_PREAMBLE.size : _PREAMBLE.size + length], len(file))
    return json.loads(text), [file[section.start : section.end] for section in sound.header.sections]


def signed(fields: Any, frames: list[bytes]) -> bytes:
    """A file with this header and these sections, all lengths and checksums right."""
    for entry, frame in zip(fields['sections'], frames):
        entry.update(bytes=len(frame), xxh64=xxhash.xxh64_hexdigest(frame))
    return join_file(compress_text(json.dumps(fields).encode()), frames)


# ------------------------------ corruptions: (file, its header, random) -> bytes ------------------------------ #


def flip_bits(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    data = bytearray(file)
    # Half of them where the header is: it is short, and most of the reader's decisions hang on it.
    end = len(file) if rng.random() < 0.5 else sound.header.sections[0].start
    for _ in range(rng.choice([1, 1, 1, 2, 8, 100])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    ends = [0, _PREAMBLE.size, sound.header.sections[0].start, *(section.end for section in sound.header.sections)]
    at = rng.choice(ends) + rng.randint(-8, 8) if rng.random() < 0.7 else rng.randrange(len(file))
    return file[: max(0, at)]


def swap_sections(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    parts = [file[section.start : section.end] for section in sound.header.sections]
    first, second = rng.sample(range(len(parts)), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return file[: sound.header.sections[0].start] + b''.join(parts)


def damage_blocks(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(file)), rng.randrange(1, 4000)
    noise = rng.choice([b'', bytes(length), rng.randbytes(length), file[start : start + length] * 2])
    return file[:start] + noise + file[start + length :]


def lie(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    """One or a few values of the header, at any depth, are something else."""
    fields, frames = fields_and_frames(file, sound)
    for _ in range(rng.choice([1, 1, 2, 4])):
        node: Any = fields
        while True:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.1:
                break
            node = node[key]
        change = rng.random()
        if change < 0.1 and isinstance(node, dict):
            del node[key]
        elif change < 0.3 and isinstance(node[key], int):
            node[key] += rng.choice([-1, 1])
        else:
            node[key] = deepcopy(rng.choice(LIES))
        if not fields:
            break
    return join_file(compress_text(json.dumps(fields).encode()), frames)


def reframe(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    """A section has more or fewer bytes, or another frame, than it should, and the header agrees with that."""
    fields, frames = fields_and_frames(file, sound)
    index = rng.randrange(len(frames))
    frame = frames[index]
    content = decompress(frame, len(file) * 4)
    size = rng.choice([1, 2, 63, 64, 5000])
    frames[index] = rng.choice(
        [
            lambda: compress_parts([content[:-size]]),
            lambda: compress_parts([content, rng.randbytes(size)]),
            lambda: compress_parts([content, bytes(rng.choice([10**6, 10**8]))]),
            lambda: compress_parts([]),
            lambda: frame + frame,
            lambda: frame + bytes(size),
            lambda: frame[:-size],
            lambda: b'',
            lambda: zstandard.ZstdCompressor(19).compress(content),
            lambda: zstandard.ZstdCompressor(write_content_size=False).compress(content),
            lambda: zstandard.ZstdCompressor(write_checksum=True).compress(content),
        ]
    )()
    return signed(fields, frames)


def other_model(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    """Bits of a section, or of what its frame holds, are others; checksums are right."""
    fields, frames = fields_and_frames(file, sound)
    index = rng.randrange(len(frames))
    unframed = rng.random() < 0.5
    data = bytearray(decompress(frames[index], len(file) * 4) if unframed else frames[index])
    # Half of them at the start, where the frame says of itself what it is, and then the positions are.
    end = len(data) if rng.random() < 0.5 else max(20, len(data) // 4)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    frames[index] = compress_parts([bytes(data)]) if unframed else bytes(data)
    return signed(fields, frames)


def deep_json(file: bytes, sound: ScalableFile, rng: random.Random) -> bytes:
    depth = rng.choice([10, 1000, 100_000])
    opening, closing = rng.choice([(b'[', b']'), (b'{"a":', b'}'), (b'[],', b'')])
    return join_file(compress_text(opening * depth + rng.choice([b'', b'1' + closing * depth, b'9' * 10_000])), [])


CORRUPTIONS: dict[Callable[[bytes, ScalableFile, random.Random], bytes], int] = {
    flip_bits: 6, cut: 4, swap_sections: 1, damage_blocks: 3, lie: 6, reframe: 2, other_model: 2, deep_json: 1,
}  # fmt: skip


# ------------------------------ the check ------------------------------ #


def read(data: bytes, right: Mapping[int, Mapping[str, torch.Tensor]] | None, limit: int) -> str:
    """What became of one case, as a text; RuntimeError if that is wrong. ``right=None`` allows every weight."""
    began = time.process_time()
    with TensorBytes() as tensors:
        try:
            with ScalableModel(io.BytesIO(data), level=3, engine='torch') as model:
                level_table(model.file.describe()['levels'])
                require_right(model, right)
                outcome = 'read to the last level'
                while model.level > 0:
                    try:
                        model.expand()
                    except ScalableFileError:
                        outcome = f'read to level {model.level}, the rest refused'
                        break
                    finally:  # a section that is refused leaves nothing behind
                        require_right(model, right)
        except ScalableFileError:
            outcome = 'refused'
    if tensors.largest > limit:
        raise RuntimeError(f'a tensor of {tensors.largest:,} bytes')
    took = time.process_time() - began
    if took > SECONDS:
        raise RuntimeError(f'took {took:.1f} s')
    return outcome


def require_right(model: ScalableModel, right: Mapping[int, Mapping[str, torch.Tensor]] | None) -> None:
    """RuntimeError unless the network is, bit for bit, what its level must be."""
    state = model.network.state_dict()
    for name, tensor in (right or {model.level: state})[model.level].items():
        if not torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise RuntimeError(f'level {model.level}: {name} is wrong')


def fuzz(cases: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """How often each corruption ended how, and what went wrong."""
    sound_files = [sound_file(dtype) for dtype in ('F32', 'I8')]
    outcomes: Counter[tuple[str, str]] = Counter()
    faults = []
    for case in range(cases):
        rng = random.Random(f'{seed} {case}')
        file, right = sound_files[case % 2]
        sound = ScalableFile(io.BytesIO(file))
        (corruption,) = rng.choices(list(CORRUPTIONS), list(CORRUPTIONS.values()))
        data = corruption(file, sound, rng)
        # Memory that is not torch's is traced in every 10th case: tracing takes several times as long.
        traced = case % 20 < 2
        if traced:
            tracemalloc.start()
        try:
            wanted = None if corruption is other_model else right
            outcomes[corruption.__name__, read(data, wanted, 4 * len(file))] += 1
        except Exception as error:
            faults.append(f'case {case}, {corruption.__name__}: {type(error).__name__}: {error}')
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            if peak > 4 * max(len(file), len(data)) + (1 << 20):  # the mebibyte: modules, their names, the registry
                faults.append(f'case {case}, {corruption.__name__}: {peak:,} bytes of Python memory')
    return outcomes, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=20000)
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # BasicSR says of each network that it is created
    outcomes, faults = fuzz(arguments.cases, arguments.seed)
    for (corruption, outcome), count in sorted(outcomes.items()):
        print(f'{corruption:18} {outcome:42} {count:6}')
    print(f'{arguments.cases} cases, seed {arguments.seed}: {len(faults)} faults')
    for fault in faults[:20]:
        print(fault)
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
