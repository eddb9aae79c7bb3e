"""What is known about an architecture: its input, its trunk, and other tools' names for its tensors.

This is the only place for it. A package with its own architecture adds what it knows::

    from mssr_basicsr import register_architecture

    register_architecture(
        'HAT',
        channels=lambda options: options.get('in_chans', 3),
        multiple=lambda options: options.get('window_size', 7),
        trunk='layers',
    )

All of it is optional: otherwise channels and multiple are found by running the network on small images, and the trunk
by looking for a series of blocks of the same class. If something cannot be found, an error names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError, first_line
from mssr_basicsr.foundation.unchanged import unchanged

FromOptions = Callable[[Mapping[str, Any]], int]
Rename = Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]

_CHANNELS = (3, 1)  # of images, in the order in which they are tried
_MULTIPLES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)  # that are tried


@dataclass(frozen=True)
class Architecture:
    """Facts about one architecture. What is None is detected where that is possible; elsewhere it is an error."""

    #: How many channels its images have, from its options.
    channels: FromOptions | None = None
    #: What height and width of its input must be multiples of, from its options.
    multiple: FromOptions | None = None
    #: The name of the container (``nn.Sequential`` or ``nn.ModuleList``) that its trunk's blocks are in.
    trunk: str | None = None
    #: A plain state dict, and the options, to the state dict that spandrel opens.
    spandrel: Rename | None = None


_KNOWN: dict[str, Architecture] = {}


def register_architecture(
    name: str,
    *,
    channels: FromOptions | None = None,
    multiple: FromOptions | None = None,
    trunk: str | None = None,
    spandrel: Rename | None = None,
) -> None:
    """Register facts about the architecture registered with BasicSR as ``name``; see :class:`Architecture`.

    Raises:
        KeyError: facts about it are already registered.
    """
    if name in _KNOWN:
        raise KeyError(f'an architecture called {name} is already registered')
    _KNOWN[name] = Architecture(channels, multiple, trunk, spandrel)


def reference_tensor(network: nn.Module) -> Tensor:
    """A tensor with the dtype and the device that the network computes with, even if it has no parameters."""
    return next(network.parameters(), torch.empty(0, dtype=torch.float32, device='cpu'))


def facts_about(name: str) -> Architecture:
    """What is known about the architecture ``name``, possibly nothing."""
    return _KNOWN.get(name, Architecture())


# ------------------------------ what a network takes and gives ------------------------------ #


class ImageSpec(NamedTuple):
    """What images a network takes, and its upscaling factor."""

    channels: int
    multiple: int  #: of which height and width must be multiples
    scale: int  #: the upscaling factor


def find_image_spec(network: nn.Module, options: Mapping[str, Any]) -> ImageSpec:
    """What images ``network`` takes and returns, found by running it on a small one.

    Args:
        network: the backbone, on any device. Its modes, weights, buffers and the random state are not changed.
        options: its options, with its type.

    Raises:
        ValueError: it does not run on (1, C, H, W) with any of the channels and sizes tried, or its output is not an
            image with C channels and an integer multiple of the size; the text names the architecture.
    """
    known = facts_about(options['type'])
    all_channels = _CHANNELS if known.channels is None else (known.channels(options),)
    multiples = _MULTIPLES if known.multiple is None else (known.multiple(options),)
    refused = ''
    weight = reference_tensor(network)
    random_state_kept = torch.random.fork_rng([weight.device] if weight.is_cuda else [])
    with unchanged(network), random_state_kept, torch.no_grad():
        network.eval()
        for channels in all_channels:
            for multiple in multiples:
                # The two have no common divisor, so that ``multiple`` is the largest number of which both sides are
                # multiples; and they are long enough for networks that mirror the image at its edges.
                sides = (11, 13) if multiple < 8 else (2, 3)
                shape = (1, channels, *(side * multiple for side in sides))
                try:
                    given = network(_small_image(network, shape))
                except Exception as error:  # whatever a network raises of what it does not take
                    refused = refused or first_line(error)
                    continue
                scale = _scale(shape, given)
                if scale is not None:
                    return ImageSpec(channels, multiple, scale)
                is_image = isinstance(given, Tensor) and given.ndim == 4
                refused = f'it returns {tuple(given.shape) if is_image else type(given).__name__} for {shape}'
                if not is_image:
                    break
    tried = f'{" or ".join(map(str, all_channels))} channels and sizes that are multiples of up to {multiples[-1]}'
    raise ValueError(
        f'{options["type"]}: found a network that upscales no image of {tried} ({refused}); allowed: one that does, or '
        'one whose input is described with register_architecture'
    )


def check_scale(network: nn.Module, options: Mapping[str, Any], scale: int | None) -> int:
    """The upscaling factor of ``network``; OptionError if the stated ``scale`` differs.

    For a network that takes no single images, such as one for video, a stated ``scale`` is trusted.
    """
    try:
        found = find_image_spec(network, options).scale
    except ValueError:
        if scale is None:
            raise
        return scale
    if scale is not None and scale != found:
        raise OptionError('scale', scale, f'{found}, the factor by which the network upscales')
    return found


def _small_image(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    weight = reference_tensor(network)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), device='cpu').to(weight)


def _scale(shape: tuple[int, ...], given: Any) -> int | None:
    """The integer factor between the sizes of two images with the same channels, None if there is none."""
    if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[:2] != shape[:2]:
        return None
    scale: int = given.shape[2] // shape[2]
    return scale if scale and given.shape[2:] == (scale * shape[2], scale * shape[3]) else None


# ------------------------------ names in other tools ------------------------------ #


def for_spandrel(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of the backbone that ``options`` name, in the form that spandrel (chaiNNer's loader) opens.

    Raises:
        OptionError: a backbone or an option that spandrel is not known to support.
    """
    rename = facts_about(options['type']).spandrel
    if rename is None:
        allowed = ', '.join(sorted(name for name, known in _KNOWN.items() if known.spandrel is not None))
        raise OptionError('--spandrel', options['type'], f'{allowed}, which spandrel supports')
    return rename(state, options)


