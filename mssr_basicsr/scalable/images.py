"""Image files: read as they are meant to be seen, and written without silently losing anything.

Pillow opens every file, finds its orientation, frames and colour profile, and decodes up to 8 bits per channel. It
would reduce deeper files to 8 bits, so OpenCV decodes these. Pillow writes 8 bits per channel, OpenCV 16-bit PNGs, and
tifffile TIFFs. Metadata such as date, place and resolution are not carried over.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import tifffile
from PIL import ExifTags, ImageCms, features

from mssr_basicsr.foundation.saving import write_whole
from mssr_basicsr.scalable.pixels import Image, as_colours, to_depth, white, without_alpha

PIL.Image.init()  # lets Pillow find out which formats it was built with
_AVIF = 'AVIF' in PIL.Image.SAVE
_READABLE = {
    'PNG': ('.png', '.apng'),
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo'),
    'BMP': ('.bmp',),
    'WEBP': ('.webp',),
    'TIFF': ('.tif', '.tiff'),
    'GIF': ('.gif',),
    'PPM': ('.ppm', '.pgm', '.pbm'),
    **({'AVIF': ('.avif',)} if _AVIF else {}),
}
#: The suffixes by which images are found in a folder. What a file is read as depends on its contents alone.
SUFFIXES = tuple(suffix for suffixes in _READABLE.values() for suffix in suffixes)


@dataclass
class Picture:
    """An image as read from a file.

    Attributes:
        pixels: upright, (H, W) grey, (H, W, 2) grey and alpha, (H, W, 3) BGR or (H, W, 4) BGR and alpha; uint8, uint16,
            or float32 from 0 (black) to 1 (white).
        icc: the colour profile of the pixels' values; None for sRGB.
        lost: what is in the file but not kept here, such as ``the ICC profile``, and how it was converted.
    """

    pixels: Image
    icc: bytes | None = None
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Format:
    """What an output format can hold, and how Pillow writes its 8-bit images."""

    name: str
    deepest: str = 'uint8'
    alpha: bool = True
    icc: bool = True
    longest_side: int = 2**31 - 1
    options: dict[str, Any] = field(default_factory=dict)


# Without loss where the format has it; otherwise so that what the network made stays to be seen.
_FORMATS = {
    '.png': _Format('PNG', 'uint16', options={'compress_level': 4}),
    '.tif': _Format('TIFF', 'float32'),
    '.tiff': _Format('TIFF', 'float32'),
    '.webp': _Format('WEBP', longest_side=16383, options={'lossless': True, 'exact': True}),
    '.jpg': _Format('JPEG', alpha=False, longest_side=65500, options={'quality': 95, 'subsampling': 0}),
    '.jpeg': _Format('JPEG', alpha=False, longest_side=65500, options={'quality': 95, 'subsampling': 0}),
    '.bmp': _Format('BMP', alpha=False, icc=False),
}
if _AVIF:
    _FORMATS['.avif'] = _Format('AVIF', longest_side=65535, options={'quality': 95, 'subsampling': '4:4:4'})
# The passes of an interlaced PNG: the first column and row, and every how many follow.
_ADAM7 = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
_Chunks = dict[bytes, list[memoryview]]  # what those of a PNG hold, by their kind's name
_SRGB_CODES = bytes([1, 13])  # of primaries and transfer, in ITU-T H.273
_SRGB_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green, blue
#: The suffixes that images can be written with.
WRITABLE_SUFFIXES = tuple(_FORMATS)


class _Refused(ValueError):
    """An image that can be decoded, but would come out wrong."""


def list_images(source: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """The images of a folder, sorted by name, and what else is there; or a single file, whatever its name.

    Folders in it are not searched; pipes, sockets and devices are not read. What begins with a dot is ignored; on disks
    that a Mac has written to, such files are not images.

    Raises:
        ValueError: no file in the folder has an image's extension.
        OSError: there is no such file or folder.
    """
    source = Path(source)
    if not source.is_dir():
        source.stat()  # OSError where there is none
        return [source], []
    there = sorted(path for path in source.iterdir() if not path.name.startswith('.'))
    images = [path for path in there if path.suffix.lower() in SUFFIXES and not (path.is_dir() or _is_special(path))]
    others = sorted({*there} - {*images})
    if not images:
        folders = sum(path.is_dir() for path in others)
        special = sum(_is_special(path) for path in others)
        files = len(others) - folders - special
        found = [f'{files} files, none of which is an image by its name'] * (files > 0)
        found += [f'{folders} folders, which are not searched'] * (folders > 0)
        found += [f'{special} pipes, sockets or devices'] * (special > 0)
        raise ValueError(f'{source}: found {" and ".join(found) or "nothing"}; allowed: images ({", ".join(SUFFIXES)})')
    return images, others


def skipped_message(source: str | os.PathLike[str], others: Sequence[Path]) -> str:
    """What to say about ``others``, of which there is at least one, that :func:`list_images` found in a folder."""
    kinds = ['/' if path.is_dir() else ' (no regular file)' if _is_special(path) else '' for path in others[:3]]
    some = [path.name + kind for path, kind in zip(others, kinds)] + ['...'] * (len(others) > 3)
    return f'skipped in {source}, not images by their names: {", ".join(some)}'


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, socket or device: to read one may never end."""
    return path.exists() and not path.is_file() and not path.is_dir()


