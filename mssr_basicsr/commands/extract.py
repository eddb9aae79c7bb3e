"""``mssr extract``: one level, or a smaller file."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

HELP = 'one level as a plain checkpoint, or a smaller .mssr'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE.mssr', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='ends in .pth, .safetensors or .mssr')
    parser.add_argument('--level', type=int, help='default: the largest that is there')
    parser.add_argument('--spandrel', action='store_true', help='names of tensors that spandrel knows (for RCAN)')


def run(arguments: argparse.Namespace) -> int:
    """``mssr extract``: a level as a plain checkpoint, or the levels from it on down as a smaller ``.mssr``."""
    import safetensors.torch
    import torch

    from mssr_basicsr import ScalableModel
    from mssr_basicsr.foundation.saving import write_whole
    from mssr_basicsr.scalable.spandrel_names import for_spandrel

    output: Path = arguments.output
    if output.suffix not in ('.pth', '.safetensors', '.mssr'):
        raise ValueError(f'--output: found {output}; allowed: a name that ends in .pth, .safetensors or .mssr')
    with ScalableModel(arguments.file, arguments.level, engine='torch') as model:
        level, state = model.level, model.network.state_dict()
        what = f'level {level}'
        if arguments.spandrel:
            state = for_spandrel(state, model.header.backbone)
        if output.suffix == '.mssr':
            data = model.file.read_prefix(level)
            what = f'levels {level} to {model.header.smallest_level}'
        elif output.suffix == '.safetensors':
            data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        else:
            buffer = io.BytesIO()
            torch.save({'params': state}, buffer)
            data = buffer.getvalue()
    write_whole(output, data)
    print(f'{output}: {what}, {len(data):,} bytes')
    return 0
