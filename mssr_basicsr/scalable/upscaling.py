"""Upscaling images of any size and kind with a network, in tiles so that memory stays bounded."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.scalable.architectures import ImageSpec, find_image_spec, reference_tensor
from mssr_basicsr.scalable.pixels import Image, check_values, to_depth, white
from mssr_basicsr.scalable.tiling import Span, Tiling, TilingFinder
from mssr_basicsr.sparse.network import state_of_weights

_SMALL = 128**2  # input pixels; what has no more is upscaled whole, however far the network looks
_LARGEST_TILE = 512  # input pixels


class Upscaler:
    """Feeds images to an SR network as BasicSR does: RGB in [0, 1], (1, C, H, W).

    Args:
        network: the backbone, on any device.
        options: its options, with its type.
        scale: its upscaling factor.
    """

    def __init__(self, network: nn.Module, options: Mapping[str, Any], scale: int) -> None:
        self.network = network
        self.scale = scale
        self._options = options
        self._finder: TilingFinder | None = None
        self._state: list[Any] = []

    @cached_property
    def spec(self) -> ImageSpec:
        """What images the network takes; ValueError if it takes none, or upscales by a different factor."""
        spec = find_image_spec(self.network, self._options)
        if spec.scale != self.scale:
            raise OptionError('scale', self.scale, f'{spec.scale}, the factor by which the network upscales')
        return spec

    @property
    def channels(self) -> int:
        """The number of channels of the network's images, 1 or 3."""
        return self.spec.channels

    @property
    def multiple(self) -> int:
        """The number that height and width of the network's input must be multiples of."""
        return self.spec.multiple

    @torch.no_grad()
    def upscale(
        self,
        image: Image,
        tile: int | None = None,
        bgr: bool = False,
        progress: Callable[[list[Any]], Iterable[Any]] = iter,
    ) -> Image:
        """Upscale one image.

        Args:
            image: (H, W) or (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3) colour, (H, W, 4) colour and alpha;
                uint8, uint16 or float32 from 0 to 1. Alpha is upscaled bicubically, so that opaque areas stay
                opaque (our choice).
            tile: tile size in input pixels; 0 for no tiles. Tiles overlap by the network's receptive field and are cut
                along its own grid, so that their size only affects rounding. Default: see :meth:`automatic_tile`; none
                where that is not possible.
            bgr: whether the channel order is OpenCV's.
            progress: called with the list of tiles to iterate over, such as ``tqdm``.

        Returns:
            The image, ``scale`` times as high and wide, of the same dtype and number of channels.

        Raises:
            ValueError: another kind of image; tiles where they would change the image; or a network whose output is not
                finite.
        """
        if image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(f'image: found the shape {image.shape}; allowed: (H, W) or (H, W, 1 to 4)')
        planes: Image = image[..., None] if image.ndim == 2 else image
        height, width, channels = planes.shape
        if channels > 4:
            raise ValueError(f'image: found {channels} channels; allowed: 1 (grey), 3 (colour), and one more for alpha')
        check_values(image)
        multiple = self.multiple  # first, since it refuses a wrong scale, by which memory would be taken
        s, colours = self.scale, channels - (channels in (2, 4))
        result = np.empty((height * s, width * s, channels), image.dtype)
        if colours < channels:
            result[..., -1] = _resized_alpha(planes[..., -1], width * s, height * s)
        padded = _pad(planes[..., :colours], -height % multiple, -width % multiple)
        if bgr and colours == 3:
            padded = padded[..., ::-1]
        for rows, columns in progress(self._tiles(padded.shape[0], padded.shape[1], tile)):
            part = np.ascontiguousarray(padded[rows.window, columns.window])
            found = self._upscale_colours(part)[rows.inner, columns.inner]
            found = found[..., ::-1] if bgr and colours == 3 else found
            target = result[rows.start * s :, columns.start * s :, :colours][: found.shape[0], : found.shape[1]]
            target[...] = found[: target.shape[0], : target.shape[1]]  # without the padding
        return result[..., 0] if image.ndim == 2 else result

    def _upscale_colours(self, part: Image) -> Image:
        """(H, W, 1 or 3) to its (scale H, scale W, same), of the same dtype."""
        white_value = white(part.dtype)
        # What surrounds the network is numpy's: threads of torch's OpenMP would go on spinning, beside the kernel's.
        x = torch.from_numpy(np.ascontiguousarray(part.transpose(2, 0, 1), np.float32) / np.float32(white_value))
        if x.shape[0] == self.channels:
            y = self._run(x[None])[0]
        elif self.channels == 1:  # a network for grey images upscales each channel
            y = self._run(x[:, None])[:, 0]
        else:  # a grey image goes through a colour network as equal channels, and comes back as their luma
            red, green, blue = self._run(x.expand(3, -1, -1)[None])[0]
            y = (0.299 * red + 0.587 * green + 0.114 * blue)[None]
        found: Image = y.numpy()
        if not np.isfinite(found).all():
            raise ValueError(f'{type(self.network).__name__}: outputs values that are not finite (NaN or infinity)')
        found = found.clip(0, 1) * np.float32(white_value)
        if part.dtype.name != 'float32':  # of either byte order
            np.rint(found, out=found)
        return found.transpose(1, 2, 0).astype(part.dtype)

    def automatic_tile(self) -> int | None:
        """The default side of tiles in input pixels, None if the network takes only whole images (our choice).

        As large as possible while a tile's largest feature map fits the processor's last-level cache. But at least 12
        times as wide as the network looks beyond a tile, so that computing overlaps more than once costs at most about
        a third; and at most 512, which bounds the memory. On devices other than a CPU, 512.
        """
        reach = self.reach()
        if reach is None:
            return None
        if reference_tensor(self.network).device.type != 'cpu':
            return _LARGEST_TILE
        # A convolution in the sparse form has no parameter that would tell.
        convolutions = [module.in_channels for module in self.network.modules() if isinstance(module, nn.Conv2d)]
        others = [parameter.shape[1] for parameter in self.network.parameters() if parameter.ndim > 1]
        features = max((*convolutions, *others), default=self.channels)
        in_cache = math.isqrt(_last_cache() // (4 * features * self.scale**2)) - 2 * reach
        return min(max(in_cache, 12 * reach, 16), _LARGEST_TILE)

    @torch.no_grad()
    def reach(self) -> int | None:
        """How many input pixels beyond a tile influence it; None if the network takes only whole images."""
        tiling = self._tilings().tiling
        return tiling.reach if isinstance(tiling, Tiling) else None

    def _tilings(self) -> TilingFinder:
        """What is known of tiles, as long as the weights stay: a level may have a part that smaller ones lack."""
        state = state_of_weights(self.network)
        if self._finder is None or state != self._state:
            run: Callable[[Tensor], Tensor] = self._run
            if reference_tensor(self.network).dtype != torch.float32:  # whose rounding would hide a grid
                run = functools.partial(_run, copy.deepcopy(self.network).float())
            finder = TilingFinder(run, self.spec, tolerance=1e-3)  # which changes at most the last of 8 bits
            # In this order, since another thread may upscale at the same time.
            self._finder, self._state = finder, state
        return self._finder

    def _tiles(self, height: int, width: int, tile: int | None) -> list[tuple[Span, Span]]:
        """The rows and columns of each tile of an image of that size, which the network gets one by one."""
        whole = [(Span(0, slice(None), slice(None)), Span(0, slice(None), slice(None)))]
        if tile == 0 or (tile is None and height * width <= _SMALL):
            return whole
        if tile is not None and tile < 1:
            raise OptionError('tile', tile, '0 (none) or the side of tiles in pixels')
        if tile is not None and tile >= max(height, width):
            return whole
        tiling = self._tilings().tiling_of(height, width)
        side = self.automatic_tile() if tile is None else tile
        if isinstance(tiling, str) or side is None:
            if tile is None:
                return whole
            raise OptionError('tile', tile, f'0, since {type(self.network).__name__} {tiling}')
        if tile is None and height * width <= (side + 2 * tiling.reach) ** 2:
            return whole
        vertical, horizontal = (tiling.spans(length, side, self.scale) for length in (height, width))
        return [(rows, columns) for rows in vertical for columns in horizontal]

    def _run(self, x: Tensor) -> Tensor:
        before = state_of_weights(self.network)
        result = _run(self.network, x)
        if before == self._state:  # what a network such as SPAN changes while it runs is no change to the tiles
            self._state = state_of_weights(self.network)
        return result


def _run(network: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = network(x.to(reference_tensor(network))).float().cpu()
    return result


def _pad(image: Image, bottom: int, right: int) -> Image:
    """Mirror rows at the bottom and columns at the right, or repeat the last if there are too few to mirror."""
    if bottom or right:
        enough = bottom < image.shape[0] and right < image.shape[1]
        return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode='reflect' if enough else 'edge')
    return image


def _resized_alpha(alpha: Image, width: int, height: int) -> Image:
    resized: Image = cv2.resize(to_depth(alpha, np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return to_depth(resized.clip(0, 1), alpha.dtype)


@functools.lru_cache
def _last_cache() -> int:
    """Bytes of the processor's largest cache if the system says so, otherwise a typical size."""
    units = {'K': 2**10, 'M': 2**20, 'G': 2**30}
    sizes = []
    for file in Path('/sys/devices/system/cpu/cpu0/cache').glob('index*/size'):
        try:
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            pass
    return max(sizes, default=16 * 2**20)
