"""The protocol of published results as BasicSR metrics, for validation sets of type PairedEvaluationDataset."""

from __future__ import annotations

from basicsr.utils.registry import METRIC_REGISTRY

from mssr_basicsr.scalable.metrics import published_metrics
from mssr_basicsr.scalable.pixels import Image


@METRIC_REGISTRY.register()
def calculate_psnr_published(
    img: Image, img2: Image, crop_border: int, round_y: bool = False, better: str = 'higher'
) -> float:
    """PSNR in dB as computed by :func:`published_metrics`.

    Args:
        img: the upscaled image, (H, W) or (H, W, 3) BGR, from 0 to 255.
        img2: the ground truth; (H, W) if it is a grey file.
        crop_border: how many pixels to ignore at each edge.
        round_y: whether Y is rounded to 8 bits.
        better: BasicSR's option of every metric, for its log line of the best validation; of no effect here.
    """
    return published_metrics(img, img2, crop_border, round_y)['psnr']


@METRIC_REGISTRY.register()
def calculate_ssim_published(
    img: Image, img2: Image, crop_border: int, round_y: bool = False, better: str = 'higher'
) -> float:
    """SSIM as computed by :func:`published_metrics`; same arguments as :func:`calculate_psnr_published`."""
    return published_metrics(img, img2, crop_border, round_y)['ssim']