# ------------------------------ reading ------------------------------ #


def read_image(path: str | Path) -> Picture:
    """Read an image upright and at full bit depth.

    The EXIF orientation is applied; palettes become colours; CMYK becomes RGB (by the file's profile, if it has one);
    only the first of several frames or pages is read.

    Raises:
        ValueError: not an image, damaged, or its values would be misread. The text begins with the path.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f'{path}: not an image: the file is empty')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's: what matters of it is an error, or is said in `lost`
            with _silent('tifffile'):
                return _read_tiff(data) if data[:2] in (b'II', b'MM') else _read(data)
    except _Refused as error:
        raise ValueError(f'{path}: {error}') from None
    except PIL.UnidentifiedImageError:
        raise ValueError(f'{path}: not an image; allowed: {", ".join(_READABLE)}') from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(f'{path}: not an image that can be read: {error}') from error


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Nothing is logged under this name; other threads may do the same meanwhile."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    logging.getLogger(name).addFilter(refuse)
    try:
        yield
    finally:
        logging.getLogger(name).removeFilter(refuse)


def read_eight_bits(path: str | Path) -> Image:
    """An image as used for training and evaluation: (H, W) grey or (H, W, 3) BGR, uint8, without alpha.

    Raises:
        ValueError: as :func:`read_image`, or more than 8 bits per channel.
    """
    pixels = read_image(path).pixels
    if pixels.dtype != np.uint8:
        raise ValueError(f'{path}: found {pixels.dtype} pixels; allowed: 8 bits per channel')
    return without_alpha(pixels)


def _read(data: bytes) -> Picture:
    """Read with Pillow, or a PNG with 16 bits per channel with OpenCV."""
    try:
        opened = PIL.Image.open(io.BytesIO(data), formats=list(_READABLE))
    except PIL.Image.DecompressionBombError:
        raise _Refused(f'found more pixels than is safe to decode; allowed: {_most_pixels():,}') from None
    with opened:
        if opened.format == 'PPM' and (opened.mode not in ('1', 'L', 'RGB') or opened.tile[0][0] == 'ppm'):
            raise _Refused('found a PNM with other than 8 bits per channel; allowed: samples up to 255')
        opened.load()  # raises if the file is cut short, of which OpenCV would return the upper part
        chunks = _png_chunks(data) if opened.format == 'PNG' else {}
        if chunks:
            _require_png_pixels(chunks)
        frames = getattr(opened, 'n_frames', 1)
        lost = [f'all but the first of {frames} frames or pages'] if frames > 1 else []
        orientation = _orientation(opened, lost)
        icc = opened.info.get('icc_profile')
        lost += [*_png_losses(chunks, opened), *_avif_losses(data, icc)]
        lost += ['the colour space, Adobe RGB by EXIF'] * (not icc and _is_adobe_rgb(opened))
        lost += ['the ICC profile, which is damaged'] * ('icc_profile' in opened.info and not icc)
        if chunks and data[24] == 16:
            pixels = _decode_deep(data)
            if data[25] in (0, 4) and pixels.ndim == 3:  # OpenCV makes colours of grey with alpha
                pixels = pixels[..., ::3]
            if pixels.ndim == 2 and 'transparency' in opened.info:
                lost.append('the grey value that means transparent')
        elif opened.mode == 'CMYK':
            pixels, icc = _decoded(_from_cmyk(opened, icc, lost)), None
        else:
            if chunks and opened.mode == 'L' and 'transparency' in opened.info:
                # Pillow makes 8 bits of 2 or 4, but not of the grey that means transparent.
                top = 2 ** data[24] - 1
                key = int.from_bytes(chunks[b'tRNS'][0][:2], 'big')
                opened.info['transparency'] = (key & top) * (255 // top)
            pixels = _decoded(opened)
    if icc and icc[16:20] != _profile_space(pixels):
        icc = None
        lost.append('the ICC profile, which is for different channels')
    return Picture(_turned(pixels, orientation), icc, lost)


def _orientation(image: PIL.Image.Image, lost: list[str]) -> int:
    """The EXIF orientation, which says where the first row and column belong; Pillow has already applied a TIFF's."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # as in read_image
        lost.append('the damaged EXIF data, including any orientation')
        return 1


