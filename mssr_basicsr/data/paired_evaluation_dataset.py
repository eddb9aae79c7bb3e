"""A validation set whose grey files stay grey, as in published results."""

from __future__ import annotations

from typing import Any

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import imfrombytes
from basicsr.utils.registry import DATASET_REGISTRY

from mssr_basicsr.foundation.checks import OptionError


@DATASET_REGISTRY.register()
class PairedEvaluationDataset(PairedImageDataset):
    """BasicSR's PairedImageDataset, in which the ground truth of a grey file has one channel.

    The network still gets its LR image as three equal channels. ``calculate_psnr_published`` and
    ``calculate_ssim_published`` compare the result with the file's own values; BasicSR's own metrics reject it. The
    options are those of PairedImageDataset.

    Raises:
        OptionError: it is used as a training set.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['phase'] == 'train':
            allowed = 'a training dataset, such as PairedImageDataset (this one is for validation and testing)'
            raise OptionError('datasets.train.type', opt['type'], allowed)
        super().__init__(opt)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair: dict[str, Any] = super().__getitem__(index)
        assert self.file_client is not None  # it is made with the first pair
        stored = imfrombytes(self.file_client.get(self.paths[index]['gt_path'], 'gt'), flag='unchanged')
        if stored.ndim == 2:
            pair['gt'] = pair['gt'][:1]
        return pair
