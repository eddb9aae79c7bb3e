"""Image files of every kind: what is read, upscaled and written, compared with Pillow and NumPy alone."""

from __future__ import annotations

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

from mssr_basicsr.commands.main import main
from mssr_basicsr.scalable.images import (
    SUFFIXES,
    WRITABLE_SUFFIXES,
    check_writable,
    read_eight_bits,
    read_image,
    write_image,
)
from mssr_basicsr.scalable.metrics import metrics
from mssr_basicsr.scalable.pixels import to_depth
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


def grey_png(path: Path, image: Any, bits: int, chunks: bytes = b'') -> None:
    """A grey PNG with less than 8 bits a pixel by hand, as Pillow writes none with 2 or 4."""
    header = struct.pack('>IIBBBBB', image.shape[1], image.shape[0], bits, 0, 0, 0, 0)
    in_bits = np.unpackbits(image.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]
    rows = np.packbits(in_bits.reshape(len(image), -1), axis=1)
    pixels = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunks + chunk(b'IDAT', pixels) + chunk(b'IEND'))


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
        **({'.avif': ('RGB', 'RGBA')} if '.avif' in WRITABLE_SUFFIXES else {}),
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
            assert f'{expected.dtype} (converted to {np.dtype(deepest)})' in lost, name
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
        np.testing.assert_array_equal(rgb(read_image(target).pixels), found, name)
        if suffix in ('.webp', '.avif') or found.dtype != np.uint8:  # which have no grey, or none with alpha
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


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_a_grey_that_means_transparent(bits: int, tmp_path: Path) -> None:
    path, greys = tmp_path / 'a.png', np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2**bits
    for grey in {0, 1, 2**bits - 2, 2**bits - 1}:
        grey_png(path, greys, bits, chunk(b'tRNS', struct.pack('>H', grey)))
        expected = np.stack([np.rint(greys / (2**bits - 1) * 255), np.where(greys == grey, 0, 255)], axis=2)
        np.testing.assert_array_equal(read_image(path).pixels, expected)


# ------------------------------ orientation ------------------------------ #

UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}  # by EXIF's number


@pytest.mark.parametrize('orientation', UPRIGHT)
def test_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored_exif = exif.tobytes().removeprefix(b'Exif\0\0')  # before Pillow takes it apart for AVIF
    stored = smooth(3)
    for suffix in ('.jpg', '.png', '.webp', '.tif', *(['.avif'] if '.avif' in WRITABLE_SUFFIXES else [])):
        path = tmp_path / f'a{suffix}'
        quality = {'.jpg': {'quality': 95, 'subsampling': 0}, '.webp': {'lossless': True}, '.avif': {'quality': 95}}
        PIL.Image.fromarray(stored.astype(np.uint8)).save(path, exif=exif, **quality.get(suffix, {}))
        found, expected = rgb(read_image(path).pixels), UPRIGHT[orientation](stored)
        assert found.shape == expected.shape, suffix
        assert np.abs(found - expected).mean() < 6, suffix

    deep = smooth(3, 65535).astype(np.uint16)
    png16(tmp_path / 'deep.png', deep, chunk(b'eXIf', stored_exif))
    tags = [(274, 'H', 1, orientation, True)]
    tiff(tmp_path / 'deep.tif', deep, extratags=tags)
    tiff(tmp_path / 'float.tif', smooth(1, 1).astype(np.float32), extratags=tags)
    for name, image in (('deep.png', deep), ('deep.tif', deep), ('float.tif', smooth(1, 1).astype(np.float32))):
        np.testing.assert_array_equal(rgb(read_image(tmp_path / name).pixels), UPRIGHT[orientation](image), name)


# ------------------------------ what cameras, scanners and editors write ------------------------------ #


