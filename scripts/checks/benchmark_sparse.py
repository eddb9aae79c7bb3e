"""The sparse runtime against torch's dense network, its better layout, and ONNX Runtime: random masks, whole networks.

    python scripts/checks/benchmark_sparse.py [--networks 8x32 EDSR-M ...] [--size 320x180] [--threads 1] [--rounds 9]

The engines take turns; medians of the wall clock, or with ``--cpu`` of processor time, for a machine that has other
work (one thread only). For AVX2 alone: ``MSSR_SIMD=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2``.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from basicsr.archs import build_network
from torch import nn

from mssr_basicsr.scalable.measuring import calm_down
from mssr_basicsr.sparse.layers import ABSENT, SparseConv2d, eligible, make_sparse
from mssr_basicsr.sparse.library import engine_name
from mssr_basicsr.sparse.network import accelerate
from mssr_basicsr.sparse.table import prefers_sparse

EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'upscale': 2}
NETWORKS: dict[str, dict[str, Any]] = {
    '8x32': {**EDSR, 'num_feat': 32, 'num_block': 8},
    'EDSR-M': {**EDSR, 'num_feat': 64, 'num_block': 16},
    'MSRResNet': {'type': 'MSRResNet', 'upscale': 2},
    'RCAN': {'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_group': 2, 'num_block': 8, 'upscale': 2},
    'RRDBNet': {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 4, 'scale': 4},
    'SRVGGNetCompact': {'type': 'SRVGGNetCompact', 'upscale': 2},
    'SwinIR': {
        'type': 'SwinIR', 'upscale': 2, 'img_size': 64, 'window_size': 8, 'embed_dim': 60, 'depths': [6, 6, 6, 6],
        'num_heads': [6, 6, 6, 6], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    },
}  # fmt: skip


def sparsified(network: nn.Module, density: float) -> nn.Module:
    """A copy in the sparse form, after random weights of the convolutions of ``network`` became zero."""
    random = np.random.default_rng(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and eligible(layer):
            layer.weight.data *= torch.from_numpy(random.random(layer.weight.shape) < density)
    sparse = copy.deepcopy(network)
    for layer in sparse.modules():
        if isinstance(layer, nn.Conv2d) and eligible(layer):
            weight = layer.weight.detach().numpy().ravel()
            if prefers_sparse(layer.in_channels, layer.out_channels, layer.kernel_size[0], density):
                make_sparse(layer, weight, np.where(weight, 0, ABSENT).astype(np.uint8))
    accelerate(sparse)
    return sparse


def onnx_runtime(network: nn.Module, x: torch.Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'network.onnx'))
        torch.onnx.export(network, (x,), path, input_names=['x'], dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, options)
    return lambda: session.run(None, {'x': x.numpy()})


@torch.no_grad()
def compare(name: str, density: float, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dense = build_network(NETWORKS[name]).eval()
    sparse = sparsified(dense, density)
    width, height = (int(side) // 8 * 8 if name == 'SwinIR' else int(side) for side in arguments.size.split('x'))
    x = torch.rand(1, 3, height, width)
    last, dense_last = x.contiguous(memory_format=torch.channels_last), copy.deepcopy(dense)
    dense_last.to(memory_format=torch.channels_last)
    error = (sparse(x) - dense(x)).abs().max() / dense(x).abs().max()
    works = {'sparse': lambda: sparse(x), 'default': lambda: dense(x), 'channels-last': lambda: dense_last(last)}
    if arguments.onnx:
        works['onnxruntime'] = onnx_runtime(dense, x, arguments.threads)
    clock = time.process_time if arguments.cpu else time.perf_counter
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(arguments.rounds + 1):
        for key, work in works.items():
            calm_down()
            start = clock()
            work()
            times[key].append(1000 * (clock() - start))
    medians = {key: statistics.median(values[1:]) for key, values in times.items()}  # the first warms up
    ours = medians['sparse']
    held = sum(layer.kept.nbytes for layer in sparse.modules() if isinstance(layer, SparseConv2d))
    others = ''.join(
        f'  {key} {value:.1f} ms ({value / ours:.2f}x)' for key, value in medians.items() if key != 'sparse'
    )
    best = min(medians['default'], medians['channels-last'])
    print(
        f'{name} {1 - density:.2%}: {best / ours:.2f} times faster; {ours:.1f} ms{others}; '
        f'sparse weights {held / 1e6:.2f} MB, relative error {error:.1e}',
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument('--densities', nargs='+', type=float, default=[0.5, 0.25, 0.125, 0.0625])
    parser.add_argument('--size', default='320x180')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--cpu', action='store_true')
    parser.add_argument('--onnx', action='store_true')
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # BasicSR says of each network that it is created
    torch.set_num_threads(arguments.threads)
    print(engine_name())
    for name in arguments.networks:
        for density in arguments.densities:
            compare(name, density, arguments)


if __name__ == '__main__':
    main()
