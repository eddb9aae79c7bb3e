"""Backward stages that were tried and are not in the plugin: model classes for scripts/study.py.

python scripts/study_variants.py -opt OPTIONS   # python -m mssr_basicsr.train, with these classes registered
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import delta_of
from mssr_basicsr.method.schedules import Stage
from mssr_basicsr.models.mssr_backward_model import MSSRBackwardModel
from mssr_basicsr.train import main


@MODEL_REGISTRY.register()
class PrivateOthersModel(MSSRBackwardModel):
    """Biases, and whatever else pruning never removes, train at every level: each level has its own.

    The one set of weights has those of the last level only, so a level is validated while it is at work.
    """

    def levels_to_validate(self) -> Sequence[int]:
        return [self.network.level]

    def freeze_weights(self, stage: Stage) -> FrozenWeights:
        delta = delta_of(self.network.get_level_map(), stage.level, self._smaller(stage))
        return FrozenWeights(self.network.backbone, delta, others_train=True)

    def check_result(self, stage: Stage) -> None:
        pass

    def write_result(self) -> None:
        pass


@MODEL_REGISTRY.register()
class JointModel(MSSRBackwardModel):
    """Before anything is frozen, all weights train for ``train.joint_iter`` iterations on two levels at a time.

    These are the smallest, and a larger one at random; so the smallest level is not its ticket any more.
    """

    def plan_stages(self) -> list[Stage]:
        return [Stage(self.network.smallest_level, self._train_opt['joint_iter']), *super().plan_stages()]

    def freeze_weights(self, stage: Stage) -> FrozenWeights:
        if stage != self.stages[0]:
            return super().freeze_weights(stage)
        self._digests: dict[int, str] = {}
        return FrozenWeights(self.network.backbone, {}, others_train=True)  # nothing is frozen

    def _restart_optimizer(self, stage: Stage) -> None:
        super()._restart_optimizer(stage)
        if stage == self.stages[0]:
            self.optimizer_g.register_step_pre_hook(self._add_gradient_of_a_larger_level)

    def _add_gradient_of_a_larger_level(self, *_: Any) -> None:
        smallest = self.network.level
        self.set_level(int(torch.randint(smallest, ())))
        loss: Tensor = self.cri_pix(self.net_g(self.lq), self.gt)
        loss.backward()
        self.set_level(smallest)


if __name__ == '__main__':
    main()