def cmyk_profile() -> bytes:
    """A colour profile in which black ink K alone has the lightness 1 - K, and no ink a colour."""
    ramp = bytes(range(256))
    inks = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    grid = b''.join(bytes([0 if k else 255 - 60 * (c + m + y), 128, 128]) for c, m, y, k in inks)
    matrix = struct.pack('>9i', *(65536 * n for n in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b'mft1' + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + grid + ramp * 3
    header = struct.pack('>IIIIII', 144 + len(table), 0, 0x02400000, 0, 0, 0)
    header = header[:12] + b'prtrCMYKLab '.ljust(24, b'\0') + b'acsp'
    header = header.ljust(68, b'\0') + struct.pack('>3i', 63190, 65536, 54061)
    return header.ljust(128, b'\0') + struct.pack('>I4sII', 1, b'A2B0', 144, len(table)) + table


@pytest.mark.skipif(not features.check('littlecms2'), reason='this Pillow was built without profiles')
@pytest.mark.parametrize('suffix', ['.tif', '.jpg'])
def test_cmyk_is_converted_by_its_profile(suffix: str, tmp_path: Path) -> None:
    black = np.array([0, 64, 128, 192, 255])
    image = np.zeros((8, 40, 4), np.uint8)
    image[..., 3] = black.repeat(8)
    PIL.Image.fromarray(image, 'CMYK').save(tmp_path / f'a{suffix}', icc_profile=cmyk_profile())
    picture = read_image(tmp_path / f'a{suffix}')
    t = (100 * (1 - black / 255) + 16) / 116  # CIE's L* to luminance, and sRGB's curve
    luminance = np.where(t > 6 / 29, t**3, 3 * (6 / 29) ** 2 * (t - 4 / 29))
    expected = 255 * np.where(luminance > 0.0031308, 1.055 * luminance ** (1 / 2.4) - 0.055, 12.92 * luminance)
    np.testing.assert_allclose(picture.pixels[4, 4::8], expected[:, None].repeat(3, 1), atol=2)
    assert picture.icc is None
    assert picture.lost == ['CMYK (converted to sRGB by its profile)']


def test_what_is_not_read_from_a_file_is_reported(tmp_path: Path) -> None:
    image, deep, unsaid = of_mode('RGB'), smooth(3, 65535).astype(np.uint16), 'a channel of unspecified meaning'
    more = {'save_all': True, 'append_images': [ImageOps.invert(image), image]}
    for suffix in ('.gif', '.webp', '.png', '.tif', '.mpo', *(['.avif'] if '.avif' in WRITABLE_SUFFIXES else [])):
        image.save(tmp_path / f'frames{suffix}', **more)
        picture = read_image(tmp_path / f'frames{suffix}')
        assert picture.lost == ['all but the first of 3 frames or pages'], suffix
        assert np.abs(rgb(picture.pixels).astype(int) - np.array(image)).mean() < 10, suffix
    with tifffile.TiffWriter(tmp_path / 'deep.tif') as writer:
        for page in (deep, deep[::-1]):
            writer.write(page, photometric='rgb', metadata=None)
    png16(tmp_path / 'hdr.png', deep, chunk(b'cICP', bytes([9, 16, 0, 1])))
    png16(tmp_path / 'linear.png', deep, chunk(b'gAMA', struct.pack('>I', 100000)))
    png16(tmp_path / 'usual.png', deep, chunk(b'gAMA', struct.pack('>I', 45455)))
    png16(tmp_path / 'clear.png', deep[..., 0], chunk(b'tRNS', b'\1\2'))
    tiff(tmp_path / 'unsaid.tif', smooth(4).astype(np.uint8), extrasamples=['unspecified'])
    png16(tmp_path / 'damaged.png', deep, chunk(b'iCCP', b'ICC profile\0\0' + SRGB))  # not compressed, as it must be
    of_mode('CMYK').save(tmp_path / 'inks.jpg')
    of_mode('L').save(tmp_path / 'grey.png', icc_profile=SRGB)
    for name, text in {
        'deep.tif': 'all but the first of 2 frames or pages',
        'hdr.png': 'cICP',
        'linear.png': 'gamma, 1.000',
        'clear.png': 'the grey value that means transparent',
        'unsaid.tif': unsaid,
        'inks.jpg': 'CMYK (converted to RGB without a profile)',
        'grey.png': 'the ICC profile, which is for different channels',
        'damaged.png': 'the ICC profile, which is damaged',
    }.items():
        (lost,) = read_image(tmp_path / name).lost
        assert text in lost, name
    png16(tmp_path / 'srgb.png', deep, chunk(b'cICP', bytes([1, 13, 0, 1])))
    for name in ('usual.png', 'srgb.png'):
        assert read_image(tmp_path / name).lost == []


def test_colours_that_are_not_srgbs_are_reported(tmp_path: Path) -> None:
    """Where no ICC profile says what they are. (Display P3's white and blue are sRGB's, its red and green are not.)"""
    image, deep = of_mode('RGB'), smooth(3, 65535).astype(np.uint16)
    p3, srgb = (
        chunk(b'cHRM', struct.pack('>8I', 31270, 32900, *red_green, 15000, 6000))
        for red_green in ((68000, 32000, 26500, 69000), (64000, 33000, 30000, 60000))
    )
    png16(tmp_path / 'p3.png', deep, p3)
    png16(tmp_path / 'srgb.png', deep, srgb)
    png16(tmp_path / 'said.png', deep, chunk(b'sRGB', b'\0') + p3)  # which overrides cHRM
    exif = PIL.Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: 'R03'}  # by the Exif standard's option for Adobe RGB
    image.save(tmp_path / 'camera.jpg', exif=exif)
    image.save(tmp_path / 'tagged.jpg', exif=exif, icc_profile=SRGB)
    expected = {'p3.png': 'cHRM', 'camera.jpg': 'Adobe RGB'}
    if '.avif' in WRITABLE_SUFFIXES:
        image.save(tmp_path / 'srgb.avif')
        stored = (tmp_path / 'srgb.avif').read_bytes()
        primaries = stored.index(b'colrnclx') + 8
        (tmp_path / 'p3.avif').write_bytes(stored[:primaries] + b'\0\x0c' + stored[primaries + 2 :])
        assert read_image(tmp_path / 'srgb.avif').lost == []
        expected['p3.avif'] = 'nclx'
    for name, text in expected.items():
        (lost,) = read_image(tmp_path / name).lost
        assert text in lost, name
    for name in ('srgb.png', 'said.png', 'tagged.jpg'):
        assert read_image(tmp_path / name).lost == [], name


@pytest.mark.parametrize('bits', [8, 16])
def test_tiffs_from_scanners_and_editors(bits: int, tmp_path: Path) -> None:
    """Each is right, or refused by name: never an image with wrong values."""
    dtype, top, path = np.dtype(f'uint{bits}'), 2**bits - 1, tmp_path / 'a.tif'
    image = smooth(4, top).astype(dtype)
    for options in ({'bigtiff': True}, {'byteorder': '>'}, {'compression': 'zlib'}, {'rowsperstrip': 2}):
        tiff(path, image[..., :3], **options)
        np.testing.assert_array_equal(rgb(read_image(path).pixels), image[..., :3])
    large = np.tile(image, (8, 8, 1))
    tiff(path, large, tile=(16, 16))
    np.testing.assert_array_equal(rgb(read_image(path).pixels), large)

    planar = image[..., :3].transpose(2, 0, 1).copy()
    alpha = (image[..., 3:] / top).astype(np.float64)
    premultiplied = np.concatenate([(image[..., :3] * alpha), image[..., 3:]], axis=2).astype(dtype)
    of_inks = (1 - image[..., :3] / top) * (top - image[..., 3:])
    for pixels, options, expected, tolerance in (
        (image[..., 0].copy(), {'photometric': 'miniswhite'}, top - image[..., 0], 0),
        (planar, {'photometric': 'rgb', 'planarconfig': 'separate'}, image[..., :3], 0),
        (image[..., :2].copy(), {}, image[..., :2], 0),
        (premultiplied, {'extrasamples': ['assocalpha']}, image, 6),
        (image, {'photometric': 'separated', 'extrasamples': []}, of_inks, 1),
    ):
        tiff(path, pixels, **options)
        if bits == 16:
            with pytest.raises(ValueError, match=r'a\.tif: found a TIFF of .* x 16 bits, .*; allowed: '):
                read_image(path)
        else:
            found = rgb(read_image(path).pixels)
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).max() <= tolerance


