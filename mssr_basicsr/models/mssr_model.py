"""What the forward and the backward stage share: stages of iterations, levels, records. By itself: testing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY
from torch import Tensor, nn

from mssr_basicsr.adapter.ranks import broadcast_from_rank_0, gather, require_agreement, require_finite, wait_for_all
from mssr_basicsr.adapter.report import Record, describe_level, level_table
from mssr_basicsr.adapter.resuming import random_state, resume_within_epoch
from mssr_basicsr.archs.mssr_arch import MSSR, is_plain
from mssr_basicsr.foundation.checkpoints import CheckpointError, read_checkpoint, require_same_entries, state_dict_of
from mssr_basicsr.foundation.checks import OptionError, arguments_checked, require_bool, require_int, require_type
from mssr_basicsr.foundation.saving import remove_leftovers, saved_whole, write_whole, written_whole
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.schedules import Stage

STATE_VERSION = 1  # of what a ``.state`` has beside BasicSR's entries; a newer one is refused


@MODEL_REGISTRY.register()
class MSSRModel(SRModel):
    """An SR model of nested levels. With ``basicsr/test.py`` it tests every level of one checkpoint.

    The two stages extend it. Each is a list of :class:`Stage`, training at one level; optimizer, EMA and LR schedule
    start anew with each stage, so that the schedule in the YAML is for one stage. What a stage ended with, the EMA's
    weights if there is one, is its result.

    Beside the models it writes ``net_g_level{k}.pth``, each level as a plain checkpoint of the unmodified backbone, and
    ``levels.json``, a list of what :func:`describe_level` says of each level, with its ``iterations`` and ``metrics``
    (by validation set and metric).
    """

    distillation_option = ''  #: under ``train``, of a loss that stands beside the pixel loss

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['network_g'].get('type') != 'MSSR':
            raise OptionError('network_g.type', opt['network_g'].get('type'), f'MSSR, with {opt["model_type"]}')
        if 'level' in opt['network_g']:
            allowed = f'nothing, {opt["model_type"]} sets the level (SRModel takes a fixed one)'
            raise OptionError('network_g.level', opt['network_g']['level'], allowed)
        if opt['num_gpu'] > 1 and not opt['dist']:
            logger = get_root_logger()
            logger.warning(f'{opt["num_gpu"]} GPUs but no launcher: one is used; to use all, start with torchrun.')
            opt['num_gpu'] = 1
        self.records: dict[int, Record] = {}
        super().__init__(opt)

    # ------------------------------ levels ------------------------------ #

    @property
    def network(self) -> MSSR:
        """The network in training, without a DDP wrapper."""
        return self.get_bare_model(self.net_g)  # type: ignore[no-any-return]

    @property
    def result(self) -> MSSR:
        """The network whose weights count, are validated and exported: the EMA if there is one."""
        return getattr(self, 'net_g_ema', self.network)

    def set_level(self, level: int) -> None:
        """Put the network and its EMA at ``level``."""
        self.network.level = self.result.level = level

    def levels_to_validate(self) -> Sequence[int]:
        """The levels that exist, which one validation goes through."""
        return range(self.network.smallest_level + 1)

    # ------------------------------ stages ------------------------------ #

    def plan_stages(self) -> list[Stage]:
        """The stages in order."""
        raise OptionError('model_type', type(self).__name__, 'MSSRForwardModel, MSSRBackwardModel (it only tests)')

    def begin_stage(self, stage: Stage) -> None:
        """Make the network ready to train ``stage``, all but its level, frozen weights and optimizer."""

    def freeze_weights(self, stage: Stage) -> FrozenWeights:
        """The weights that do not train in ``stage``."""
        raise NotImplementedError

    def check_result(self, stage: Stage) -> None:
        """Raise unless the weights that ``stage`` ended with are what it promises."""

    def write_result(self) -> None:
        """After the last save: write what the training is for, if it is not a checkpoint."""

    def extra_networks(self) -> dict[str, nn.Module]:
        """Networks without which a resumed run could not go on, by the key they have in a checkpoint."""
        return {}

    def init_training_settings(self) -> None:
        # BasicSR takes the types out of these options when it builds an optimizer, which here happens at each stage.
        self._train_opt = deepcopy(self.opt['train'])
        seed = torch.tensor([self.opt['manual_seed']], device=self.device)
        broadcast_from_rank_0({'manual_seed': seed})  # without one in the YAML each rank has drawn its own
        self.seed = int(seed.item())
        #: The loss that ``train.<distillation_option>`` names, None where there is no such option.
        self.cri_distill = self._build_distillation_loss()
        self.loss_terms: dict[str, Tensor] = {}
        super().init_training_settings()
        self.stages = self.plan_stages()
        self._check_iterations()
        self.exact_resume = require_bool('train.exact_resume', self._train_opt.get('exact_resume', True))

    def _build_distillation_loss(self) -> Any:
        key, train_opt = self.distillation_option, self._train_opt
        options = train_opt.get(key)
        if not options:
            return None
        require_type(f'train.{key}', options, LOSS_REGISTRY.keys(), 'the options of a loss, with its type')
        if not train_opt.get('pixel_opt'):
            raise OptionError('train.pixel_opt', train_opt.get('pixel_opt'), f'the options of a loss, with train.{key}')
        with arguments_checked(f'train.{key}', options, 'loss'):
            return build_loss(options).to(self.device)

    def add_to_pixel_loss(self, terms: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
        """Let training also minimise what ``terms(output, gt)`` gives, each logged by its name.

        They stand in for the pixel loss, since BasicSR's iteration has no other place for a further term.
        """
        pixel_loss = self.cri_pix

        def all_terms(output: Tensor, gt: Tensor) -> Tensor:
            self.loss_terms = {'l_pix': pixel_loss(output, gt), **terms(output, gt)}
            return torch.stack(list(self.loss_terms.values())).sum()

        self.cri_pix = all_terms

    def reduce_loss_dict(self, loss_dict: dict[str, Tensor]) -> dict[str, float]:
        """As in BasicSR, with the terms of :meth:`add_to_pixel_loss` apart."""
        reduced: dict[str, float] = super().reduce_loss_dict({**loss_dict, **self.loss_terms})
        return reduced

    def _check_iterations(self) -> None:
        train_opt = self._train_opt
        iterations = [stage.num_iter for stage in self.stages]
        if train_opt.get('total_iter') != sum(iterations):
            parts = ' + '.join(f'{stage.num_iter} at level {stage.level}' for stage in self.stages)
            raise OptionError('train.total_iter', train_opt.get('total_iter'), f'{sum(iterations)} ({parts})')
        if self.opt.get('val') is not None and 'debug' not in self.opt['name']:  # --debug sets a val_freq of its own
            val_freq = require_int('val.val_freq', self.opt['val'].get('val_freq'), 1)
            if any(num_iter % val_freq for num_iter in iterations):
                allowed = f"a divisor of each level's iterations, {iterations}, so that each level ends validated"
                raise OptionError('val.val_freq', val_freq, allowed)
        periods = train_opt['scheduler'].get('periods')
        if periods is not None and sum(periods) < max(iterations):
            allowed = f'periods of {max(iterations)} or more in all (the schedule is for one level)'
            raise OptionError('train.scheduler.periods', periods, allowed)

    def _locate(self, current_iter: int) -> tuple[int, int]:
        """The stage's index that iteration ``current_iter`` (from 1) is in, and the iteration within it (from 1)."""
        step = current_iter
        for index, stage in enumerate(self.stages):
            if step <= stage.num_iter:
                return index, step
            step -= stage.num_iter
        return len(self.stages) - 1, self.stages[-1].num_iter

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """As in BasicSR, within the stage. BasicSR calls it first in each iteration: here a new stage begins."""
        index, step = self._locate(current_iter)
        if step == 1:
            if index > 0:
                self.finish_stage(self.stages[index - 1])
            self._start(self.stages[index])
        super().update_learning_rate(step, warmup_iter)

    def _start(self, stage: Stage) -> None:
        self._require_finite(f'Start of level {stage.level}')
        self.begin_stage(stage)
        get_root_logger().info(f'Level {stage.level}: {stage.num_iter} iterations begin.')
        self._restart_optimizer(stage)
        if self.ema_decay > 0:
            self.net_g_ema.load_state_dict(self.network.state_dict())
        self.best_metric_results: dict[str, Any] = {}  # BasicSR's log line of the best so far: the best of this level
        self._require_agreement(f'Start of level {stage.level}')

    def _require_finite(self, when: str) -> None:
        require_finite(dict(self.network.backbone.named_parameters()), when)

    def _require_agreement(self, when: str) -> None:
        """Raise unless all ranks have the same weights, level map and seed, from which masks and depths follow."""
        seed = torch.tensor(self.seed, device=self.device)
        require_agreement({**self.network.state_dict(), 'manual_seed': seed}, when)

    def _restart_optimizer(self, stage: Stage) -> None:
        self.set_level(stage.level)
        self.frozen = self.freeze_weights(stage)
        self.opt['train'] = deepcopy(self._train_opt)
        self.optimizers.clear()
        self.schedulers.clear()
        self.setup_optimizers()
        self.setup_schedulers()

    def optimize_parameters(self, current_iter: int) -> None:  # type: ignore[override]  # as SRModel's
        super().optimize_parameters(current_iter)
        self.frozen.put_back(self.network.backbone)
        if self.ema_decay > 0:
            self.frozen.put_back(self.net_g_ema.backbone)

    def finish_stage(self, stage: Stage) -> None:
        """Take the stage's result over into the network, export it as a plain checkpoint and record it.

        Raises:
            FloatingPointError: on every rank, if a parameter of one is not finite; the text names it.
            RuntimeError: on every rank, if they differ; or the result is not what the stage promises.
        """
        if self.ema_decay > 0:
            self.network.load_state_dict(self.net_g_ema.state_dict())
        self._require_finite(f'End of level {stage.level}')
        self._require_agreement(f'End of level {stage.level}')
        self.check_result(stage)
        self.export_level(stage.level)
        self._record(stage.level).update(describe_level(self.network, stage.level), iterations=stage.num_iter)
        self.write_records()
        table = level_table(self.records.values())
        get_root_logger().info(f'Level {stage.level} is done.\n{table}')

    # ------------------------------ validation and records ------------------------------ #

    def test(self) -> None:
        # Rank 0 validates alone: through a DDP wrapper it would wait for the others.
        wrapped, self.net_g = self.net_g, self.network
        super().test()
        self.net_g = wrapped

    def validation(self, dataloader: Any, current_iter: int | str, tb_logger: Any, save_img: bool = False) -> None:
        """As in BasicSR. The other ranks wait for rank 0, which validates, and so none has ended before it is done."""
        super().validation(dataloader, current_iter, tb_logger, save_img)
        wait_for_all()

    def nondist_validation(self, dataloader: Any, current_iter: int | str, tb_logger: Any, save_img: bool) -> None:
        """BasicSR's validation for each of :meth:`levels_to_validate`, then one row for each in a table.

        The random generators are left as they were: what is trained does not depend on what is validated.
        """
        with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []):
            self._validate_levels(dataloader, current_iter, tb_logger, save_img)

    def _validate_levels(self, dataloader: Any, current_iter: int | str, tb_logger: Any, save_img: bool) -> None:
        name, levels, level_before = dataloader.dataset.opt['name'], self.levels_to_validate(), self.network.level
        for level in levels:
            self.set_level(level)
            with self._reported_apart(dataloader.dataset.opt, level, len(levels) > 1):
                super().nondist_validation(dataloader, current_iter, tb_logger, save_img)
            record = self._record(level)
            record.update(describe_level(self.result, level))
            if self.opt['val'].get('metrics') is not None:
                record['metrics'][name] = {metric: float(value) for metric, value in self.metric_results.items()}
            if tb_logger:
                for metric, value in record['metrics'].get(name, {}).items():
                    tb_logger.add_scalar(f'levels/{name}/{metric}', value, level)
                for layer, density in record['density'].items():
                    tb_logger.add_scalar(f'density/{layer}', density, level)
        self.set_level(level_before)
        self.write_records()
        if len(levels) > 1:
            get_root_logger().info(f'Validation {name}\n{level_table(self.records[level] for level in levels)}')

    @contextmanager
    def _reported_apart(self, dataset_opt: dict[str, Any], level: int, apart: bool) -> Iterator[None]:
        """While the context is open, log lines, TensorBoard tags and images of a validation carry the level."""
        name, folder = dataset_opt['name'], self.opt['path']['visualization']
        if apart:
            dataset_opt['name'] = f'{name}_level{level}'
            self.opt['path']['visualization'] = os.path.join(folder, f'level{level}')
        try:
            yield
        finally:
            dataset_opt['name'], self.opt['path']['visualization'] = name, folder

    def _record(self, level: int) -> Record:
        return self.records.setdefault(level, {'level': level, 'metrics': {}})

    def _results_key(self) -> str:
        return 'models' if self.is_train else 'results_root'

    def write_records(self) -> None:
        """Write ``levels.json`` beside the models, in a test among the results. Rank 0 does."""
        if self.opt['rank'] == 0:
            records = [self.records[level] for level in sorted(self.records)]
            folder = self.opt['path'][self._results_key()]
            write_whole(Path(folder, 'levels.json'), json.dumps(records, indent=2).encode())

    def export_level(self, level: int) -> None:
        """Write ``net_g_level{level}.pth``, ``{'params': ...}`` of the plain backbone. Rank 0 does."""
        if self.opt['rank'] == 0:
            with saved_whole(self.opt['path'], 'models'):
                state: dict[str, Tensor] = self.network.export(level)
                torch.save({'params': state}, Path(self.opt['path']['models'], f'net_g_level{level}.pth'))

    def validate_now(self, current_iter: int) -> None:
        """Validate out of turn on every validation set, where there is one."""
        for phase, dataset_opt in self.opt['datasets'].items():
            if phase.split('_')[0] == 'val' and self.opt.get('val') is not None:
                self.validation(build_dataloader(build_dataset(dataset_opt), dataset_opt), current_iter, None, False)

    # ------------------------------ saving ------------------------------ #

    def save(self, epoch: int, current_iter: int) -> None:
        if current_iter == -1:  # BasicSR's call after the last iteration
            self.finish_stage(self.stages[-1])
        if self.opt['rank'] == 0:  # of a run that was resumed from an earlier state: no longer of the network to come
            Path(self.opt['path']['training_states'], f'{current_iter}.state').unlink(missing_ok=True)
        super().save(epoch, current_iter)
        if current_iter == -1:
            self.write_result()
            wait_for_all()  # torchrun may stop rank 0 when the process of another rank ends

    def save_network(self, net: Any, net_label: str, current_iter: int, param_key: str | list[str] = 'params') -> None:
        """As in BasicSR, with :meth:`extra_networks` in the same file; whole or absent, and never passed over."""
        if self.opt['rank'] != 0:
            return
        extra = self.extra_networks()
        nets = (net if isinstance(net, list) else [net]) + list(extra.values())
        keys = (param_key if isinstance(param_key, list) else [param_key]) + list(extra)
        with saved_whole(self.opt['path'], 'models'):
            super().save_network(nets, net_label, current_iter, keys)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """As in BasicSR, with what else a resumed run needs; whole or absent, and never passed over."""
        if current_iter == -1:
            return
        random_states = gather(random_state())
        if self.opt['rank'] == 0:
            with saved_whole(self.opt['path'], 'training_states') as folder:
                super().save_training_state(epoch, current_iter)
                (file,) = written_whole(folder)
                state = torch.load(file, weights_only=True)
                state['mssr'] = {
                    'version': STATE_VERSION,
                    'seed': self.seed,
                    'stages': [tuple(stage) for stage in self.stages],
                    'records': self.records,
                    'random_states': random_states,
                }
                torch.save(state, file)

    # ------------------------------ loading and resuming ------------------------------ #

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """As in BasicSR; a file that is not a checkpoint of the network is an OptionError that says why."""
        try:
            state = state_dict_of(read_checkpoint(load_path), param_key)
            bare = self.get_bare_model(net)
            if strict:
                require_same_entries(state, (bare.backbone if is_plain(state) else bare).state_dict())
            super().load_network(net, load_path, strict, param_key)
        except CheckpointError as error:
            option = 'path.resume_state' if self.opt['path'].get('resume_state') else 'path.pretrain_network_g'
            raise OptionError(option, load_path, f'a checkpoint of network_g; {error}') from error

    def _print_different_keys_loading(
        self, crt_net: nn.Module, load_net: dict[str, Tensor], strict: bool = True
    ) -> None:
        bare = self.get_bare_model(crt_net)
        super()._print_different_keys_loading(bare.backbone if is_plain(load_net) else bare, load_net, strict)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on where ``resume_state`` was saved: level, frozen weights, optimizer, records, random numbers, data."""
        current_iter = resume_state['iter']
        index, step = self._locate(current_iter)
        saved = self._check_state(resume_state, self.stages[: index + 1])
        if self.opt['rank'] == 0:
            remove_leftovers(self.opt['path']['models'], self.opt['path']['training_states'])
        self.seed, self.records = saved['seed'], saved['records']
        self.resume_extra_networks(read_checkpoint(self.opt['path']['pretrain_network_g']))
        self._restart_optimizer(self.stages[index])
        super().resume_training(resume_state)
        self._require_agreement(f'Resuming at iteration {current_iter}')
        self.write_records()
        if step == self.stages[index].num_iter:  # BasicSR validates after saving: the level's metrics may be lacking
            self.validate_now(current_iter)
        if self.exact_resume:
            random_states = saved['random_states']
            resume_within_epoch(
                resume_state['epoch'], current_iter, random_states[self.opt['rank'] % len(random_states)]
            )

    def _check_state(self, resume_state: dict[str, Any], stages: list[Stage]) -> dict[str, Any]:
        """Our entries in a ``.state``; OptionError unless it is of a run that began with these ``stages``."""
        saved: dict[str, Any] | None = resume_state.get('mssr')
        path = self.opt['path']['resume_state']
        if saved is None:
            raise OptionError('path.resume_state', path, f'a state that {type(self).__name__} saved')
        if saved['version'] > STATE_VERSION:
            allowed = (
                f'a state of version {STATE_VERSION} or less; its version is {saved["version"]}: update mssr-basicsr'
            )
            raise OptionError('path.resume_state', path, allowed)
        begun = [Stage(*stage) for stage in saved['stages'][: len(stages)]]
        if begun != stages:
            here, there = (
                ', '.join(f'{stage.num_iter} iterations at level {stage.level}' for stage in plan)
                for plan in (stages, begun)
            )
            raise OptionError('path.resume_state', path, f'a state of a run that began with {here}; this one: {there}')
        return saved

    def resume_extra_networks(self, checkpoint: dict[str, Any]) -> None:
        """Take :meth:`extra_networks` out of a checkpoint."""


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy that does not train, in eval mode: what another network is to learn from."""
    return deepcopy(network).eval().requires_grad_(False)