def _is_adobe_rgb(image: PIL.Image.Image) -> bool:
    """Whether it is, without a profile that says so, as cameras set to Adobe RGB write it."""
    try:
        return str(image.getexif().get_ifd(ExifTags.IFD.Interop).get(1)).startswith('R03')
    except Exception:  # as in _orientation
        return False


def _most_pixels() -> int:
    """The pixels above which Pillow assumes a decompression bomb; ``PIL.Image.MAX_IMAGE_PIXELS`` changes it."""
    return 2 * (PIL.Image.MAX_IMAGE_PIXELS or 2**62)


def _decoded(image: PIL.Image.Image) -> Image:
    """The 8-bit pixels of an image that Pillow has opened, in the order of :class:`Picture`."""
    if image.mode not in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'YCbCr'):
        raise _Refused(f'found pixels of mode {image.mode}; allowed: 8-bit grey, colour, palette or CMYK')
    transparent = image.has_transparency_data
    if image.mode in ('1', 'L', 'LA'):
        return np.array(image.convert('LA' if transparent else 'L'))
    return _swapped(np.array(image.convert('RGBA' if transparent else 'RGB')))


def _from_cmyk(image: PIL.Image.Image, icc: bytes | None, lost: list[str]) -> PIL.Image.Image:
    """The image in sRGB, by its profile if that is usable; adds to ``lost`` how it was converted."""
    if icc and features.check('littlecms2'):
        try:
            profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile('sRGB')
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode='RGB')
            assert converted is not None
        except (ImageCms.PyCMSError, OSError):
            pass
        else:
            lost.append('CMYK (converted to sRGB by its profile)')
            return converted
    lost.append('CMYK (converted to RGB without a profile)')
    return image.convert('RGB')


def _png_losses(chunks: _Chunks, image: PIL.Image.Image) -> Iterator[str]:
    """What a PNG says about how its values are to be displayed, other than by an ICC profile."""
    if b'cICP' in chunks and chunks[b'cICP'][0][:2] != _SRGB_CODES:
        yield 'the colour coding (cICP, such as for HDR)'
    elif not {b'cICP', b'iCCP', b'sRGB'} & chunks.keys():
        if b'gAMA' in chunks and abs(image.info['gamma'] - 1 / 2.2) > 0.01:
            yield f'the gamma, {image.info["gamma"]:.3f}'
        if b'cHRM' in chunks and np.abs(np.subtract(image.info['chromaticity'], _SRGB_CHROMATICITIES)).max() > 0.01:
            yield 'the primary colours (cHRM, such as of Display P3)'


def _require_png_pixels(chunks: _Chunks) -> None:
    """Refuse a PNG with fewer pixels than it has room for, which Pillow would make black."""
    width, height, bits, colours, _, _, interlaced = struct.unpack_from('>IIBBBBB', chunks[b'IHDR'][0])
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // every_x), -(-(height - y) // every_y)) for x, y, every_x, every_y in passes]
    allowed = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns)  # a filter type each
    found = len(zlib.decompressobj().decompress(b''.join(chunks[b'IDAT']), allowed))
    if found < allowed:
        values = f'found {found:,} bytes of pixels; allowed: {allowed:,}, for {width}x{height}'
        raise _Refused(f'not an image that can be read: {values}')


