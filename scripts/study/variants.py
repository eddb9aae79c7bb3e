"""Backward stages that were tried and are not in the plugin: model classes for scripts/study/study.py.

python scripts/study/variants.py -opt OPTIONS   # python -m mssr_basicsr.train, with these classes registered
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import delta_of
from mssr_basicsr.method.schedules import LevelTraining
from mssr_basicsr.models.backward_stage import BackwardStage
from mssr_basicsr.models.mssr_model import build_extended
from mssr_basicsr.train import main


@MODEL_REGISTRY.register()
def PrivateOthersModel(opt: dict[str, Any]) -> Any:
    """A BasicSR model class with :class:`PrivateOthers`."""
    return build_extended(PrivateOthers, 'MSSRBackwardModel', opt)


@MODEL_REGISTRY.register()
def JointModel(opt: dict[str, Any]) -> Any:
    """A BasicSR model class with :class:`Joint`."""
    return build_extended(Joint, 'MSSRBackwardModel', opt)


class PrivateOthers(BackwardStage):
    """Biases, and whatever else pruning never removes, train at every level: each level has its own.

    The one set of weights has those of the last level only, so a level is validated while it is at work.
    """

    def levels_to_validate(self) -> Sequence[int]:
        return [self.network.level]

    def freeze_weights(self, training: LevelTraining) -> FrozenWeights:
        delta = delta_of(self.network.get_level_map(), training.level, self._grown_from(training))
        return FrozenWeights(self.network.backbone, delta, others_train=True)

    def check_result(self, training: LevelTraining) -> None:
        pass

    def end_level(self, training: LevelTraining) -> None:
        self._digests: dict[int, str] = {}
        super().end_level(training)

    def write_result(self) -> None:
        pass


class Joint(BackwardStage):
    """Before anything is frozen, all weights train for ``train.joint_iter`` iterations on two levels at a time.

    These are the smallest, and a larger one at random; so the smallest level is not its ticket any more.
    """

    def make_plan(self) -> list[LevelTraining]:
        joint = LevelTraining(self.network.smallest_level, self._train_opt['joint_iter'])
        return [joint, *super().make_plan()]

    def freeze_weights(self, training: LevelTraining) -> FrozenWeights:
        if training != self.plan.first:
            return super().freeze_weights(training)
        return FrozenWeights(self.network.backbone, {}, others_train=True)  # nothing is frozen

    def restart_training(self, training: LevelTraining) -> None:
        super().restart_training(training)
        if training == self.plan.first:
            self._digests = {}
            self.optimizer_g.register_step_pre_hook(self._add_gradient_of_a_larger_level)

    def _add_gradient_of_a_larger_level(self, *_: Any) -> None:
        smallest = self.network.level
        self.set_level(int(torch.randint(smallest, ())))
        loss: Tensor = self.cri_pix(self.net_g(self.lq), self.gt)
        loss.backward()
        self.set_level(smallest)


if __name__ == '__main__':
    main()
