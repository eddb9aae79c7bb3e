"""Which layers the kernel runs faster than torch: measured by scripts/checks/measure_table.py, not guessed."""

from __future__ import annotations

# Kernel size: (channels, the largest share of kept weights at which the kernel is as fast), for layers of at least so
# many channels on both sides. AMD EPYC (Zen 4), AVX-512, one thread.
_LARGEST_DENSITY = {3: ((48, 0.6), (32, 0.65), (0, 1.0)), 1: ((48, 0.25), (0, 0.0))}


def is_small(in_channels: int, out_channels: int, kernel_size: int) -> bool:
    """Whether a layer is so cheap that the kernel runs it, dense or not, along with the others."""
    return kernel_size == 3 and min(in_channels, out_channels) <= 16


def prefers_sparse(in_channels: int, out_channels: int, kernel_size: int, density: float) -> bool:
    """Whether a layer of this shape and density should be in sparse form."""
    narrower = min(in_channels, out_channels)
    largest = next(share for channels, share in _LARGEST_DENSITY[kernel_size] if narrower >= channels)
    return density <= min(largest, 0.9)  # a nearly dense layer is smaller as a dense one: 4 bytes a weight, not 7
