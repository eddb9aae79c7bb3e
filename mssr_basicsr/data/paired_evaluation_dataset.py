"""A validation set whose grey files stay grey, as in published results."""

from __future__ import annotations

from typing import Any

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import imfrombytes
from basicsr.utils.registry import DATASET_REGISTRY

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.patching import replaced


@DATASET_REGISTRY.register()
class PairedEvaluationDataset(PairedImageDataset):
    """BasicSR's PairedImageDataset, in which the ground truth of a grey file has one channel.

    The network still gets its LR image as three equal channels. ``calculate_psnr_published`` and
    ``calculate_ssim_published`` compare the result with the file's own values; BasicSR's own metrics reject it. The
    options are those of PairedImageDataset. With ``color: y``, all images have one channel, and that of a grey file is
    the file's own values, from 0 to 1: it is Y itself, where BasicSR would convert it to 16/255 to 235/255. So is that
    of an LR image in equal colours, if its ground truth is a grey file.

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
        gt_is_grey = self._is_grey(index, 'gt')
        if self.opt.get('color') != 'y':
            if gt_is_grey:
                pair['gt'] = pair['gt'][:1]
        elif gt_is_grey or self._is_grey(index, 'lq'):
            with replaced(self, 'opt', {**self.opt, 'color': None}):
                as_colours = super().__getitem__(index)
            for part in ('gt', 'lq') if gt_is_grey else ('lq',):
                pair[part] = as_colours[part][:1]
        return pair

    def _is_grey(self, index: int, part: str) -> bool:
        assert self.file_client is not None  # it is made with the first pair
        stored = imfrombytes(self.file_client.get(self.paths[index][f'{part}_path'], part), flag='unchanged')
        return bool(stored.ndim == 2)
