"""``mssr export``: a level as an ONNX model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

HELP = 'one level as an ONNX model'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('--onnx', type=Path, required=True, help='the file to write')
    parser.add_argument('--level', type=int, help='default: the largest that is there')
    parser.add_argument('--opset', type=int, help="default: the current one of torch's exporter")


def run(arguments: argparse.Namespace) -> int:
    """``mssr export``: a level as an ONNX model of any height and width."""
    import torch

    from mssr_basicsr import ScalableModel
    from mssr_basicsr.foundation.saving import write_whole

    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError as error:
        raise ValueError(f'{error.name} is needed: pip install "mssr-basicsr[onnx]"') from error
    with ScalableModel(arguments.file, arguments.level, engine='torch') as model:
        network, level, upscaler = model.network, model.level, model.upscaler
    example = torch.rand(1, upscaler.channels, 2 * max(8, upscaler.multiple), 3 * max(8, upscaler.multiple))
    any_size = torch.export.Dim.DYNAMIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'level.onnx')
        torch.onnx.export(
            network,
            (example,),
            path,
            input_names=['input'],
            output_names=['output'],
            dynamic_shapes=({2: any_size, 3: any_size},),
            opset_version=arguments.opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        opset = onnx.load(path).opset_import[0].version
        write_whole(arguments.onnx, path.read_bytes())
    size = f'; height and width must be multiples of {upscaler.multiple}' if upscaler.multiple > 1 else ''
    print(f'{arguments.onnx}: level {level}, opset {opset}, float32 RGB in [0, 1], (1, C, H, W){size}')
    return 0