def test_what_would_come_out_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('int8', 'int16', 'int32', 'uint32', 'float16'):
        tiff(tmp_path / f'{name}.tif', smooth(1, 1 if name == 'float16' else 100).astype(name))
    tiff(tmp_path / 'lab.tif', smooth(3).astype(np.uint8), photometric='cielab')
    tiff(tmp_path / 'raw.tif', smooth(3).astype(np.uint8), subfiletype=1)
    (tmp_path / 'deep.ppm').write_bytes(b'P6 2 1 65535 ' + bytes(12))
    for path, text in {
        'lab.tif': 'found pixels of mode LAB; allowed: ',
        'raw.tif': 'found a small preview',
        'deep.ppm': 'found a PNM with other than 8 bits',
        **{f'{name}.tif': 'found a TIFF of' for name in ('int8', 'int16', 'int32', 'uint32', 'float16')},
    }.items():
        with pytest.raises(ValueError, match=f'{path}: {text}'):
            read_image(tmp_path / path)
    of_mode('RGB').save(tmp_path / 'large.png')
    tiff(tmp_path / 'large.tif', smooth(3, 65535).astype(np.uint16))
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', HEIGHT * WIDTH // 2 - 1)
    for path in ('large.png', 'large.tif'):
        with pytest.raises(ValueError, match=f'{path}: found more pixels than is safe to decode; allowed: 52'):
            read_image(tmp_path / path)


