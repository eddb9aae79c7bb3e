"""What the scalable file saves: bytes on disk beside what else there is, and the time to grow beside loading anew.

    python scripts/checks/benchmark_file.py [NETWORK...] [--dtypes F32 BF16 I8] [--rounds 30]

NETWORK is a name below, ``all`` of them, or a .mssr file whose values are F32. Networks that are named are newly
built, and pruned by the global magnitude of their weights, level by level as the forward stage does: sizes depend on
the masks, and these on the layers' magnitudes. Times are of the CPU, on one thread.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import safetensors.torch
import torch
import zstandard
from basicsr.archs import build_network

from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.method.criteria import global_magnitude
from mssr_basicsr.scalable.container import ScalableFile
from mssr_basicsr.scalable.extraction import FileTensors
from mssr_basicsr.scalable.header import WEIGHT_DTYPES
from mssr_basicsr.scalable.model import ScalableModel
from mssr_basicsr.scalable.packing import pack
from mssr_basicsr.sparse import ENGINES

NETWORKS: dict[str, dict[str, Any]] = {
    'EDSR-M': {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 16, 'upscale': 2},
    'RCAN': {
        'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_group': 5, 'num_block': 5, 'upscale': 2,
    },
    'RRDBNet': {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 4, 'scale': 2},
    'SRVGGNetCompact': {'type': 'SRVGGNetCompact', 'num_feat': 64, 'num_conv': 16, 'upscale': 2},
    'SwinIR': {
        'type': 'SwinIR', 'upscale': 2, 'img_size': 64, 'window_size': 8, 'embed_dim': 60, 'depths': [6, 6, 6, 6],
        'num_heads': [6, 6, 6, 6], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    },
}  # fmt: skip
SPARSITY = [0, 0.5, 0.75, 0.875, 0.9375]


def newly_pruned(backbone: dict[str, Any]) -> MSSR:
    torch.manual_seed(0)
    network = MSSR(backbone, SPARSITY)
    for level in range(1, len(SPARSITY)):
        network.prune(level, global_magnitude, torch.Generator())
    return network


def of_file(path: Path) -> MSSR:
    with FileTensors(path) as model:
        header = model.header
        if header.dtype != 'F32':
            raise ValueError(f'{path}: found values of {header.dtype}; allowed: F32')
        network = MSSR(header.backbone, [k / len(header.sections) for k in range(len(header.sections))])
        network.backbone.load_state_dict(model.network.state_dict(), strict=False)  # without what it computes
        network.set_level_map(
            {info.name: torch.from_numpy(w.levels()).view(info.shape) for info, w in zip(header.weights, model.weights)}
        )
    return network


def entropy_bound(counts: Sequence[int], candidates: Sequence[int]) -> float:
    """A lower bound in bytes for any code that knows only how many candidates are chosen in each layer.

    ``counts[i]`` of ``candidates[i]``, in any order: the sum of n * H(count / n) over the layers, in bytes.
    """
    bits = 0.0
    for count, n in zip(counts, candidates):
        for share in (count / n, 1 - count / n) if n else ():
            bits -= n * share * math.log2(share) if share else 0
    return bits / 8


def compare_sizes(network: MSSR, dtypes: Sequence[str], folder: Path) -> None:
    """The bytes of the files, their prefixes and their positions, and of the files that one would have without them."""
    levels = range(network.smallest_level + 1)
    dense = safetensors.torch.save(network.export(0))
    pths = [folder / f'level{level}.pth' for level in levels]
    for level, pth in zip(levels, pths):
        torch.save({'params': network.export(level)}, pth)
        with zipfile.ZipFile(f'{pth}.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.write(pth, pth.name)
    rows = [
        ('the dense network alone, safetensors', len(dense)),
        ('the same, zstd -19', len(zstandard.ZstdCompressor(level=19).compress(dense))),
        (f'{len(levels)} BasicSR checkpoints', sum(pth.stat().st_size for pth in pths)),
        (f'{len(levels)} BasicSR checkpoints, zipped', sum(Path(f'{pth}.zip').stat().st_size for pth in pths)),
    ]
    for dtype in dtypes:
        file = folder / f'{dtype}.mssr'
        file.write_bytes(pack(network, 2, dtype=dtype))
        with ScalableFile(file) as reader:
            header = reader.header
            rows.append((f'.mssr {dtype}, all {len(levels)} levels', file.stat().st_size))
            rows += [(f'.mssr {dtype} up to level {s.level}', s.end) for s in reversed(header.sections[:-1])]
            rows.append((f'.mssr {dtype}, header', header.sections[0].start))
    print(f'{sum(p.numel() for p in network.backbone.parameters()):,} parameters')
    for name, size in rows:
        print(f'{name:36} {size:12,} bytes  {size / len(dense):7.4f} x dense')
    bound = sum(entropy_bound(header.section(level).counts, header.candidates(level)) for level in levels)
    print(f'{"entropy of the masks":36} {bound:12,.0f} bytes  {bound / len(dense):7.4f} x dense')


def compare_times(network: MSSR, dtype: str, engine: str, folder: Path, rounds: int) -> None:
    """Growing by one level against building a network and loading the larger level's checkpoint; they take turns."""
    backbone, file = network.backbone_options, folder / f'{dtype}.mssr'
    times: dict[tuple[int, str], list[float]] = {}

    def timed(key: tuple[int, str], work: Callable[[], Any]) -> None:
        gc.collect()
        start = time.process_time()
        work()
        times.setdefault(key, []).append(time.process_time() - start)

    def load(level: int) -> None:
        loaded = torch.load(folder / f'level{level}.pth', map_location='cpu', weights_only=True)
        build_network(backbone).load_state_dict(loaded['params'], strict=True)

    read = {}
    for _ in range(rounds + 1):
        with ScalableModel(file, level=network.smallest_level, engine=engine) as model:
            for level in range(network.smallest_level - 1, -1, -1):
                before = model.file.bytes_read
                timed((level, 'expand'), model.expand)
                read[level] = model.file.bytes_read - before
                timed((level, 'load'), lambda level=level: load(level))  # type: ignore[misc]
            sections = {section.level: section.size for section in model.header.sections}
    for level in range(network.smallest_level - 1, -1, -1):  # the first round warms up
        expand, anew = (1000 * statistics.median(times[level, key][1:]) for key in ('expand', 'load'))
        print(
            f'{dtype}, engine {engine}, level {level + 1} to {level}: {expand:6.2f} ms, {read[level]:,} bytes read '
            f'of a section of {sections[level]:,}; build and load level {level}: {anew:6.2f} ms, {anew / expand:.1f} x'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('networks', nargs='*', default=['EDSR-M'], metavar='NETWORK', help=', '.join(NETWORKS))
    parser.add_argument('--dtypes', nargs='+', choices=WEIGHT_DTYPES, default=['F32', 'BF16', 'I8'])
    parser.add_argument('--rounds', type=int, default=30, help='of the times, whose medians are printed; 0: no times')
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # BasicSR says of each network that it is created
    torch.set_num_threads(1)
    for name in NETWORKS if arguments.networks == ['all'] else arguments.networks:
        network = newly_pruned(NETWORKS[name]) if name in NETWORKS else of_file(Path(name))
        print(f'\n{name}')
        with tempfile.TemporaryDirectory() as temporary:
            compare_sizes(network, arguments.dtypes, Path(temporary))
            for dtype in arguments.dtypes if arguments.rounds else ():
                for engine in ENGINES:
                    compare_times(network, dtype, engine, Path(temporary), arguments.rounds)


if __name__ == '__main__':
    main()