def _same_names(**fixed: Any) -> Rename:
    """Of a network that has the same names in spandrel, where the options ``fixed`` always have these values."""

    def rename(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
        _require_fixed(options, fixed)
        return dict(state)

    return rename


def _require_fixed(options: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """OptionError if one of the options has another value than the one that it has in spandrel."""
    for option, value in fixed.items():
        if options.get(option, value) != value:
            raise OptionError('--spandrel', f'{option} = {options[option]}', str(value))


# BasicSR's name, and the authors', which spandrel knows. {groups} and {blocks} are how many there are: a body ends with
# a convolution.
_RCAN = {
    r'conv_first': 'head.0',
    r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.1': r'body.\1.body.\2.body.3.conv_du.0',
    r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.3': r'body.\1.body.\2.body.3.conv_du.2',
    r'body\.(\d+)\.residual_group\.(\d+)\.rcab\.(\d)': r'body.\1.body.\2.body.\3',
    r'body\.(\d+)\.conv': r'body.\1.body.{blocks}',
    r'conv_after_body': 'body.{groups}',
    r'upsample\.(\d+)': r'tail.0.\1',
    r'conv_last': 'tail.1',
}


def _rcan_names(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """RCAN's tensors by its authors' names; its mean colour becomes two fixed convolutions, as it is there."""
    _require_fixed(options, {'img_range': 255.0, 'res_scale': 1})
    groups, blocks = options.get('num_group', 10), options.get('num_block', 16)
    renamed = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit('.', 1)
        pattern = next(pattern for pattern in _RCAN if re.fullmatch(pattern, layer))
        known = re.sub(pattern, _RCAN[pattern], layer).format(groups=groups, blocks=blocks)
        renamed[f'{known}.{kind}'] = tensor
    mean = 255.0 * torch.tensor(options.get('rgb_mean', (0.4488, 0.4371, 0.4040)), dtype=torch.float32)
    for name, bias in (('sub_mean', -mean), ('add_mean', mean)):
        renamed[f'{name}.weight'], renamed[f'{name}.bias'] = torch.eye(3).view(3, 3, 1, 1), bias
    return renamed


# ------------------------------ BasicSR's own ------------------------------ #


def _num_in_ch(options: Mapping[str, Any]) -> int:
    return int(options.get('num_in_ch', 3))


def _any_size(options: Mapping[str, Any]) -> int:
    return 1


register_architecture('EDSR', channels=_num_in_ch, multiple=_any_size, trunk='body')
register_architecture('MSRResNet', channels=_num_in_ch, multiple=_any_size, trunk='body')
register_architecture('RCAN', channels=_num_in_ch, multiple=_any_size, trunk='body', spandrel=_rcan_names)
register_architecture(
    'RRDBNet',
    channels=_num_in_ch,
    multiple=lambda options: {1: 4, 2: 2}.get(options.get('scale', 4), 1),  # it begins with a pixel unshuffle
    trunk='body',
    spandrel=_same_names(num_grow_ch=32),
)
register_architecture(
    'SRVGGNetCompact',
    channels=_num_in_ch,
    multiple=_any_size,
    trunk='body',
    spandrel=_same_names(act_type='prelu'),
)
register_architecture(
    'SwinIR',
    channels=lambda options: int(options.get('in_chans', 3)),
    multiple=lambda options: int(options.get('window_size', 7)),
    trunk='layers',
    spandrel=_same_names(img_range=1, ape=False, patch_norm=True, qkv_bias=True, qk_scale=None),
)
