"""How an image may be cut into tiles, of which the network makes the same as of the whole image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mssr_basicsr.foundation.checks import first_line
from mssr_basicsr.scalable.architectures import ImageSpec

_FARTHEST = 1024  # a network that looks farther than this, in input pixels, is taken to look everywhere
_PERIODS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)  # that are tried
_LOOKS_EVERYWHERE = 'looks at the whole image for each pixel'
_COMPARED = 32  # input pixels along an image, at least, of which the results are compared


class Span(NamedTuple):
    """A tile, along one axis."""

    start: int  #: of the tile in the input
    window: slice  #: of the input: the tile with its surroundings, which the network gets
    inner: slice  #: the tile in the network's output


class Tiling(NamedTuple):
    """Where tiles may be cut, and what of their surroundings the network must see."""

    period: int  #: tiles start and end at multiples of it, as the network's own grid does (strides, pooling, windows)
    reach: int  #: how many input pixels beyond a tile influence it, a multiple of the period

    def spans(self, length: int, side: int, scale: int) -> list[Span]:
        """Equally large tiles of about ``side`` input pixels along an axis of ``length``."""
        even = -(-length // -(-length // side))
        even = -(-even // self.period) * self.period
        spans = []
        for start in range(0, length, even):
            end = min(start + even, length)
            # Where the window ends at the image's edge, the network sees the edge as it does in the whole image.
            first = max(start - self.reach, 0)
            inner = slice((start - first) * scale, (end - first) * scale)
            spans.append(Span(start, slice(first, end + self.reach), inner))
        return spans


class TilingFinder:
    """Finds out how images may be cut, by running the network on narrow ones; and nothing twice.

    Args:
        run: the network, from (1, C, H, W) to the same in float32 on the CPU.
        spec: what images it takes.
        tolerance: the difference, relative to the largest value, up to which results are the same.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], spec: ImageSpec, tolerance: float) -> None:
        self._run, self._spec, self._tolerance = run, spec, tolerance
        self._agreeing: dict[tuple[int, int], bool] = {}
        self._across = 0  # pixels of the narrow side of the images

    @cached_property
    def tiling(self) -> Tiling | str:
        """With the smallest period, for images of whole periods; or the reason why the network takes only whole ones.

        The reason completes a sentence that begins with the network's name.
        """
        m = self._spec.multiple
        found: Tiling | str = ''
        # Wide images cost six times as much, and few networks need them (to mirror an edge, for one).
        for self._across in (2 * m, (13 if m < 8 else 3) * m):
            found = self._search()
            if isinstance(found, Tiling) or found == _LOOKS_EVERYWHERE:
                break
        return found

    def _search(self) -> Tiling | str:
        m = self._spec.multiple
        reason, reach = 'makes something else of a part of an image', 14 * m
        for period in sorted({m, *(period for period in _PERIODS if period % m == 0)}):
            try:
                reach = self._reach(2, period, reach)
                if reach <= _FARTHEST:
                    reach = max(reach, self._reach(3, period, reach))
                if reach > _FARTHEST:
                    return _LOOKS_EVERYWHERE
                if all(self._agrees(axis, Tiling(period, reach), 0) for axis in (2, 3)):
                    return Tiling(period, reach)
            except Exception as error:  # whatever a network raises of what it does not take
                reason = f'cannot be run on parts of an image ({first_line(error)})'
        return reason

    def tiling_of(self, height: int, width: int) -> Tiling | str:
        """The same for images of that size, which need not be whole periods."""
        tiling = self.tiling
        if isinstance(tiling, str):
            return tiling
        for axis, length in ((2, height), (3, width)):
            rest = length % tiling.period
            if (axis, rest) not in self._agreeing:
                try:
                    self._agreeing[axis, rest] = rest == 0 or self._agrees(axis, tiling, rest)
                except Exception:  # whatever it raises of this size
                    self._agreeing[axis, rest] = False
            if not self._agreeing[axis, rest]:
                return f'makes something else of a part of an image whose sides are no multiples of {tiling.period}'
        return tiling

    def _reach(self, axis: int, period: int, expected: int) -> int:
        """How far the network looks, found with NaN in the input: what it can influence is NaN, whatever the weights.

        The NaN fills a whole period, so that they are at each place of the network's grid. ``expected`` is how far it
        looks at least, or seldom less.
        """
        s = self._spec.scale
        half = (-(-expected // period) + 2) * period
        while half <= 2 * _FARTHEST:
            x = self._image(axis, 2 * half)
            x.narrow(axis, half, period).fill_(torch.nan)
            touched = self._run(x).isnan()[0].any(0).any(3 - axis).nonzero().flatten()
            first, last = int(touched[0]) // s, int(touched[-1]) // s
            farthest = max(half - first, last - (half + period - 1))
            farthest = -(-farthest // period) * period
            if period > 1:
                # A network may mirror the image to whole periods, at its bottom and right edges. What it mirrors there,
                # less than a period, must be in the window of the last tile, however small that is.
                farthest = max(farthest, period)
            if farthest < half - period:
                return farthest
            half *= 2
        return 2 * _FARTHEST

    def _agrees(self, axis: int, tiling: Tiling, rest: int) -> bool:
        """Whether an image, ``rest`` pixels longer than whole periods, gives the same whole and cut at such periods.

        Compared are its values where it is cut after one period, before the last one, and as late as tiles are: the
        network is the same one period farther on, and so at any.
        """
        period, reach = tiling
        s, periods = self._spec.scale, -(-(reach + _COMPARED) // period) + 2
        length = periods * period + rest
        x = self._image(axis, length)
        whole = self._run(x)
        allowed = self._tolerance * whole.abs().max()
        last = (periods - 1) * period
        for start, end in ((period, length), (last - reach, length), (0, last)):
            first, behind = start + reach if start else 0, end if end == length else end - reach
            part = self._run(x.narrow(axis, start, end - start))
            found = part.narrow(axis, (first - start) * s, (behind - first) * s)
            if not (found - whole.narrow(axis, first * s, (behind - first) * s)).abs().max() <= allowed:
                return False
        return True

    def _image(self, axis: int, length: int) -> Tensor:
        """Noise, ``length`` pixels along the axis and few along the other."""
        shape = [1, self._spec.channels, self._across, self._across]
        shape[axis] = length
        return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device='cpu')