def _png_chunks(data: bytes) -> _Chunks:
    found: _Chunks = {}
    view, start = memoryview(data), 8
    while start + 8 <= len(data):
        length, name = struct.unpack_from('>I4s', data, start)
        found.setdefault(name, []).append(view[start + 8 : start + 8 + length])
        start += 12 + length
    return found


def _avif_losses(data: bytes, icc: bytes | None) -> Iterator[str]:
    """What Pillow does not report about an AVIF: it reads all of them as 8 bits, and their colours as sRGB's."""
    if data[4:8] == b'ftyp':
        configuration, colours = data.find(b'av1C', 0, 4096), data.find(b'colrnclx', 0, 4096)
        if configuration > 0 and data[configuration + 6] & 0x40:
            yield 'more than 8 bits per channel'
        if colours > 0 and data[colours + 11] in (16, 18):  # PQ and HLG
            yield 'the HDR colour coding'
        elif colours > 0 and data[colours + 9] not in (1, 2) and not icc:  # BT.709's, as sRGB's are, or unspecified
            yield 'the primary colours (nclx, such as of Display P3)'


def _read_tiff(data: bytes) -> Picture:
    """Read with Pillow, or with OpenCV if there are more than 8 bits per channel."""
    try:
        tiff = tifffile.TiffFile(io.BytesIO(data))
        page: Any = tiff.pages.first
    except tifffile.TiffFileError as error:
        raise _Refused(f'not an image: {error}') from None
    except (IndexError, struct.error):
        raise _Refused('not an image that can be read: a TIFF that is empty or cut short') from None
    with tiff:
        samples, extra = page.samplesperpixel, tuple(int(sample) for sample in page.extrasamples)
        if page.subfiletype & 1:
            raise _Refused('found a small preview instead of the image, as in raw camera files')
        if page.bitspersample <= 8 and page.sampleformat != 2:
            try:
                picture = _read(data)
            except PIL.UnidentifiedImageError:
                raise _Refused('not an image that can be read: a TIFF that is damaged or of an unknown kind') from None
            picture.lost += ['a channel of unspecified meaning'] * (0 in extra)
            return picture
        known = {(1, 1, ()): 1, (2, 3, ()): 3, (2, 4, (2,)): 4}  # photometric, samples a pixel, extra samples
        channels = known.get((page.photometric, samples, extra))
        planes = page.planarconfig if samples > 1 else 1
        if (page.sampleformat, page.bitspersample) not in ((1, 16), (3, 32), (3, 64)) or not channels or planes != 1:
            raise _Refused(
                f'found a TIFF of {samples} x {page.bitspersample} bits, sample format {page.sampleformat:d}, '
                f'photometric {page.photometric:d}, planar configuration {page.planarconfig:d}, extra samples {extra}; '
                'allowed: 8 bits, or 16-bit integers or floats that are grey (black is 0), RGB or RGB with straight '
                'alpha, pixel by pixel'
            )
        if page.imagewidth * page.imagelength > _most_pixels():
            raise _Refused(f'found more pixels than is safe to decode; allowed: {_most_pixels():,}')
        icc = page.iccprofile
        lost = [f'all but the first of {len(tiff.pages)} frames or pages'] if len(tiff.pages) > 1 else []
    pixels = _decode_deep(data)  # OpenCV applies a TIFF's orientation
    if pixels.shape[2:] != (() if channels == 1 else (channels,)):
        raise _Refused(f'OpenCV reads {pixels.shape} from a TIFF of {channels} channels')
    return Picture(pixels.astype(np.float32) if pixels.dtype == np.float64 else pixels, icc, lost)


def _decode_deep(data: bytes) -> Image:
    """Decode with OpenCV, at full bit depth."""
    pixels: Image | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype.itemsize == 1:
        raise _Refused('not an image that OpenCV can read in full depth')
    return pixels


