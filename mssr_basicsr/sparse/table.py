"""Which layers the kernel runs faster than torch: measured by scripts/checks/measure_table.py, not guessed."""

from __future__ import annotations


def is_small(in_channels: int, out_channels: int) -> bool:
    """Whether a layer is a network's first or last: little work, and between layers that the kernel runs."""
    return min(in_channels, out_channels) <= 16


def prefers_sparse(in_channels: int, out_channels: int, kernel_size: int, density: float) -> bool:
    """Whether a layer of this shape and share of kept weights is to be in the sparse form."""
    return is_small(in_channels, out_channels) or density <= 0.7
