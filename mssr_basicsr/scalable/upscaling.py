"""Upscaling images of any size and kind with a network, in tiles where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Image = npt.NDArray[Any]

_AUTOMATIC_TILE = 512  # input pixels; images of up to four such tiles are upscaled whole
_FARTHEST = 1024  # a network that looks farther than this, in input pixels, is taken to look everywhere


class Upscaler:
    """Feeds images to an SR network as BasicSR does: RGB in [0, 1], (1, C, H, W).

    Args:
        network: the backbone, on any device.
        options: its options: the number of channels and the window size are read from these.
        scale: its upscaling factor.
    """

    def __init__(self, network: nn.Module, options: Mapping[str, Any], scale: int) -> None:
        self.network = network
        self.scale = scale
        self.channels = int(options.get('num_in_ch', options.get('in_chans', 3)))
        unshuffled = {1: 4, 2: 2}.get(scale, 1) if options['type'] == 'RRDBNet' else 1
        #: What height and width of the network's input must be multiples of.
        self.multiple = int(options.get('window_size', unshuffled))
        self._reach: int | None = None

    def upscale(
        self,
        image: Image,
        tile: int | None = None,
        bgr: bool = False,
        progress: Callable[[list[Any]], Iterable[Any]] = iter,
    ) -> Image:
        """Upscale one image.

        Args:
            image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, uint16 or float32 in [0, 1]; the fourth channel is
                alpha, upscaled bicubically so that what is opaque stays opaque (our choice).
            tile: side of the tiles in input pixels; 0 for none. Tiles overlap as far as the network looks, so that
                their size makes no difference. Default: 512 where the image is larger than 1024 x 1024.
            bgr: whether the channels are in the order of OpenCV.
            progress: is given the list of tiles to go through, such as ``tqdm``.

        Returns:
            The image, ``scale`` times as high and wide, of the same dtype and number of channels.

        Raises:
            ValueError: an image of another kind; or tiles of a network that looks at the whole image.
        """
        if image.dtype not in (np.uint8, np.uint16, np.float32) or image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(f'image: found {image.dtype} {image.shape}; allowed: uint8, uint16, float32 (H, W[, C])')
        planes: Image = image[..., None] if image.ndim == 2 else image
        if planes.shape[2] not in (1, 3, 4):
            raise ValueError(f'image: found {planes.shape[2]} channels; allowed: 1 (grey), 3 (colour), 4 (with alpha)')
        top: float = {1: 255, 2: 65535, 4: 1}[image.dtype.itemsize]
        colour = planes[..., :3].astype(np.float32) / np.float32(top)
        bgr = bgr and planes.shape[2] > 1  # torch takes no array with a negative stride, even of a single channel
        result: Any = self._upscale_colour(colour[..., ::-1] if bgr else colour, tile, progress)
        result = result[..., ::-1] if bgr else result
        if planes.shape[2] == 4:
            height, width = result.shape[:2]
            alpha: Image = planes[..., 3].astype(np.float32) / np.float32(top)
            alpha = cv2.resize(alpha, (width, height), interpolation=cv2.INTER_CUBIC)
            result = np.concatenate([result, alpha[..., None]], axis=2)
        result = result.clip(0, 1) * np.float32(top)
        if image.dtype != np.float32:
            result = result.round()
        return np.ascontiguousarray(result[..., 0] if image.ndim == 2 else result, image.dtype)

    def _upscale_colour(self, colour: Image, tile: int | None, progress: Callable[[list[Any]], Iterable[Any]]) -> Image:
        """(H, W, 1 or 3) in [0, 1] to its (scale H, scale W, same), not clipped."""
        x = torch.from_numpy(np.ascontiguousarray(colour)).permute(2, 0, 1)
        if x.shape[0] == self.channels:
            return self.upscale_tensor(x[None], tile, progress)[0].permute(1, 2, 0).numpy()
        if self.channels == 1:  # a network for grey images upscales each channel
            return self.upscale_tensor(x[:, None], tile, progress)[:, 0].permute(1, 2, 0).numpy()
        # A grey image goes through a colour network as equal channels, and comes back as their luma.
        red, green, blue = self.upscale_tensor(x.expand(3, -1, -1)[None], tile, progress)[0]
        luma: Image = (0.299 * red + 0.587 * green + 0.114 * blue)[..., None].numpy()
        return luma

    @torch.no_grad()
    def upscale_tensor(
        self, x: Tensor, tile: int | None = None, progress: Callable[[list[Any]], Iterable[Any]] = iter
    ) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] to (N, C, scale H, scale W) float32 on the CPU, not clipped."""
        height, width = x.shape[2:]
        m, s = self.multiple, self.scale
        x = _pad(x, -height % m, -width % m)
        padded_height, padded_width = x.shape[2:]
        side = self._tile_side(tile, padded_height, padded_width)
        if side is None:
            return self._run(x)[..., : height * s, : width * s]
        margin = self.reach()
        assert margin is not None
        result = x.new_empty(*x.shape[:2], padded_height * s, padded_width * s)
        corners = [(top, left) for top in range(0, padded_height, side) for left in range(0, padded_width, side)]
        for top, left in progress(corners):
            bottom, right = min(top + side, padded_height), min(left + side, padded_width)
            # Where the window ends at the image's edge, the network sees the edge as it does in the whole image.
            first_row, first_column = max(top - margin, 0), max(left - margin, 0)
            window = self._run(x[..., first_row : bottom + margin, first_column : right + margin])
            window = window[..., (top - first_row) * s :, (left - first_column) * s :]
            result[..., top * s : bottom * s, left * s : right * s] = window[
                ..., : (bottom - top) * s, : (right - left) * s
            ]
        return result[..., : height * s, : width * s]

    def _tile_side(self, tile: int | None, height: int, width: int) -> int | None:
        """The side of the tiles, or None for the whole image at once."""
        if tile == 0 or (tile is None and height * width <= (2 * _AUTOMATIC_TILE) ** 2):
            return None
        if self.reach() is None:
            if tile is None:
                return None
            name = type(self.network).__name__
            raise ValueError(f'tile: found {tile}; allowed: 0, since {name} looks at the whole image for each pixel')
        side = _AUTOMATIC_TILE if tile is None else tile
        if side < 1:
            raise ValueError(f'tile: found {tile}; allowed: 0 (none) or the side of tiles in pixels')
        return -(-side // self.multiple) * self.multiple

    def _run(self, x: Tensor) -> Tensor:
        weight = next(self.network.parameters())
        result: Tensor = self.network(x.to(weight)).float().cpu()
        return result

    @torch.no_grad()
    def reach(self) -> int | None:
        """How many input pixels beyond a tile decide what is in it, a multiple of :attr:`multiple`; None for all.

        Found by one NaN among the inputs: all that it could have any influence on becomes NaN, whatever the weights.
        """
        if self._reach is None:
            self._reach = max(self._reach_along(2), self._reach_along(3))
        return None if self._reach > _FARTHEST else self._reach

    def _reach_along(self, axis: int) -> int:
        m, s = self.multiple, self.scale
        half = 16 * m
        while half <= 2 * _FARTHEST:
            shape = [1, self.channels, 2 * m, 2 * m]
            shape[axis] = 2 * half
            x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            x.narrow(axis, half, m).fill_(torch.nan)
            touched = self._run(x).isnan()[0].any(0).any(3 - axis).nonzero().flatten()
            first, last = int(touched[0]) // s, int(touched[-1]) // s
            farthest = max(half - first, last - (half + m - 1))
            # Windows are cut anew at a tile's edge: there the one at the edge counts as touched, too.
            farthest = -(-farthest // m) * m + (m if m > 1 else 0)
            if farthest < half - m:
                return farthest
            half *= 2
        return 2 * _FARTHEST


def _pad(x: Tensor, bottom: int, right: int) -> Tensor:
    """Mirror rows at the bottom and columns at the right; repeat the last where there are too few to mirror."""
    if bottom or right:
        enough = bottom < x.shape[2] and right < x.shape[3]
        return F.pad(x, (0, right, 0, bottom), mode='reflect' if enough else 'replicate')
    return x
