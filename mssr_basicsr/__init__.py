"""MSSR for BasicSR: one super-resolution network that holds many smaller ones, nested inside each other.

``from mssr_basicsr import ScalableModel`` (or one of the other names below) imports what it needs at that moment: the
order of imports does not matter, and ``import mssr_basicsr`` alone costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mssr_basicsr.archs.checkpoint import load_checkpoint as load_checkpoint
    from mssr_basicsr.scalable.architectures import register_architecture as register_architecture
    from mssr_basicsr.scalable.container import ScalableFile as ScalableFile
    from mssr_basicsr.scalable.errors import ScalableFileError as ScalableFileError
    from mssr_basicsr.scalable.evaluation import evaluate as evaluate
    from mssr_basicsr.scalable.exporting import to_onnx as to_onnx
    from mssr_basicsr.scalable.extraction import extract as extract
    from mssr_basicsr.scalable.extraction import level_state as level_state
    from mssr_basicsr.scalable.extraction import verify as verify
    from mssr_basicsr.scalable.model import ScalableModel as ScalableModel
    from mssr_basicsr.scalable.packing import pack as pack
    from mssr_basicsr.scalable.plotting import plot as plot

__version__ = '0.1.0'

_HOMES = {
    'ScalableFile': 'mssr_basicsr.scalable.container',
    'ScalableFileError': 'mssr_basicsr.scalable.errors',
    'ScalableModel': 'mssr_basicsr.scalable.model',
    'evaluate': 'mssr_basicsr.scalable.evaluation',
    'extract': 'mssr_basicsr.scalable.extraction',
    'level_state': 'mssr_basicsr.scalable.extraction',
    'load_checkpoint': 'mssr_basicsr.archs.checkpoint',
    'pack': 'mssr_basicsr.scalable.packing',
    'plot': 'mssr_basicsr.scalable.plotting',
    'register_architecture': 'mssr_basicsr.scalable.architectures',
    'to_onnx': 'mssr_basicsr.scalable.exporting',
    'verify': 'mssr_basicsr.scalable.extraction',
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
