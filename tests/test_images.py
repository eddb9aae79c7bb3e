"""Image files of every kind: what is read, upscaled and written, against values that Pillow and NumPy give alone."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from PIL import ImageCms, ImageOps, features
from test_scalable_file import network

from mssr_basicsr import pack
from mssr_basicsr.commands.main import main
from mssr_basicsr.scalable.images import (
    SUFFIXES,
    WRITABLE_SUFFIXES,
    check_writable,
    metrics,
    read_colour,
    read_image,
    write_image,
)
from mssr_basicsr.scalable.upscaling import Upscaler

HEIGHT, WIDTH = 6, 9
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()


class Nearest(torch.nn.Module):
    """Makes of each pixel a square of four; so what is expected is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=2) * self.factor


def upscaled(pixels: Any) -> Any:
    return Upscaler(Nearest(), {'type': 'Nearest'}, 2).upscale(pixels, bgr=True)


def smooth(channels: int, top: float = 255) -> Any:
    """Values that lossy formats keep nearly, different in each channel and at each corner."""
    y, x = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j]
    planes = [0.2 + 0.47 * y, 0.8 - 0.6 * x, 0.3 + 0.3 * x * y, 0.5 + 0.4 * x - 0.3 * y]
    image = np.stack(planes[:channels], axis=2) * top
    return image[..., 0] if channels == 1 else image


def rgb(pixels: Any) -> Any:
    """Of BGR(A), in the order that Pillow has."""
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.shape[2:] in ((3,), (4,)) else pixels


def twice(image: Any) -> Any:
    """What ``upscaled`` is to give: squares of the colours, and alpha by a bicubic that is not ours."""
    result = image.repeat(2, 0).repeat(2, 1)
    if image.shape[2:] in ((2,), (4,)):
        alpha = torch.from_numpy(image[..., -1].astype(np.float64))[None, None]
        alpha = torch.nn.functional.interpolate(alpha, scale_factor=2, mode='bicubic')[0, 0].numpy()
        top = {1: 255, 2: 65535, 4: 1}[image.dtype.itemsize]
        result[..., -1] = alpha.clip(0, top) if top == 1 else alpha.clip(0, top).round()
    return result


# ------------------------------ files of each kind ------------------------------ #


