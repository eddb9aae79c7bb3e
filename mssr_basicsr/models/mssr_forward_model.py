"""The forward stage: iterative magnitude pruning with rewinding and stochastic self-distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from mssr_basicsr.adapter.ranks import broadcast_from_rank_0
from mssr_basicsr.archs.feature_taps import ImageFinisher, record_features
from mssr_basicsr.foundation.checks import OptionError, require_int, require_iterations, require_one_of
from mssr_basicsr.losses.ssd_loss import SSDLoss
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import mask_of, num_kept, prune
from mssr_basicsr.method.rewinding import rewind_weights
from mssr_basicsr.method.schedules import Stage
from mssr_basicsr.models.mssr_model import MSSRModel, frozen_copy


@MODEL_REGISTRY.register()
class MSSRForwardModel(MSSRModel):
    """Trains the dense network, prunes its smallest weights, rewinds the survivors, trains again; level by level.

    Options under ``train``:
        level_iter: iterations of each level that is trained, or a list with those of each; ``total_iter`` is their sum.
        first_level: 0 (default), or 1 to take ``path.pretrain_network_g``, a stock checkpoint of the backbone, as
            level 0 and start by pruning it. The rewind point is then this checkpoint.
        criterion: which weights to prune, a name in ``CRITERION_REGISTRY``. Default: ``global_magnitude``.
        rewind: what happens to the survivors: ``weights`` (default, the paper) sets them to the rewind point; ``lr``
            keeps them and restarts the LR schedule (Renda et al. 2020); ``none`` keeps them and goes on with the last
            learning rate of level 0 (fine-tuning).
        rewind_iter: the iteration of level 0 whose weights are the rewind point. Default: 10 % of level 0's.
        ssd_opt: options of :class:`SSDLoss`; without them there is no self-distillation. The teacher of level k is
            level k - 1's ticket; level 0 has none.

    The checkpoint holds, beside BasicSR's ``params`` and ``params_ema``, the rewind point (``rewind``) and, with SSD,
    the teacher (``ticket``), plain state dicts of the backbone. A pruned weight in it has the value it was pruned with.
    """

    distillation_option = 'ssd_opt'

    def plan_stages(self) -> list[Stage]:
        train_opt = self._train_opt
        first_level = require_int('train.first_level', train_opt.get('first_level', 0), 0, 1)
        if first_level == 1 and self.opt['path'].get('pretrain_network_g') is None:
            raise OptionError(
                'path.pretrain_network_g', None, 'a checkpoint of the backbone, with train.first_level: 1'
            )
        levels = range(first_level, self.network.smallest_level + 1)
        level_iter = require_iterations('train.level_iter', train_opt.get('level_iter'), len(levels))
        self.criterion_name = train_opt.get('criterion', 'global_magnitude')
        require_one_of('train.criterion', self.criterion_name, CRITERION_REGISTRY)
        self.rewind = train_opt.get('rewind', 'weights')
        require_one_of('train.rewind', self.rewind, ('weights', 'lr', 'none'))
        last = level_iter[0] if first_level == 0 else 0
        self.rewind_iter = require_int('train.rewind_iter', train_opt.get('rewind_iter', last // 10), 0, last)
        return [Stage(level, num_iter) for level, num_iter in zip(levels, level_iter)]

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.rewind_point = frozen_copy(self.network.backbone)
        self.teacher = frozen_copy(self.network.backbone)
        self.finisher = ImageFinisher(self.teacher, self.network.feature_taps)
        if self.cri_distill is not None:
            if not isinstance(self.cri_distill, SSDLoss):
                raise OptionError(
                    'train.ssd_opt.type', self._train_opt['ssd_opt']['type'], 'SSDLoss, or one of its kind'
                )
            self.cri_distill.check_depths(self.network.feature_taps)
            self.add_to_pixel_loss(self._ssd_loss)

    def levels_to_validate(self) -> Sequence[int]:
        return [self.network.level]

    # ------------------------------ from level to level ------------------------------ #

    def begin_stage(self, stage: Stage) -> None:
        if stage == self.stages[0]:
            self._mark_rewind_point()
            if stage.level == 1:
                self.validate_now(0)  # no training of level 0 is there to be validated
        if stage.level > 0:
            self.teacher.load_state_dict(self.network.export(stage.level - 1))
            self._prune_to(stage.level)
            if self.rewind == 'weights':
                masks = mask_of(self.network.get_level_map(), stage.level)
                rewind_weights(self.network.backbone, self.rewind_point, masks)

    def _prune_to(self, level: int) -> None:
        """Remove the weights with the lowest scores; rank 0 decides which."""
        network = self.network
        level_map, weights = network.get_level_map(), network.prunable_weights()
        if self.opt['rank'] == 0:
            generator = torch.Generator().manual_seed(self.seed + level)
            scores = CRITERION_REGISTRY.get(self.criterion_name)(
                {name: weight.detach() for name, weight in weights.items()}, mask_of(level_map, level), generator
            )
            total = sum(weight.numel() for weight in weights.values())
            network.set_level_map(prune(level_map, scores, level, num_kept(total, network.sparsity[level])))
        broadcast_from_rank_0(network.get_level_map())
        network.level = level
        emptied = [name for name, mask in mask_of(network.get_level_map(), level).items() if not mask.any()]
        if emptied:  # a residual branch may go, but without its last convolution a network gives one flat image
            get_root_logger().warning(f'Level {level} has nothing left of {", ".join(emptied)}.')

    def _mark_rewind_point(self) -> None:
        self.rewind_point.load_state_dict(self.network.backbone.state_dict())

    def freeze_weights(self, stage: Stage) -> FrozenWeights:
        """Pruned weights stay what they were when they were pruned, whatever the weight decay."""
        masks = mask_of(self.network.get_level_map(), stage.level)
        return FrozenWeights(self.network.backbone, masks, others_train=True)

    def _restart_optimizer(self, stage: Stage) -> None:
        last_rates = self.get_current_learning_rate()
        super()._restart_optimizer(stage)
        if self.rewind == 'none' and stage != self.stages[0]:
            self.schedulers.clear()
            for group, rate in zip(self.optimizer_g.param_groups, last_rates):
                group['lr'] = group['initial_lr'] = rate

    # ------------------------------ one iteration ------------------------------ #

    def optimize_parameters(self, current_iter: int) -> None:  # type: ignore[override]  # as SRModel's
        if self.cri_distill is not None and self.network.level > 0:
            self.taps = self.cri_distill.sample_taps(
                self.network.feature_taps, f'{self.seed}, iteration {current_iter}'
            )
            with record_features(self.network.backbone, self.taps) as self.features:
                super().optimize_parameters(current_iter)
        else:
            super().optimize_parameters(current_iter)
        if current_iter == self.rewind_iter and self.network.level == 0:
            self._mark_rewind_point()

    def _ssd_loss(self, output: Tensor, gt: Tensor) -> dict[str, Tensor]:
        if self.network.level == 0:
            return {}
        images = [self.finisher.finish(self.lq, tap, self.features[tap]) for tap in self.taps]
        return {'l_ssd': self.cri_distill(images, gt, lambda: self.teacher(self.lq))}

    # ------------------------------ saving and resuming ------------------------------ #

    def extra_networks(self) -> dict[str, nn.Module]:
        networks = {'rewind': self.rewind_point}
        if self.cri_distill is not None:
            networks['ticket'] = self.teacher
        return networks

    def resume_extra_networks(self, checkpoint: dict[str, Any]) -> None:
        for key, network in self.extra_networks().items():
            if key not in checkpoint:
                raise OptionError('path.resume_state', self.opt['path']['resume_state'], f'one with a {key} beside it')
            network.load_state_dict(checkpoint[key])
