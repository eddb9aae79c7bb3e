"""The compiled kernel: whether it was built, and which vector width this processor supports."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

MAX_INPUTS = 8
CONVOLUTION, SUM, NEAREST, PACK, UNPACK = range(5)  # enum kind
NONE, RELU, SLOPE = range(3)  # enum activation

_FILE = Path(__file__).with_name('kernel.so')
_WIDTHS = ('avx512', 'avx2', 'plain')  # the widest first


class Value(ctypes.Structure):
    """``struct value`` of kernel.c."""

    _fields_ = (
        ('data', ctypes.c_void_p),
        ('channels', ctypes.c_int32),
        ('height', ctypes.c_int32),
        ('width', ctypes.c_int32),
        ('vectors', ctypes.c_int32),
        ('rows', ctypes.c_int32),
    )


class Operation(ctypes.Structure):
    """``struct operation`` of kernel.c."""

    _fields_ = (
        ('kind', ctypes.c_int32),
        ('inputs', ctypes.c_int32),
        ('input', ctypes.c_void_p * MAX_INPUTS),
        ('residual', ctypes.c_void_p),
        ('output', ctypes.c_void_p),
        ('image', ctypes.c_void_p),
        ('weights', ctypes.c_void_p),
        ('offset', ctypes.c_void_p),
        ('start', ctypes.c_void_p),
        ('bias', ctypes.c_void_p),
        ('slope', ctypes.c_void_p),
        ('in_channels', ctypes.c_int32),
        ('out_channels', ctypes.c_int32),
        ('block', ctypes.c_int32),
        ('activation', ctypes.c_int32),
        ('factor', ctypes.c_int32),
        ('scale', ctypes.c_float),
    )


class Kernel(NamedTuple):
    """The kernel for one vector width."""

    simd: str  #: avx512, avx2 or plain (which is NEON on ARM, and SSE2 on other x86)
    run: Any  #: mssr_run
    lanes: int  #: floats in a vector
    rows: int  #: of a tile
    vectors: int  #: of a row of a tile
    gap: int  #: vectors between the rows of a value in memory

    @property
    def block(self) -> int:
        """How many input channels of a tile are processed at a time; others were measured to be slower."""
        vectors = (self.rows + 2) * (self.vectors + 2)
        return max(1, 50 * 1024 // (vectors * self.lanes * 4))


@functools.cache
def kernel() -> Kernel | None:
    """The kernel for this processor, or None if it was not built or not for this platform.

    ``MSSR_SIMD`` in the environment (``avx2``, ``plain``) selects a narrower one.

    Raises:
        ValueError: ``MSSR_SIMD`` selects what the processor does not support.
    """
    try:
        library = ctypes.CDLL(os.fspath(_FILE))
    except OSError:
        return None
    built = [name for name in _WIDTHS if hasattr(library, f'mssr_run_{name}')]
    allowed = [name for name in built if getattr(library, f'mssr_supported_{name}')()]
    simd = os.environ.get('MSSR_SIMD') or allowed[0]
    if simd not in allowed:
        raise ValueError(f'MSSR_SIMD: found {simd!r}; allowed: {", ".join(allowed)}')
    shape = (ctypes.c_int32 * 4)()
    getattr(library, f'mssr_tile_{simd}')(shape)
    run = getattr(library, f'mssr_run_{simd}')
    run.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    run.restype = ctypes.c_int
    return Kernel(simd, run, *shape)


def engine_name() -> str:
    """What convolutions of sparse levels run on, in readable form."""
    found = kernel()
    if found is None:
        return 'torch (the sparse runtime was not built here)'
    return f'sparse ({found.simd})'
