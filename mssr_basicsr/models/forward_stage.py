"""The forward stage: iterative magnitude pruning with rewinding and stochastic self-distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from mssr_basicsr.adapter.ranks import broadcast_from_rank_0
from mssr_basicsr.adapter.records import level_file
from mssr_basicsr.adapter.resuming import random_state, set_random_state
from mssr_basicsr.adapter.stage_options import ForwardOptions
from mssr_basicsr.archs.mssr_arch import require_nested
from mssr_basicsr.foundation.buffers import saved_buffers
from mssr_basicsr.foundation.checkpoints import CheckpointError, read_checkpoint
from mssr_basicsr.foundation.checks import OptionError, require_int, require_iterations
from mssr_basicsr.losses.self_distillation import SelfDistillation
from mssr_basicsr.losses.ssd_loss import SSDLoss
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import mask_of
from mssr_basicsr.method.rewinding import rewind_weights
from mssr_basicsr.method.schedules import LevelTraining
from mssr_basicsr.models.distilling_model import frozen_copy
from mssr_basicsr.models.levelwise_training import LevelwiseTraining, start_from_ema
from mssr_basicsr.scalable.errors import ScalableFileError


class ForwardStage(LevelwiseTraining):
    """Trains the dense network, then for each level prunes the smallest weights, rewinds the rest and trains again.

    The options are :class:`ForwardOptions`. Besides BasicSR's ``params`` and ``params_ema``, the checkpoint holds the
    rewind point (``rewind``) and, with self-distillation, the ``teacher``, both as plain state dicts of the backbone. A
    pruned weight in it has the value that it was pruned with.
    """

    options_class = ForwardOptions
    options: ForwardOptions

    def __init__(self, opt: dict[str, Any]) -> None:
        if (opt.get('train') or {}).get('first_level') == 1:
            start_from_ema(opt)
        super().__init__(opt)

    def make_plan(self) -> list[LevelTraining]:
        options, paths = self.options, self.opt['path']
        if options.first_level == 1 and paths.get('pretrain_network_g') is None:
            allowed = 'a checkpoint of the backbone, with train.first_level: 1'
            raise OptionError('path.pretrain_network_g', None, allowed)
        new = not paths.get('resume_state')  # of a resumed run, BasicSR sets pretrain_network_g
        if new and options.first_level == 0 and paths.get('pretrain_network_g') is not None:
            get_root_logger().info(
                'Level 0 trains from path.pretrain_network_g; to prune that network as it is, set train.first_level: 1.'
            )
        if new and options.first_level == 1:
            self._require_dense(paths['pretrain_network_g'])
        levels = range(options.first_level, self.network.smallest_level + 1)
        level_iter = require_iterations('train.level_iter', options.level_iter, len(levels))
        last = level_iter[0] if options.first_level == 0 else 0
        rewind_iter = last // 10 if options.rewind_iter is None else options.rewind_iter
        self.rewind_iter = require_int('train.rewind_iter', rewind_iter, 0, last)
        return [LevelTraining(level, num_iter) for level, num_iter in zip(levels, level_iter)]

    def scheduled_trainings(self) -> Sequence[LevelTraining]:
        """All, but with ``rewind: none``, which keeps the last learning rate, only the first."""
        trainings = self.plan.trainings
        return trainings[:1] if self.options.rewind == 'none' else trainings

    def _require_dense(self, path: str) -> None:
        """Raise OptionError if a forward stage has pruned the network in ``path`` since its level 0 ended."""
        network = self.network
        if any((levels < network.smallest_level).any() for levels in network.get_level_map().values()):
            try:
                require_nested(read_checkpoint(path))
            except CheckpointError as error:
                allowed = f'a trained network to use as level 0, such as {level_file(0)} beside it; {error}'
                raise OptionError('path.pretrain_network_g', path, allowed) from error

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.rewind_point = frozen_copy(self.network.backbone)
        self.self_distillation = self._build_self_distillation()
        self._tried_out = False
        if self.self_distillation is not None:
            self.distil_by('ssd_opt', self._ssd_term)

    def report_unpackable(self, option: str, found: object, error: ScalableFileError) -> None:
        """Only warn, since this stage writes no ``.mssr`` file."""
        get_root_logger().warning(
            f'{option}: MSSRBackwardModel will refuse it, since no .mssr file can hold it ({error}).'
        )

    def _build_self_distillation(self) -> SelfDistillation | None:
        loss, taps = self.build_distillation_loss('ssd_opt', self.options.ssd_opt), self.network.feature_taps
        if loss is None:
            return None
        if not isinstance(loss, SSDLoss):
            raise OptionError('train.ssd_opt.type', self.options.ssd_opt['type'], 'SSDLoss or a class derived from it')
        loss.check_depths(taps)
        self.teacher = frozen_copy(self.network.backbone)
        return SelfDistillation(loss, self.teacher, taps)

    def levels_to_validate(self) -> Sequence[int]:
        return [self.network.level]

    # ------------------------------ from level to level ------------------------------ #

    def begin_run(self) -> None:
        """Put all weights into every level, even if the network that the run starts with is already scalable."""
        network = self.network
        network.set_level_map(network.whole_level_map())
        self._mark_rewind_point()
        if self.plan.first.level == 1:  # level 0 is not trained, so that no end_level validates and exports it
            if self.result is not network:  # BasicSR has loaded it from params_ema, whatever the network is loaded from
                self.result.load_state_dict(network.state_dict())
            self.validate_now(0)
            self.export_and_record(0)

    def prepare_weights(self, training: LevelTraining) -> None:
        """Make the current, larger network the teacher, if there is one; then prune and rewind."""
        level = training.level
        if level == 0:
            return
        if self.self_distillation is not None:
            self.self_distillation.load_teacher(self.network.export(level - 1))
        self._prune_to(level)
        if self.options.rewind == 'weights':
            masks = mask_of(self.network.get_level_map(), level)
            rewind_weights(self.network.backbone, self.rewind_point, masks)

    def _prune_to(self, level: int) -> None:
        """Remove the weights with the lowest scores; rank 0 decides which."""
        network = self.network
        if self.opt['rank'] == 0:
            generator = torch.Generator().manual_seed(self.seed + level)
            network.prune(level, CRITERION_REGISTRY.get(self.options.criterion), generator)
        broadcast_from_rank_0(network.get_level_map())
        network.level = level
        emptied = [name for name, mask in mask_of(network.get_level_map(), level).items() if not mask.any()]
        if emptied:  # a residual branch may go, but without its last convolution a network gives one flat image
            get_root_logger().warning(f'Level {level} has nothing left of {", ".join(emptied)}.')

    def _mark_rewind_point(self) -> None:
        self.rewind_point.load_state_dict(self.network.backbone.state_dict())
        broadcast_from_rank_0(saved_buffers(self.rewind_point))  # each rank has seen other batches

    def freeze_weights(self, training: LevelTraining) -> FrozenWeights:
        """Pruned weights keep the values that they were pruned with, whatever the weight decay."""
        masks = mask_of(self.network.get_level_map(), training.level)
        return FrozenWeights(self.network.backbone, masks, others_train=True)

    def restart_training(self, training: LevelTraining) -> None:
        last_rates = [[group['lr'] for group in optimizer.param_groups] for optimizer in self.optimizers]
        super().restart_training(training)
        if self._continues(training):
            self.schedulers.clear()
            for optimizer, rates in zip(self.optimizers, last_rates):
                for group, rate in zip(optimizer.param_groups, rates):
                    group['lr'] = group['initial_lr'] = rate

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """As in both stages; OptionError if ``rewind`` would take the resumed level's schedule away, or give it one."""
        training, _ = self.plan.locate(resume_state['iter'])
        found = self.options.rewind
        began = resume_state.get('mssr', {}).get('options', {}).get('train.rewind', found)
        if training != self.plan.first and (began == 'none') != (found == 'none'):
            allowed = 'none' if began == 'none' else 'weights, lr'
            raise OptionError(
                'train.rewind', found, f'{allowed} (level {training.level}, which is resumed, began with {began})'
            )
        super().resume_training(resume_state)

    # ------------------------------ one iteration ------------------------------ #

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """As in both stages; with ``rewind: none`` the training goes on, so that only its first level warms up."""
        training, _ = self.plan.locate(current_iter)
        super().update_learning_rate(current_iter, -1 if self._continues(training) else warmup_iter)

    def _continues(self, training: LevelTraining) -> bool:
        """Whether ``training`` goes on with the last learning rate of the level before (``rewind: none``)."""
        return self.options.rewind == 'none' and training != self.plan.first

    def optimize_parameters(self, current_iter: int) -> None:  # type: ignore[override]  # as SRModel's
        super().optimize_parameters(current_iter)
        if current_iter == self.rewind_iter and self.network.level == 0:
            self._mark_rewind_point()

    @contextmanager
    def distilling(self, current_iter: int) -> Iterator[None]:
        """Feed the network's features at random depths into the larger network.

        At level 0 there is none yet, and its copy takes its place until this has worked once.
        """
        if self.self_distillation is None or (self.network.level == 0 and self._tried_out):
            yield
        else:
            seed = f'{self.seed}, iteration {current_iter}'
            with self.self_distillation.watching(self.network.backbone, seed):
                yield

    def _ssd_term(self, output: Tensor, gt: Tensor) -> Tensor | None:
        """The term of smaller levels; None at level 0, where it is only computed to see that it can be."""
        assert self.self_distillation is not None
        if self.network.level > 0 or self._tried_out:
            return self.self_distillation.term(gt)
        state = random_state()
        self.self_distillation.term(gt)
        set_random_state(state)  # level 0 draws the same numbers as without self-distillation
        self._tried_out = True
        return None

    # ------------------------------ saving ------------------------------ #

    def networks_to_learn_from(self) -> list[nn.Module]:
        return [] if self.self_distillation is None else [self.teacher]

    def extra_networks(self) -> dict[str, nn.Module]:
        networks: dict[str, Any] = {'rewind': self.rewind_point}
        if self.self_distillation is not None:
            networks['teacher'] = self.teacher
        return networks