def _profile_space(image: Image) -> bytes:
    """The colour space that an ICC profile for such an image states."""
    return b'RGB ' if image.shape[2:] in ((3,), (4,)) else b'GRAY'


def _swapped(image: Image) -> Image:
    """RGB as BGR and RGBA as BGRA, or the reverse; grey unchanged."""
    if image.ndim == 2 or image.shape[2] == 2:
        return image
    return np.ascontiguousarray(image[..., [2, 1, 0, 3][: image.shape[2]]])


def _turned(image: Image, orientation: int) -> Image:
    """The image upright; ``orientation`` is EXIF's, which says where the stored first row and column belong."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


# ------------------------------ writing ------------------------------ #


def check_writable(path: str | Path, height: int, width: int) -> None:
    """ValueError unless an image of this size can be written under this name."""
    form = _FORMATS.get(Path(path).suffix.lower())
    if form is None:
        raise ValueError(f'{path}: found {Path(path).suffix!r}; allowed: a name that ends in {", ".join(_FORMATS)}')
    if max(height, width) > form.longest_side:
        raise ValueError(f'{path}: found {width}x{height} pixels; allowed in {form.name}: {form.longest_side:,} a side')


def write_image(path: str | Path, image: Image, icc: bytes | None = None) -> list[str]:
    """Write an image in the format of its suffix, completely or not at all.

    PNG, TIFF, WebP and BMP are lossless; JPEG and AVIF have quality 95 without chroma subsampling. TIFF holds all
    depths, PNG up to 16 bits, the others 8; deeper values are rounded. JPEG and BMP have no alpha. :func:`read_image`
    can read what is written.

    Args:
        image: pixels as in :class:`Picture`.
        icc: their colour profile.

    Returns:
        What the file does not keep of the image; empty if it keeps everything.

    Raises:
        ValueError: no format has this suffix, or the format cannot hold images of this size.
    """
    path = Path(path)
    check_writable(path, *image.shape[:2])
    form, lost = _FORMATS[path.suffix.lower()], []
    if image.shape[2:] in ((2,), (4,)) and not form.alpha:
        if (image[..., -1] < white(image.dtype)).any():
            lost.append('alpha')
        image = without_alpha(image)
    if image.dtype.itemsize > np.dtype(form.deepest).itemsize:
        lost.append(f'{image.dtype} (converted to {form.deepest})')
        image = to_depth(image, form.deepest)
    if form.name in ('WEBP', 'AVIF') or (image.dtype != np.uint8 and image.shape[2:] == (2,)):
        image = as_colours(image)  # they have no greys; OpenCV, which decodes what is deep, has none with alpha
    if icc and (not form.icc or icc[16:20] != _profile_space(image)):
        lost.append('the ICC profile')
        icc = None
    if form.name == 'TIFF':
        data = _encode_tiff(image, icc)
    elif image.dtype == np.uint16:
        data = _encode_deep_png(image, icc)
    else:
        stream = io.BytesIO()
        icc_option = {'icc_profile': icc} if icc else {}
        PIL.Image.fromarray(_swapped(image)).save(stream, form.name, **form.options, **icc_option)
        data = stream.getvalue()
    write_whole(path, data)
    return lost


def _encode_tiff(image: Image, icc: bytes | None) -> bytes:
    stream = io.BytesIO()
    options: dict[str, Any] = {'planarconfig': 'contig'} if image.ndim == 3 else {}
    if image.shape[2:] in ((2,), (4,)):
        options['extrasamples'] = ['unassalpha']
    options['photometric'] = 'rgb' if image.shape[2:] in ((3,), (4,)) else 'minisblack'
    options['predictor'] = image.dtype != np.float32  # of floats it takes a package more
    tifffile.imwrite(stream, _swapped(image), compression='zlib', iccprofile=icc, metadata=None, **options)
    return stream.getvalue()


def _encode_deep_png(image: Image, icc: bytes | None) -> bytes:
    done, encoded = cv2.imencode('.png', image)
    assert done
    data: bytes = encoded.tobytes()
    if icc:
        # Not all versions of OpenCV that are in use write profiles. The chunk belongs right after the header's.
        chunk = b'iCCP' + b'ICC profile\0\0' + zlib.compress(icc)
        data = data[:33] + struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk)) + data[33:]
    return data
