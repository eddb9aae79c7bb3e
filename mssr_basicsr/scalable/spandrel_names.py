"""RCAN for spandrel, the loader of chaiNNer, which knows its authors' names of the tensors and not BasicSR's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mssr_basicsr.scalable.errors import ScalableFileError

# BasicSR's name, and the authors'. {groups} and {blocks} are how many there are: a body ends with a convolution.
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
# In spandrel's RCAN these are fixed.
_FIXED = {'img_range': 255.0, 'res_scale': 1}


def for_spandrel(state: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of the backbone that ``options`` name, as spandrel opens it.

    RCAN's tensors are renamed, and its mean colour becomes the two fixed convolutions that it is there. Other backbones
    have the same names in both.

    Raises:
        ScalableFileError: a backbone or an option that spandrel does not know.
    """
    if options['type'] in ('EDSR', 'MSRResNet'):
        raise ScalableFileError(f'--spandrel: found {options["type"]}, which spandrel does not open')
    if options['type'] != 'RCAN':
        return dict(state)
    for option, value in _FIXED.items():
        if options.get(option, value) != value:
            raise ScalableFileError(f'--spandrel: found {option} = {options[option]}; allowed: {value}')
    groups, blocks = options.get('num_group', 10), options.get('num_block', 16)
    renamed = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit('.', 1)
        pattern = next(pattern for pattern in _RCAN if re.fullmatch(pattern, layer))
        known = re.sub(pattern, _RCAN[pattern], layer).format(groups=groups, blocks=blocks)
        renamed[f'{known}.{kind}'] = tensor
    mean = 255.0 * torch.tensor(options.get('rgb_mean', (0.4488, 0.4371, 0.4040)))
    for name, bias in (('sub_mean', -mean), ('add_mean', mean)):
        renamed[f'{name}.weight'], renamed[f'{name}.bias'] = torch.eye(3).view(3, 3, 1, 1), bias
    return renamed