@pytest.mark.parametrize('suffix', WRITABLE_SUFFIXES)
def test_damaged_files_and_other_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'a{suffix}'
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    write_image(path, noise)
    whole = path.read_bytes()
    for data in (whole[: len(whole) * 2 // 3], whole[:30], b'', b'not an image', b'%PDF-1.4'):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f'a{suffix}: not an image'):
            read_image(path)
    path.write_bytes(whole)
    assert read_image(path.rename(tmp_path / 'a.other')).pixels.shape == noise.shape  # the suffix does not matter


@pytest.mark.parametrize(
    ('bits', 'channels'), [(1, 1), (2, 1), (4, 1), *((b, c) for b in (8, 16) for c in (1, 2, 3, 4))]
)
def test_a_png_with_too_few_pixels_is_refused(bits: int, channels: int, tmp_path: Path) -> None:
    """Interlaced or not; the bytes of an interlaced one are counted with the standard's own table of passes."""
    path = tmp_path / 'a.png'
    table = ['16462646', '77777777', '56565656', '77777777', '36463646', '77777777', '56565656', '77777777']
    for width, height in ((WIDTH, HEIGHT), (1, 1), (3, 2), (16, 9)):
        passes = [[table[y % 8][x % 8] for x in range(width)] for y in range(height)]
        for interlaced in (0, 1):
            rows = [row.count(n) for n in '1234567' for row in passes if n in row] if interlaced else [width] * height
            pixels = b''.join(bytes(1 + (pixels * bits * channels + 7) // 8) for pixels in rows)
            kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
            header = struct.pack('>IIBBBBB', width, height, bits, kind, 0, 0, interlaced)

            def write(pixels: bytes, header: bytes = header) -> None:
                packed = zlib.compress(pixels)
                parts = chunk(b'IHDR', header), chunk(b'IDAT', packed[:5]), chunk(b'IDAT', packed[5:]), chunk(b'IEND')
                path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(parts))

            write(pixels)
            assert read_image(path).pixels.shape[:2] == (height, width)
            for fewer in {1, len(pixels) // 2, len(pixels) - 1}:
                write(pixels[:fewer])
                with pytest.raises(ValueError, match=r'a\.png: not an image that can be read: '):
                    read_image(path)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_a_tiff_that_is_empty_or_cut_short_is_refused_in_words(
    dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / 'a.tif'
    tiff(path, smooth(3).astype(dtype))
    whole = path.read_bytes()
    no_page = b'II*\0' + bytes(4)
    for data in (no_page, b'II*\0\x08\0\0\0' + bytes(6), b'II+\0', *(whole[:n] for n in range(2, len(whole), 7))):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r'a\.tif: not an image( that can be read|)( that OpenCV|: \D*[a-z]{4})'):
            read_image(path)
    assert caplog.records == []


# ------------------------------ writing ------------------------------ #


def test_the_colour_profile_is_kept_or_said_to_be_lost(tmp_path: Path) -> None:
    for suffix in WRITABLE_SUFFIXES:
        for image in (smooth(3).astype(np.uint8), smooth(4).astype(np.uint8), smooth(3, 65535).astype(np.uint16)):
            path = tmp_path / f'a{suffix}'
            lost = write_image(path, image, SRGB)
            assert ('the ICC profile' in lost) == (suffix == '.bmp')
            assert read_image(path).icc == (None if suffix == '.bmp' else SRGB)
            with PIL.Image.open(path) as opened:
                assert opened.info.get('icc_profile') == (None if suffix == '.bmp' else SRGB)
    grey = SRGB[:16] + b'GRAY' + SRGB[20:]
    assert write_image(tmp_path / 'a.png', smooth(1, 65535).astype(np.uint16), grey) == []
    assert read_image(tmp_path / 'a.png').icc == grey
    assert write_image(tmp_path / 'a.webp', smooth(1).astype(np.uint8), grey) == ['the ICC profile']


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
@pytest.mark.parametrize('suffix', WRITABLE_SUFFIXES)
def test_grey_with_alpha_can_be_read_again(suffix: str, dtype: str, tmp_path: Path) -> None:
    image = smooth(2, 1 if dtype == 'float32' else np.iinfo(dtype).max).astype(dtype)
    lost = write_image(tmp_path / f'a{suffix}', image)
    found = read_image(tmp_path / f'a{suffix}').pixels
    assert ('alpha' in lost) == (found.ndim == 2 or found.shape[2] == 3)
    if 'alpha' not in lost and suffix != '.avif':
        assert np.array_equal(found[..., -1], to_depth(image[..., 1], found.dtype))
        assert np.array_equal(found[..., 0], to_depth(image[..., 0], found.dtype))


def test_depths(tmp_path: Path) -> None:
    grey = np.array([[0, 128, 129, 32639, 65407, 65535]], np.uint16)
    assert write_image(tmp_path / 'a.bmp', grey) == ['uint16 (converted to uint8)']
    assert read_image(tmp_path / 'a.bmp').pixels.tolist() == [[0, 0, 1, 127, 255, 255]]  # a step is 257
    halves = np.array([[0, 0.5, 1, 1.25]], np.float32)
    assert write_image(tmp_path / 'a.png', halves) == ['float32 (converted to uint16)']
    assert read_image(tmp_path / 'a.png').pixels.tolist() == [[0, 32768, 65535, 65535]]


def test_sizes_and_names_that_a_format_does_not_support(tmp_path: Path) -> None:
    check_writable('a.png', 20000, 1)
    for path, size, text in (
        ('a.webp', (1, 16384), 'a.webp: found 16384x1 pixels; allowed in WEBP: 16,383 a side'),
        ('a.jpg', (65501, 1), 'allowed in JPEG: 65,500 a side'),
        ('a.gif', (1, 1), "found '.gif'; allowed: a name that ends in .png"),
        ('a', (1, 1), "found ''; allowed: "),
    ):
        with pytest.raises(ValueError, match=text):
            write_image(tmp_path / path, np.zeros(size, np.uint8))
    assert list(tmp_path.iterdir()) == []
    assert set(WRITABLE_SUFFIXES) <= set(SUFFIXES)


# ------------------------------ figures ------------------------------ #


def noisy(image: Any, step: int) -> Any:
    """Each value up or down by a step, in turns."""
    signs = np.where(np.arange(image.size).reshape(image.shape) % 2, 1, -1)
    return (image.astype(int) + signs * step).astype(image.dtype)


def test_figures_compare_values_whatever_the_depth() -> None:
    grey = np.full((40, 50), 100, np.uint8)
    expected = 20 * np.log10(255 / 3)
    assert metrics(noisy(grey, 3), grey, 2)['psnr'] == pytest.approx(expected)
    deep = grey.astype(np.uint16) * 257
    assert metrics(noisy(deep, 3 * 257), deep, 2)['psnr'] == pytest.approx(expected)
    assert metrics(noisy(grey, 3), deep, 2)['psnr'] == pytest.approx(expected)
    assert metrics(noisy(deep, 16), deep, 2)['psnr'] == pytest.approx(20 * np.log10(65535 / 16))
    unit = deep / np.float32(65535)
    assert metrics(unit + np.float32(0.01), unit, 2)['psnr'] == pytest.approx(40, abs=1e-4)


def test_figures_of_colour_images_use_luma_and_never_alpha() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(20, 236, (40, 50, 4)).astype(np.uint8)
    image = noisy(truth, 5)
    b, g, r = (image[2:-2, 2:-2, i].astype(float) - truth[2:-2, 2:-2, i] for i in range(3))
    error = (24.966 * b + 128.553 * g + 65.481 * r) / 255
    expected = 10 * np.log10(255**2 / (error**2).mean())
    found = metrics(image[..., :3], truth[..., :3], 2)
    assert found['psnr'] == pytest.approx(expected, abs=1e-4)
    for one in (image, image[..., :3]):
        for other in (truth, truth[..., :3]):
            assert metrics(one, other, 2) == found
    assert metrics(image[..., :2], truth[..., 0], 2) == metrics(image[..., 0], truth[..., :2], 2)


def test_figures_that_would_be_wrong_are_refused() -> None:
    image = np.zeros((40, 50, 3), np.uint8)
    assert metrics(image[:-2, :-2], image[:-1, :-1], 2)['psnr'] == np.inf  # a truth that was no multiple of the scale
    for truth, text in (
        (np.zeros((42, 50, 3), np.uint8), 'found 50x42 pixels; allowed: 50x40, .* up to 1 more per side'),
        (image[:, :-1], 'found 49x40 pixels; allowed: 50x40'),
        (image + np.float32(255), 'found float32 values from 255 to 255; allowed: 0'),
    ):
        with pytest.raises(ValueError, match=text):
            metrics(image, truth, 2)
    with pytest.raises(ValueError, match='found a colour image; allowed: a grey one'):
        metrics(image[..., 0], image, 2)
    with pytest.raises(ValueError, match='found 14x14 pixels; allowed: at least 15 per side'):
        metrics(image[:14, :14], image[:14, :14], 2)


def test_images_for_training_have_eight_bits_and_no_alpha(tmp_path: Path) -> None:
    for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA'):
        expected = saved(of_mode(mode), tmp_path / 'a.png')
        if expected.ndim == 3:
            expected = {1: expected[..., 0], 2: expected[..., 0], 3: expected, 4: expected[..., :3]}[expected.shape[2]]
        np.testing.assert_array_equal(rgb(read_eight_bits(tmp_path / 'a.png')), expected, mode)
    png16(tmp_path / 'a.png', smooth(3, 65535).astype(np.uint16))
    with pytest.raises(ValueError, match=r'a\.png: found uint16 pixels; allowed: 8 bits per channel'):
        read_eight_bits(tmp_path / 'a.png')


# ------------------------------ the command ------------------------------ #


def test_the_command_says_in_one_line_what_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).parents[1] / 'models' / 'EDSR_8x32_x2_291.mssr'
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(np.full((20, 24), 90, np.uint8)).save(tmp_path / 'grey.png')
    PIL.Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(tmp_path / 'sideways.jpg', exif=exif)
    png16(tmp_path / 'deep.png', np.full((20, 24, 3), 127 * 257, np.uint16))
    png16(tmp_path / 'alpha.png', np.full((20, 24, 4), 127 * 257, np.uint16))
    tiff(tmp_path / 'float.tif', np.full((20, 24), 0.5, np.float32))
    for name, suffix, shape, value, line in (
        ('grey.png', '.png', (40, 48), 90, ''),
        ('sideways.jpg', '.png', (48, 40, 3), 90, ''),
        ('deep.png', '.jpg', (40, 48, 3), 127, 'uint16 (converted to uint8)'),
        ('alpha.png', '.jpg', (40, 48, 3), 127, 'alpha; uint16 (converted to uint8)'),
        ('float.tif', '.png', (40, 48), 32768, 'float32 (converted to uint16)'),
        ('float.tif', '.tif', (40, 48), 0.5, ''),
    ):
        target = tmp_path / f'out{suffix}'
        assert main(['upscale', str(model), str(tmp_path / name), '-o', str(target), '--level', '4']) == 0
        printed = capsys.readouterr().err.strip()
        assert printed == (f'mssr: {target}: not kept: {line}' if line else '')
        found = written_by(suffix, target)
        assert found.shape == shape
        assert np.abs(found - np.float64(value)).max() <= 0.03 * value

    command = ['upscale', str(model), str(tmp_path / 'deep.png'), '-o', str(tmp_path / 'out.jpg'), '--json']
    (tmp_path / 'gt').mkdir()
    png16(tmp_path / 'gt' / 'deep.png', np.full((40, 48, 4), 127 * 257, np.uint16))
    assert main([*command, '--gt', str(tmp_path / 'gt')]) == 0
    (record,) = json.loads(capsys.readouterr().out)['images']
    assert record['lost'] == ['uint16 (converted to uint8)']
    assert record['psnr'] > 40
