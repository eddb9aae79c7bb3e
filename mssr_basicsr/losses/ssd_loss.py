"""Stochastic self-distillation (SSD): the larger network gives feedback on the small one's features."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Callable

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from mssr_basicsr.foundation.checks import OptionError, is_number, require_int, require_one_of
from mssr_basicsr.losses.building import build_checked_loss
from mssr_basicsr.losses.distillation_term import require_same_shape


@LOSS_REGISTRY.register()
class SSDLoss(nn.Module):
    """The loss of the images that the larger network finishes from the small network's features.

    In each iteration a few depths are drawn at random. The small network's features at each of them are fed into the
    larger network, which finishes the image from there (:class:`ImageFinisher`).

    Args:
        num_depths: how many different depths each iteration samples, or ``'all'``.
        criterion: options of the loss that compares two images. Default: ``{type: L1Loss}``.
        loss_weight: the weight of the whole term. If the YAML does not set it, the pixel loss's weight is used.
        target: what the finished images are compared with: ``gt``, the ground truth; ``teacher``, the larger network's
            own output; ``both`` takes the mean of the two losses. The abstract leaves this open; the default is our
            choice.
        batch_share: the share of a batch that is distilled, above 0 and up to 1. With 0.5, each iteration distils half
            of its images, at half the cost. The abstract does not mention this.
    """

    def __init__(
        self,
        num_depths: int | str = 2,
        criterion: Mapping[str, Any] | None = None,
        loss_weight: float = 1.0,
        target: str = 'gt',
        batch_share: float = 1.0,
    ) -> None:
        super().__init__()
        if num_depths != 'all':
            num_depths = require_int('train.ssd_opt.num_depths', num_depths, 1, note=", or 'all'")
        require_one_of('train.ssd_opt.target', target, ('gt', 'teacher', 'both'))
        if not is_number(batch_share) or not 0 < batch_share <= 1:
            raise OptionError('train.ssd_opt.batch_share', batch_share, 'a share above 0 and up to 1')
        if not is_number(loss_weight) or not 0 <= loss_weight < math.inf:
            raise OptionError('train.ssd_opt.loss_weight', loss_weight, 'a number of at least 0')
        self.num_depths = num_depths
        self.batch_share = batch_share
        self.criterion = build_checked_loss('train.ssd_opt.criterion', criterion or {'type': 'L1Loss'})
        self.loss_weight = loss_weight
        self.target = target

    def check_depths(self, taps: Sequence[str]) -> None:
        """Raise OptionError if the network has no taps, or fewer than ``num_depths``."""
        if not taps:
            raise OptionError('network_g.feature_taps', None, "patterns of the backbone's blocks: no trunk was found")
        if self.num_depths != 'all':
            require_int('train.ssd_opt.num_depths', self.num_depths, 1, len(taps), " (the feature taps), or 'all'")

    def sample_taps(self, taps: Sequence[str], seed: str) -> list[str]:
        """The taps for one iteration, shallowest first. The same seed gives the same taps on every rank."""
        if self.num_depths == 'all':
            return list(taps)
        return [taps[i] for i in sorted(random.Random(seed).sample(range(len(taps)), int(self.num_depths)))]

    def sample_images(self, batch_size: int, seed: str) -> slice:
        """Which images of a batch one iteration distils: consecutive ones, since the order within a batch is random.

        The same seed gives the same positions on every rank; each rank has different images.
        """
        count = max(1, round(self.batch_share * batch_size))
        start = random.Random(f'{seed}, images').randrange(batch_size - count + 1)
        return slice(start, start + count)

    def forward(self, images: Sequence[Tensor], gt: Tensor, teacher: Callable[[], Tensor]) -> Tensor:
        """The weighted mean over the depths.

        Args:
            images: the finished images, one for each depth, each (N, C, H, W).
            gt: the ground truth, (N, C, H, W).
            teacher: returns the larger network's own output, (N, C, H, W); only called if ``target`` needs it.

        Raises:
            OptionError: the images differ in shape, or the criterion does not return one tensor.
        """
        targets = [] if self.target == 'teacher' else [gt]
        if self.target != 'gt':
            with torch.no_grad():
                targets.append(teacher())
        pairs = [(image, target) for image in images for target in targets]
        losses = [self.criterion(image, target) for image, target in pairs]
        for loss, (image, target) in zip(losses, pairs):
            require_same_shape('ssd_opt', image, target)
            if not isinstance(loss, Tensor):
                allowed = f'a loss that returns one tensor, not a {type(loss).__name__}'
                raise OptionError('train.ssd_opt.criterion', type(self.criterion).__name__, allowed)
        return self.loss_weight * torch.stack(losses).mean()