def png16(path: Path, image: Any, chunks: bytes = b'') -> None:
    """A PNG of 16 bits a channel by hand, as no library but the one under test writes all four kinds."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[image.shape[2] if image.ndim == 3 else 1]
    header = struct.pack('>IIBBBBB', image.shape[1], image.shape[0], 16, colour, 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in image)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunks + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND')
    )


def chunk(name: bytes, data: bytes = b'') -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def tiff(path: Path, image: Any, **options: Any) -> None:
    channels = image.shape[2] if image.ndim == 3 else 1
    options.setdefault('photometric', 'rgb' if channels > 2 else 'minisblack')
    if channels in (2, 4):
        options.setdefault('extrasamples', ['unassalpha'])
    if image.ndim == 3:
        options.setdefault('planarconfig', 'contig')
    tifffile.imwrite(path, image, metadata=None, **options)


def of_mode(mode: str) -> PIL.Image.Image:
    if mode == 'P':
        return PIL.Image.fromarray(smooth(3).astype(np.uint8)).quantize(16)
    if mode in ('1', 'L'):
        return PIL.Image.fromarray(smooth(1).astype(np.uint8)).convert(mode)
    return PIL.Image.fromarray(smooth(len(mode)).astype(np.uint8), mode)


def see_through_palette() -> PIL.Image.Image:
    image = of_mode('P')
    image.info['transparency'] = image.getpixel((0, 0))
    return image


def saved(image: PIL.Image.Image, path: Path, **options: Any) -> Any:
    """Save with Pillow; what Pillow says that is to be seen then, as L, LA, RGB or RGBA."""
    if 'transparency' in image.info:
        options.setdefault('transparency', image.info['transparency'])
    image.save(path, **options)
    with PIL.Image.open(path) as opened:
        shown = ImageOps.exif_transpose(opened)
        grey, alpha = shown.mode in ('1', 'L', 'LA'), shown.has_transparency_data
        return np.array(
            shown.convert({(True, True): 'LA', (True, False): 'L', (False, True): 'RGBA'}.get((grey, alpha), 'RGB'))
        )


def _eight_bits(mode: str, suffix: str, **options: Any) -> Callable[[Path], tuple[Path, Any]]:
    def write(folder: Path) -> tuple[Path, Any]:
        path = folder / f'{mode}{suffix}'
        image = see_through_palette() if mode == 'see-through palette' else of_mode(mode)
        return path, saved(image, path, **options)

    return write


def _deep(suffix: str, channels: int, dtype: str) -> Callable[[Path], tuple[Path, Any]]:
    def write(folder: Path) -> tuple[Path, Any]:
        image = smooth(channels, 1 if 'float' in dtype else 65535).astype(dtype)
        path = folder / f'deep{suffix}'
        (png16 if suffix == '.png' else tiff)(path, image)
        return path, image.astype(np.float32) if dtype == 'float64' else image

    return write


INPUTS = {
    f'{mode} {suffix}': _eight_bits(mode, suffix)
    for suffix, modes in {
        '.png': ('1', 'L', 'LA', 'P', 'see-through palette', 'RGB', 'RGBA'),
        '.jpg': ('L', 'RGB', 'CMYK'),
        '.webp': ('L', 'RGB', 'RGBA'),
        '.tif': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'),
        '.bmp': ('1', 'L', 'P', 'RGB'),
        '.gif': ('L', 'P', 'see-through palette'),
        **({'.avif': ('RGB', 'RGBA')} if features.check('avif') else {}),
    }.items()
    for mode in modes
}
INPUTS['progressive .jpg'] = _eight_bits('RGB', '.jpg', progressive=True)
INPUTS['jpeg in .tif'] = _eight_bits('RGB', '.tif', compression='jpeg')
INPUTS['lzw .tif'] = _eight_bits('RGB', '.tif', compression='tiff_lzw')
INPUTS['fax .tif'] = _eight_bits('1', '.tif', compression='group4')
INPUTS.update({f'uint16 x {n} .png': _deep('.png', n, 'uint16') for n in (1, 2, 3, 4)})
INPUTS.update({f'{d} x {n} .tif': _deep('.tif', n, d) for n in (1, 3, 4) for d in ('uint16', 'float32', 'float64')})


def written_by(suffix: str, path: Path) -> Any:
    """What another reader finds in an output: tifffile in a TIFF, OpenCV in a 16-bit PNG, Pillow in the rest."""
    if suffix in ('.tif', '.tiff'):
        return tifffile.imread(path)
    if suffix == '.png' and path.read_bytes()[24] == 16:
        return rgb(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    with PIL.Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize('suffix', [s for s in WRITABLE_SUFFIXES if s not in ('.jpeg', '.tiff')])
def test_every_kind_of_image_into_every_format(suffix: str, tmp_path: Path) -> None:
    for name, write in INPUTS.items():
        source, expected = write(tmp_path)
        picture = read_image(source)
        assert picture.pixels.dtype == expected.dtype, name
        np.testing.assert_array_equal(rgb(picture.pixels), expected, name)

        target = tmp_path / f'out{suffix}'
        lost = ' '.join(write_image(target, upscaled(picture.pixels)))
        expected = twice(expected)
        deepest = {'.png': np.uint16, '.tif': np.float32}.get(suffix, np.uint8)
        if expected.dtype.itemsize > np.dtype(deepest).itemsize:
            assert f'{expected.dtype} (now {np.dtype(deepest)})' in lost, name
            tops = [{1: 255, 2: 65535, 4: 1}[np.dtype(d).itemsize] for d in (deepest, expected.dtype)]
            expected = np.round(expected.astype(np.float64) * (tops[0] / tops[1])).astype(deepest)
        else:
            assert 'int' not in lost, name
        if suffix in ('.jpg', '.bmp') and expected.shape[2:] in ((2,), (4,)):
            assert 'alpha' in lost, name
            expected = expected[..., 0] if expected.shape[2] == 2 else expected[..., :3]
        else:
            assert 'alpha' not in lost, name

        found = written_by(suffix, target)
        if suffix in ('.webp', '.avif') or found.dtype == np.uint16:  # which have no grey, or none with alpha
            if expected.ndim == 2 and found.ndim == 3:
                expected = expected[..., None].repeat(3, 2)
            elif expected.shape[2:] == (2,) and found.shape[2:] == (4,):
                expected = expected[..., [0, 0, 0, 1]]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        # Squares are hard for JPEG and AVIF; float32 rounds on the way through the network, as it does alpha.
        tolerance = {'.jpg': 40, '.avif': 40}.get(suffix, 1e-6 if expected.dtype == np.float32 else 1)
        difference = np.abs(found.astype(np.float64) - expected)
        assert difference.max() <= tolerance, name
        assert difference.mean() <= tolerance / 8, name
