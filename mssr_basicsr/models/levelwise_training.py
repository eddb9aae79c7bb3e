"""Training level by level, as both stages do: how a level begins, trains, ends, is saved and is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from basicsr.utils import get_root_logger
from torch import nn

from mssr_basicsr.adapter.ranks import (
    broadcast_from_rank_0,
    gather_on_rank_0,
    require_agreement,
    require_finite,
    wait_for_all,
)
from mssr_basicsr.adapter.records import level_table, names_in_records
from mssr_basicsr.adapter.resuming import epoch_to_resume, random_state, resume_within_epoch
from mssr_basicsr.adapter.run_state import (
    RunState,
    in_python_numbers,
    kept_between_iterations,
    put_back_kept,
    read_run_state,
)
from mssr_basicsr.adapter.stage_options import StageOptions
from mssr_basicsr.adapter.training_plan import TrainingPlan
from mssr_basicsr.adapter.training_script import NUM_BATCHES, resumed_networks
from mssr_basicsr.foundation.buffers import saved_buffers
from mssr_basicsr.foundation.checkpoints import read_checkpoint
from mssr_basicsr.foundation.checks import OptionError, read_options
from mssr_basicsr.foundation.modes import weights_set
from mssr_basicsr.foundation.patching import replaced
from mssr_basicsr.foundation.saving import remove_leftovers, saved_whole
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.schedules import LevelTraining
from mssr_basicsr.models.distilling_model import DistillingModel
from mssr_basicsr.models.precision import computing, lacks_bf16
from mssr_basicsr.scalable.architectures import find_image_spec
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.header import check_texts
from mssr_basicsr.scalable.packing import level_metrics, pack


class LevelwiseTraining(DistillingModel):
    """A mixin for any of BasicSR's model classes: it trains the levels of a plan one by one.

    Each level is trained as the YAML trains a network: optimizers, EMA and the learning-rate schedule restart, and so
    do the phases that a model class counts in iterations (``tsa_iter``, ``net_d_init_iters``), since it is given the
    iteration within the level. Whatever is not part of ``net_g``, such as a discriminator, continues from level to
    level. The result of a level is what it ends with, the EMA's weights if there is one.
    """

    options_class: ClassVar[type[StageOptions]] = StageOptions
    options: Any  #: an instance of :attr:`options_class`
    plan: TrainingPlan

    def __init__(self, opt: dict[str, Any]) -> None:
        self._before_setup: dict[str, Any] = {}
        super().__init__(opt)
        # As the model class has left it: no phase of it, such as EDVR's tsa_iter, has begun, even in a resumed run.
        self._untrained_at_first = self._untrained()
        self._kinds_at_first = self._kinds()

    # ------------------------------ what a stage says ------------------------------ #

    def make_plan(self) -> list[LevelTraining]:
        """The levels to train at, in order; OptionError if an option of the stage is wrong."""
        raise NotImplementedError

    def scheduled_trainings(self) -> Sequence[LevelTraining]:
        """Those of the plan in which the learning rate follows the YAML's schedule."""
        return self.plan.trainings

    def begin_run(self) -> None:
        """Called once in a run, before the first level."""

    def prepare_weights(self, training: LevelTraining) -> None:
        """Prepare the weights for ``training``."""

    def freeze_weights(self, training: LevelTraining) -> FrozenWeights:
        """The weights that do not train in ``training``."""
        raise NotImplementedError

    def check_result(self, training: LevelTraining) -> None:
        """Raise unless the weights are as ``training`` must leave them."""

    def write_result(self) -> None:
        """After the last save: write the stage's product, if it is not a checkpoint."""

    def extra_networks(self) -> dict[str, nn.Module]:
        """Networks that a resumed run needs, by their key in a checkpoint."""
        return {}

    # ------------------------------ a level's life ------------------------------ #

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """As in BasicSR, within the level. As BasicSR calls it first in each iteration, levels begin here."""
        training, self.step = self.plan.locate(current_iter)
        self.current_iter = current_iter
        if self.step == 1:
            before = self.plan.before(training)
            if before is None:
                self.begin_run()
            else:
                self.end_level(before)
            self.begin_level(training)
        super().update_learning_rate(self.step, warmup_iter)

    def begin_level(self, training: LevelTraining) -> None:
        """Prepare the weights, then restart optimizers, learning-rate schedule and EMA."""
        self._require_finite(f'Start of level {training.level}')
        self.prepare_weights(training)
        get_root_logger().info(f'Level {training.level}: {training.num_iter} iterations begin.')
        self.restart_training(training)
        if self.result is not self.network:
            self.result.load_state_dict(self.network.state_dict())
        self.__dict__.pop('best_metric_results', None)  # BasicSR's log of the best so far begins anew at each level
        self._require_agreement(f'Start of level {training.level}')

    def end_level(self, training: LevelTraining) -> None:
        """Copy the level's result into the network, export it as a plain checkpoint and record it.

        Buffers, such as running statistics, are rank 0's, as they are in each of DDP's forward passes.

        Raises:
            FloatingPointError: on every rank, if a parameter of any is not finite; the text names it.
            RuntimeError: on every rank, if ranks differ or the result is not what the stage guarantees.
        """
        broadcast_from_rank_0(saved_buffers(self.result.backbone))  # each rank has seen other batches
        if self.result is not self.network:
            self.network.load_state_dict(self.result.state_dict())
        self._require_finite(f'End of level {training.level}')
        self._require_agreement(f'End of level {training.level}')
        self.check_result(training)
        self.export_and_record(training.level)
        self.record(training.level)['iterations'] = training.num_iter
        self.write_records()
        get_root_logger().info(f'Level {training.level} is done.\n{level_table(self.records.values())}')

    def export_and_record(self, level: int) -> None:
        """Export ``level`` as a plain checkpoint and record its sizes, as is done for each level, trained or given."""
        self.export_level(level)
        self.record(level).update(self.describe(level))

    def restart_training(self, training: LevelTraining) -> None:
        """New optimizers and learning-rate schedules for ``training``, at its level and with its frozen weights."""
        self.set_level(training.level)
        self.frozen = self.freeze_weights(training)
        self._set_untrained(self._untrained_at_first)
        self.opt['train'].update(deepcopy(self._before_setup))
        self.optimizers.clear()
        self.schedulers.clear()
        self.setup_optimizers()
        self.setup_schedulers()
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # a class may add up the gradients of several iterations, which are another level's
        # Once: in training, a class may give its attributes values of other types.
        for name, kinds in self.__dict__.pop('_kinds_at_first', {}).items():
            if self._kinds()[name] != kinds:
                allowed = f'a class that creates all of its {name} in setup_{name} ({self.base_name} does not)'
                raise OptionError('base_model_type', self.base_name, allowed)

    def _kinds(self) -> dict[str, Any]:
        """The types of the optimizers, by attribute and in BasicSR's list, and of the schedulers."""
        by_attribute = {name: type(value) for name, value in vars(self).items() if name.startswith('optimizer')}
        optimizers, schedulers = ([type(item) for item in items] for items in (self.optimizers, self.schedulers))
        return {'optimizers': (by_attribute, optimizers), 'schedulers': schedulers}

    def setup_optimizers(self) -> None:
        with self._remembering_options():
            super().setup_optimizers()

    def setup_schedulers(self) -> None:
        with self._remembering_options():
            super().setup_schedulers()

    @contextmanager
    def _remembering_options(self) -> Iterator[None]:
        """Remember those of the options under ``train`` that change while the context is open, for the next level.

        BasicSR takes the types out of them, and a class may scale a learning rate in place.
        """
        before = deepcopy(self.opt['train'])
        yield
        changed = {key: value for key, value in before.items() if self.opt['train'].get(key) != value}
        self._before_setup.update(changed)

    # ------------------------------ one iteration ------------------------------ #

    def optimize_parameters(self, current_iter: int) -> None:  # type: ignore[override]  # as SRModel's
        """The model class's iteration, after which the frozen weights are restored."""
        watched = self.network.refuse_unmasked_layers() if self.step == 1 else nullcontext()
        with self.distilling(current_iter), self._computing_in_training(), watched:
            super().optimize_parameters(self.step)
        self.frozen.put_back(self.network.backbone)
        if self.result is not self.network:
            self.frozen.put_back(self.result.backbone)
        training, _ = self.plan.locate(current_iter)
        if self.step == 1:  # what goes wrong does so at once: not only after days of training
            self._require_distillation()
            self.check_result(training)
        if self.step == training.num_iter:
            self._report_no_distillation()

    @contextmanager
    def _computing_in_training(self) -> Iterator[None]:
        """While the context is open, the networks have ``train.precision`` and ``train.channels_last``.

        Other networks that the class trains, such as discriminators, only have the former: BasicSR's flatten their
        features with ``view``, which does not work with another layout.
        """
        others = [net for name, net in vars(self).items() if name.startswith('net_') and not name.endswith('_ema')]
        bare = [self.get_bare_model(net) for net in others if isinstance(net, nn.Module) and net is not self.net_g]
        options, own = self.options, [self.network, *self.networks_to_learn_from()]
        with ExitStack() as stack:
            stack.enter_context(computing(own, self.device, options.precision, options.channels_last))
            stack.enter_context(computing(bare, self.device, options.precision))
            yield

    def model_ema(self, decay: float = 0.999) -> None:
        """As in BasicSR, but buffers, which BasicSR leaves as before the training, are the network's."""
        super().model_ema(decay)
        ema = saved_buffers(self.net_g_ema.backbone)
        for name, buffer in saved_buffers(self.network.backbone).items():
            ema[name].copy_(buffer)

    # ------------------------------ before training ------------------------------ #

    def init_training_settings(self) -> None:
        self._train_opt = deepcopy(self.opt['train'])
        self.options = read_options(self.options_class, 'train', self._train_opt)
        seed = torch.tensor([self.opt['manual_seed']], device=self.device)
        broadcast_from_rank_0({'manual_seed': seed})  # without one in the YAML each rank has drawn its own
        self.seed = int(seed.item())
        self.current_iter = self.step = 0
        super().init_training_settings()
        self._train_opt = deepcopy({**self.opt['train'], **self._before_setup})  # the model class may have changed some
        self.plan = TrainingPlan(self.make_plan())
        self.plan.check({**self.opt, 'train': self._train_opt}, self.scheduled_trainings())
        self._warn_of_unprunable()
        if self.options.precision == 'bf16' and lacks_bf16(self.device):
            get_root_logger().warning(
                'train.precision: bf16: this processor has no bf16 arithmetic, so training will be slower than in fp32.'
            )
        self._require_packable()  # now, not after days of training

    def _warn_of_unprunable(self) -> None:
        total = sum(parameter.numel() for parameter in self.network.backbone.parameters())
        prunable = sum(weight.numel() for weight in self.network.prunable_weights().values())
        if prunable < total / 2:
            get_root_logger().warning(
                f'Only {prunable:,} of the {total:,} parameters ({prunable / total:.0%}) are prunable: the weights of '
                'convolutions and linear layers that network_g.prunable matches. '
                f'Every level has the other {total - prunable:,}.'
            )

    def _require_packable(self) -> None:
        if self._scale != self.opt.get('scale', 1):
            get_root_logger().warning(
                f'The network itself upscales by 1, and so will a .mssr file of it: scale: {self.opt["scale"]} needs '
                f'what {self.base_name} does with the images before.'
            )
        try:
            self.pack()
        except ScalableFileError as error:
            self.report_unpackable('network_g.backbone', self.network.backbone_options, error)
        for option, name in names_in_records(self.opt).items():  # of what has not been measured yet
            try:
                check_texts(name)
            except ScalableFileError as error:
                self.report_unpackable(option, name, error)

    def report_unpackable(self, option: str, found: object, error: ScalableFileError) -> None:
        """Called before the training if no ``.mssr`` file can hold ``found``, as ``error`` says: an OptionError."""
        raise OptionError(option, found, f'one that a .mssr file can hold ({error})') from error

    def pack(self) -> bytes:
        """All levels as a ``.mssr`` file; OptionError if the network upscales neither by ``scale`` nor by 1."""
        return pack(self.result, self._scale, level_metrics(self.records.values()))

    @cached_property
    def _scale(self) -> int:
        """The YAML's ``scale``, unless the network does not upscale: its model class then enlarges what it is given."""
        try:
            own = find_image_spec(self.network.backbone, self.network.backbone_options).scale
        except ValueError:  # it takes no single images
            own = None
        return 1 if own == 1 else self.opt.get('scale', 1)

    def _untrained(self) -> list[str]:
        return [name for name, parameter in self.network.backbone.named_parameters() if not parameter.requires_grad]

    def _set_untrained(self, names: list[str]) -> None:
        for name, parameter in self.network.backbone.named_parameters():
            parameter.requires_grad_(name not in names)

    def _require_finite(self, when: str) -> None:
        require_finite(dict(self.network.backbone.named_parameters()), when)

    def _require_agreement(self, when: str) -> None:
        """Raise unless all ranks have the same weights, level map and seed, which determines masks and depths."""
        seed = torch.tensor(self.seed, device=self.device)
        require_agreement({**self.network.state_dict(), 'manual_seed': seed}, when)

    # ------------------------------ saving and resuming ------------------------------ #

    def save(self, epoch: int, current_iter: int) -> None:
        if current_iter == -1:  # BasicSR's call after the last iteration
            self._require_all_iterations()
            self.end_level(self.plan.last)
        if self.opt['rank'] == 0:
            # A run resumed from an earlier state may find a later run's state here, which does not fit its weights.
            Path(self.opt['path']['training_states'], f'{current_iter}.state').unlink(missing_ok=True)
        super().save(epoch, current_iter)
        if current_iter == -1:
            self.write_result()
            wait_for_all()  # torchrun may stop rank 0 when the process of another rank ends

    def _require_all_iterations(self) -> None:
        """Unless ``total_iter`` is reached, save what there is and raise OptionError: a script ran too few epochs."""
        total_iter, dataset_opt = self._train_opt['total_iter'], self.opt['datasets']['train']
        if self.current_iter >= total_iter:
            return
        if self.current_iter > 0:
            self.save(0, self.current_iter)  # epoch 0: epoch_to_resume finds the right one
        allowed = (
            f'a larger one: the training ended after iteration {self.current_iter} of {total_iter}, since all epochs '
            'that the training script plans are done. Then resume it'
        )
        raise OptionError('datasets.train.dataset_enlarge_ratio', dataset_opt.get('dataset_enlarge_ratio', 1), allowed)

    def save_network(self, net: Any, net_label: str, current_iter: int, param_key: str | list[str] = 'params') -> None:
        """As in BasicSR, with :meth:`extra_networks` beside ``net_g``; complete or absent, and failures are errors."""
        if self.opt['rank'] != 0:
            return
        extra = self.extra_networks() if net_label == 'net_g' else {}
        nets = (net if isinstance(net, list) else [net]) + list(extra.values())
        keys = (param_key if isinstance(param_key, list) else [param_key]) + list(extra)
        with saved_whole(self.opt['path'], 'models'):
            super().save_network(nets, net_label, current_iter, keys)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """As in BasicSR, with a :class:`RunState` in it; complete or absent, and failures are errors."""
        if current_iter == -1:
            return
        exact = self.options.exact_resume
        run_state = RunState(
            seed=self.seed,
            plan=[tuple(training) for training in self.plan.trainings],
            options=self.decisive_options(),
            records=self.records,
            untrained=self._untrained(),
            random_states=gather_on_rank_0(random_state()),
            kept=gather_on_rank_0(kept_between_iterations(self)) if exact else [],
            num_batches=self._num_batches(),
        )
        if self.opt['rank'] == 0:
            save, entered = torch.save, False

            def save_with_entry(saved: Any, *args: Any, **kwargs: Any) -> None:
                nonlocal entered
                if isinstance(saved, dict) and 'iter' in saved:  # not what else the class may save here
                    saved, entered = in_python_numbers({**saved, 'mssr': vars(run_state)}), True
                save(saved, *args, **kwargs)

            with saved_whole(self.opt['path'], 'training_states'), replaced(torch, 'save', save_with_entry):
                super().save_training_state(epoch, current_iter)
                if not entered:
                    raise RuntimeError(f'{self.base_name} saves no training state as BasicSR does, by torch.save')

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Continue from ``resume_state``: level, frozen weights, optimizers, records, random numbers, data."""
        current_iter, epoch, paths = resume_state['iter'], resume_state['epoch'], self.opt['path']
        ignored = paths.get('ignore_resume_networks') or []
        if 'network_g' in ignored:
            allowed = f'networks other than network_g, without which {self.opt["model_type"]} cannot resume'
            raise OptionError('path.ignore_resume_networks', ignored, allowed)
        training, step = self.plan.locate(current_iter)
        self.current_iter = current_iter
        state = read_run_state(
            resume_state,
            paths['resume_state'],
            self.opt['model_type'],
            self.plan.begun(current_iter),
            self.decisive_options(),
        )
        if self.opt['rank'] == 0:
            remove_leftovers(paths['models'], paths['training_states'])
        self.seed, self.records = state.seed, state.records
        self._resume_extra_networks(read_checkpoint(paths['pretrain_network_g']))
        self._resume_networks_left_out()
        self.restart_training(training)
        super().resume_training(resume_state)
        self._set_untrained(state.untrained)
        self._require_agreement(f'Resuming at iteration {current_iter}')
        self.write_records()
        if step == training.num_iter:  # BasicSR validates after saving: the level's metrics may be lacking
            self.validate_now(current_iter)
        num_batches = self._num_batches()
        if num_batches is not None:
            epoch = epoch_to_resume(epoch, current_iter, num_batches)
            resume_state['epoch'] = epoch  # which BasicSR reads after this
        if self.options.exact_resume and current_iter < self._train_opt['total_iter']:  # otherwise no batch follows
            rank = self.opt['rank']
            if state.kept:
                put_back_kept(self, state.kept[rank % len(state.kept)])
            random = state.random_states[rank % len(state.random_states)]
            resume_within_epoch(epoch, current_iter, random, state.num_batches)
        del resume_state['mssr']  # BasicSR holds the state as long as the training runs, on a GPU if there is one

    def _num_batches(self) -> int | None:
        """In an epoch, where the training script says so."""
        return self.opt['datasets']['train'].get(NUM_BATCHES)  # type: ignore[no-any-return]

    def _resume_extra_networks(self, checkpoint: dict[str, Any]) -> None:
        for key, network in self.extra_networks().items():
            if key not in checkpoint:
                allowed = f'a state whose network file has an entry {key}'
                raise OptionError('path.resume_state', self.opt['path']['resume_state'], allowed)
            with weights_set(network):
                network.load_state_dict(checkpoint[key])  # for what it merges of its weights and does not save
            network.load_state_dict(checkpoint[key])  # which has what it saves as it was in eval mode
        if 'params_ema' in checkpoint and self.result is not self.network:  # since BasicSR put it into eval mode
            self.result.load_state_dict(checkpoint['params_ema'])

    def _resume_networks_left_out(self) -> None:
        """Load the other networks that BasicSR resumes, where the class does not: HiFaceGAN's discriminator."""
        for key in resumed_networks(self.opt):
            net, path = getattr(self, key.replace('network', 'net'), None), self.opt['path'].get(f'pretrain_{key}')
            if not isinstance(net, nn.Module) or path is None or path in self.loaded:
                continue
            if Path(path).is_file():
                self.load_network(net, path)
            else:
                get_root_logger().warning(f'{key} begins anew, since {self.base_name} has not saved {path}.')

    def decisive_options(self) -> dict[str, Any]:
        """As in :class:`NestedLevels`, with the stage's own, which should not change within a run."""
        own = {f'train.{name}': value for name, value in vars(self.options).items()}
        own['train.ema_decay'] = self._train_opt.get('ema_decay', 0)  # BasicSR's: with an EMA, it is a level's result
        return deepcopy({**super().decisive_options(), **own})


def start_from_ema(opt: dict[str, Any]) -> None:
    """Let a new run take the EMA's weights of ``path.pretrain_network_g``, unless ``path.param_key_g`` names others."""
    if not opt['path'].get('resume_state'):
        opt['path'].setdefault('param_key_g', 'params_ema')  # BasicSR takes params where there is no params_ema
