"""What the scalable file saves: bytes on disk beside what else there is, and the time to grow beside loading anew.

    python scripts/checks/benchmark_file.py [--rounds 30] [--checkpoint net_g_latest.pth --opt YML]

Without a checkpoint the network is EDSR-M x2 (1.37 M parameters), newly built and pruned by the global magnitude of its
weights, level by level as the forward stage does: sizes depend on the masks, and these on the layers' magnitudes.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, Callable

import safetensors.torch
import torch
from basicsr.archs import build_network

from mssr_basicsr.archs.checkpoint import load_checkpoint
from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.method.criteria import global_magnitude
from mssr_basicsr.scalable.container import ScalableFile
from mssr_basicsr.scalable.model import ScalableModel
from mssr_basicsr.scalable.packing import pack
from mssr_basicsr.scalable.positions import entropy_bound

EDSR_M = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 16, 'upscale': 2}
SPARSITY = [0, 0.5, 0.75, 0.875, 0.9375]


def pruned_edsr_m() -> MSSR:
    torch.manual_seed(0)
    network = MSSR(EDSR_M, SPARSITY)
    for level in range(1, len(SPARSITY)):
        network.prune(level, global_magnitude, torch.Generator())
    return network


def compare_sizes(network: MSSR, file: Path, folder: Path) -> None:
    """The bytes of the file, its prefixes and its positions, and of the files that one would have without it."""
    levels = range(network.smallest_level + 1)
    dense = len(safetensors.torch.save(network.export(0)))
    pths = [folder / f'level{level}.pth' for level in levels]
    for level, pth in zip(levels, pths):
        torch.save({'params': network.export(level)}, pth)
        with zipfile.ZipFile(f'{pth}.zip', 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            archive.write(pth, pth.name)
    rows = [
        ('dense network alone, safetensors', dense),
        (f'one .mssr, all {len(levels)} levels', file.stat().st_size),
        (f'{len(levels)} BasicSR checkpoints', sum(pth.stat().st_size for pth in pths)),
        (f'{len(levels)} BasicSR checkpoints, zipped', sum(Path(f'{pth}.zip').stat().st_size for pth in pths)),
    ]
    with ScalableFile(file) as reader:
        header = reader.header
        coded = {level: reader.read_section(level)['positions'].numel() for level in levels}
    rows += [(f'.mssr up to level {s.level}', s.end) for s in header.sections]
    print(f'{sum(p.numel() for p in network.backbone.parameters()):,} parameters')
    for name, size in rows:
        print(f'{name:36} {size:12,} bytes  {size / dense:7.4f} x dense')
    bounds = {level: entropy_bound(header.section(level).counts, header.candidates(level)) for level in levels}
    for level in reversed(levels):
        share = f'{coded[level] / bounds[level] - 1:+.2%}' if bounds[level] else 'nothing to say'
        print(
            f'positions of level {level}: {coded[level]:9,} bytes, entropy of the masks {bounds[level]:11,.0f}  {share}'
        )
    print(f'positions in all: {sum(coded.values()):,} bytes, {sum(coded.values()) / sum(bounds.values()) - 1:+.2%}')


def compare_times(network: MSSR, file: Path, folder: Path, rounds: int) -> None:
    """Growing by one level against building a network and loading the larger level's checkpoint; they take turns."""
    backbone = network.backbone_options
    times: dict[tuple[int, str], list[float]] = {}

    def timed(key: tuple[int, str], work: Callable[[], Any]) -> None:
        gc.collect()
        start = time.perf_counter()
        work()
        times.setdefault(key, []).append(time.perf_counter() - start)

    def load(level: int) -> None:
        loaded = torch.load(folder / f'level{level}.pth', map_location='cpu', weights_only=True)
        build_network(backbone).load_state_dict(loaded['params'], strict=True)

    read = {}
    for _ in range(rounds + 1):
        with ScalableModel(file, level=network.smallest_level) as model:
            for level in range(network.smallest_level - 1, -1, -1):
                before = model.file.bytes_read
                timed((level, 'expand'), model.expand)
                read[level] = model.file.bytes_read - before
                timed((level, 'load'), lambda level=level: load(level))  # type: ignore[misc]
            sections = {section.level: section.size for section in model.header.sections}
    for level in range(network.smallest_level - 1, -1, -1):  # the first round warms up
        expand, anew = (1000 * statistics.median(times[level, key][1:]) for key in ('expand', 'load'))
        print(
            f'level {level + 1} to {level}: {expand:6.2f} ms, {read[level]:,} bytes read of a section of '
            f'{sections[level]:,}; build and load level {level}: {anew:6.2f} ms, {anew / expand:.1f} x'
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=30, help='of the times; medians are printed')
    parser.add_argument('--checkpoint', type=Path)
    parser.add_argument('--opt', type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # BasicSR says of each network that it is created
    network = load_checkpoint(arguments.checkpoint, arguments.opt)[0] if arguments.checkpoint else pruned_edsr_m()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / 'model.mssr').write_bytes(pack(network, 2))
        compare_sizes(network, folder / 'model.mssr', folder)
        compare_times(network, folder / 'model.mssr', folder, arguments.rounds)


if __name__ == '__main__':
    main()
