"""What every MSSR model does with levels: validate, export and record them. On its own, it is for testing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from mssr_basicsr.adapter.ranks import patient_group, wait_for_all
from mssr_basicsr.adapter.records import (
    RECORDS,
    LevelRecord,
    describe_level,
    level_file,
    level_table,
    validation_sets,
)
from mssr_basicsr.adapter.resuming import random_state, set_random_state
from mssr_basicsr.adapter.stage_options import ValidationOptions
from mssr_basicsr.adapter.tensorboard import LevelBoard, LevelTags, pictures_of
from mssr_basicsr.adapter.training_script import resumed_networks
from mssr_basicsr.archs.mssr_arch import MSSR, is_plain, require_levels, require_nested
from mssr_basicsr.foundation.checkpoints import CheckpointError, loaded_strictly, read_checkpoint, state_dict_of
from mssr_basicsr.foundation.checks import OptionError, read_options
from mssr_basicsr.foundation.json_text import as_json
from mssr_basicsr.foundation.saving import saved_whole, write_whole
from mssr_basicsr.foundation.unchanged import unchanged
from mssr_basicsr.models.precision import computing

if TYPE_CHECKING:
    Base = SRModel
else:
    Base = object


class NestedLevels(Base):
    """A mixin for any of BasicSR's model classes whose ``net_g`` is an :class:`MSSR` network.

    The model class keeps handling data, padding, tiles and metrics; it runs one validation for each level.
    Beside the models this writes ``net_g_level{k}.pth``, each level as a plain checkpoint of the unmodified
    backbone, and ``levels.json``, a list of :class:`LevelRecord`; in a test, ``levels.json`` among the results.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['network_g'].get('type') != 'MSSR':
            raise OptionError('network_g.type', opt['network_g'].get('type'), f'MSSR, with {opt["model_type"]}')
        if 'level' in list(opt['network_g']):  # not the backbone's, which may have an option of that name
            allowed = f'nothing, since {opt["model_type"]} sets the level (a fixed one is for other model classes)'
            raise OptionError('network_g.level', opt['network_g']['level'], allowed)
        if opt['num_gpu'] > 0 and not torch.cuda.is_available():
            raise OptionError('num_gpu', opt['num_gpu'], '0, auto (torch finds no GPU)')
        if opt['num_gpu'] > 1 and not opt['dist']:
            if opt['is_train']:  # BasicSR counts epochs for one GPU, but its loader's batches are for all of them
                allowed = '1 (auto takes all that CUDA_VISIBLE_DEVICES leaves), or any number with torchrun'
                raise OptionError('num_gpu', opt['num_gpu'], allowed)
            opt['num_gpu'] = 1  # BasicSR tests one image or clip at a time, so the other GPUs would do nothing
        patient_group()  # made now, while no rank is ahead of the others
        self._val_precision = read_options(ValidationOptions, 'val', opt.get('val') or {}).precision
        self.records: dict[int, LevelRecord] = {}
        self.loaded: set[str] = set()  #: the paths of the checkpoints that have been loaded
        self._measured: dict[str, float] = {}
        self._pictures: dict[int, dict[str, Any]] = {}
        self._board = LevelBoard(opt)
        super().__init__(opt)

    @property
    def network(self) -> MSSR:
        """The network in training, without a DDP wrapper."""
        return self.get_bare_model(self.net_g)  # type: ignore[no-any-return]

    @property
    def result(self) -> MSSR:
        """The network whose weights are validated and packed: the EMA if there is one."""
        return getattr(self, 'net_g_ema', self.network)

    @property
    def base_name(self) -> str:
        """The name of the model class that is extended."""
        return self.opt.get('base_model_type', 'SRModel')  # type: ignore[no-any-return]

    def set_level(self, level: int) -> None:
        """Put the network and its EMA at ``level``."""
        self.network.level = self.result.level = level

    def levels_to_validate(self) -> Sequence[int]:
        """The levels that exist, all of which a validation covers."""
        return range(self.network.smallest_level + 1)

    # ------------------------------ validation ------------------------------ #

    def validation(self, dataloader: Any, current_iter: int | str, tb_logger: Any, save_img: bool = False) -> None:
        """The model class's validation for each of :meth:`levels_to_validate`, then a table with one row for each.

        In fp32, as networks are mostly used, unless ``val.precision`` is bf16. The training state (level, modes, random
        generators) is unaffected. No rank continues before all are done.
        """
        name, levels = str(dataloader.dataset.opt['name']), self.levels_to_validate()  # YAML reads 291 as a number
        self._pictures = {}
        computes = computing([self.result], self.device, self._val_precision)
        with self._validating(), computes, self.result.refuse_unmasked_layers():
            for level in levels:
                self.set_level(level)
                with self._reported_apart(dataloader.dataset.opt, level, len(levels) > 1):
                    writer = LevelTags(tb_logger, name, level) if tb_logger else tb_logger
                    super().validation(dataloader, current_iter, writer, save_img)
                self._record_validation(level, name)
            if tb_logger:
                self._board.show_options(writer, self.decisive_options(), self.network.smallest_level)
                self._board.show_charts(tb_logger, name, [self.records[level] for level in levels])
                if self.opt['is_train'] and int(current_iter) > self.opt['train']['total_iter']:  # after the training
                    self._board.show_result(tb_logger, name, [self.records[level] for level in sorted(self.records)])
                self._board.show_densities(tb_logger, [self.describe(level) for level in range(max(levels) + 1)])
                self._board.show_pictures(tb_logger, name, self._pictures, current_iter)
        self.write_records()
        if len(levels) > 1:
            get_root_logger().info(f'Validation {name}\n{level_table(self.records[level] for level in levels)}')
        wait_for_all()

    @contextmanager
    def _validating(self) -> Iterator[None]:
        """While the context is open, ``net_g`` is the :attr:`result`, without a DDP wrapper; then all is as before.

        Some of BasicSR's model classes, such as VideoRecurrentModel, validate ``net_g`` even if there is an EMA. With a
        DDP wrapper, one rank would wait for the others.
        """
        state, level, trained = random_state(), self.network.level, self.net_g
        self.net_g = self.result
        try:
            with unchanged(self.result):  # not every model class puts it back into train mode
                yield
        finally:
            self.net_g = trained
            self.set_level(level)
            set_random_state(state)

    @contextmanager
    def _reported_apart(self, dataset_opt: dict[str, Any], level: int, apart: bool) -> Iterator[None]:
        """While the context is open, a validation's log lines, images and best results are labelled with the level."""
        name, folder = dataset_opt['name'], self.opt['path']['visualization']
        self._measured = {}
        self.__dict__.pop('metric_results', None)  # video classes keep those of the first set that they validated
        if apart:
            dataset_opt['name'] = f'{name}_level{level}'
            self.opt['path']['visualization'] = os.path.join(folder, f'level{level}')
        try:
            yield
        finally:
            dataset_opt['name'], self.opt['path']['visualization'] = name, folder

    def _update_best_metric_result(self, dataset_name: str, metric: str, val: float, current_iter: int | str) -> None:
        # Called by every model class, for images and for videos, with a metric's mean over the whole set.
        self._measured[metric] = float(val)
        super()._update_best_metric_result(dataset_name, metric, val, current_iter)

    def get_current_visuals(self) -> dict[str, Tensor]:
        """As in BasicSR; keeps pictures of each level's first image in a validation for TensorBoard."""
        visuals: dict[str, Tensor] = super().get_current_visuals()
        if self.network.level not in self._pictures:
            self._pictures[self.network.level] = pictures_of(visuals)
        return visuals

    def _record_validation(self, level: int, name: str) -> None:
        record = self.record(level)
        record.update(self.describe(level))
        # A class that validates in its own way may keep no best results; the means that BasicSR logs are then taken.
        means = vars(self).get('metric_results') or {}
        measured = self._measured or {metric: float(mean) for metric, mean in means.items() if isinstance(mean, Real)}
        if measured:
            record['metrics'][name] = measured
        elif self.opt['val'].get('metrics'):
            get_root_logger().warning(f"{RECORDS} lacks {name}'s metrics, which {self.base_name} does not report.")

    def decisive_options(self) -> dict[str, Any]:
        """The options that affect levels, by their names in the YAML."""
        return {'network_g.sparsity': self.network.sparsity}

    def validate_now(self, current_iter: int) -> None:
        """Validate now, outside the schedule, on every validation set, if there is any."""
        if self.opt.get('val') is not None:
            for dataset_opt in validation_sets(self.opt).values():
                self.validation(build_dataloader(build_dataset(dataset_opt), dataset_opt), current_iter, None, False)

    # ------------------------------ records and exports ------------------------------ #

    def describe(self, level: int) -> LevelRecord:
        """The sizes of ``level``."""
        network = self.result
        num_parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
        return describe_level(network.get_level_map(), num_parameters, level)

    def record(self, level: int) -> LevelRecord:
        """The record of ``level``, created if there is none."""
        return self.records.setdefault(level, {'level': level, 'metrics': {}})

    def write_records(self) -> None:
        """Write ``levels.json`` beside the models, or in a test beside the results. Only rank 0 does this."""
        if self.opt['rank'] == 0:
            records = [self.records[level] for level in sorted(self.records)]
            folder = self.opt['path']['models' if self.opt['is_train'] else 'results_root']
            write_whole(Path(folder, RECORDS), as_json(records).encode())

    def export_level(self, level: int) -> None:
        """Write ``net_g_level{level}.pth``, ``{'params': ...}`` of the plain backbone. Only rank 0 does this."""
        if self.opt['rank'] == 0:
            with saved_whole(self.opt['path'], 'models'):
                state = {name: tensor.cpu() for name, tensor in self.network.export(level).items()}
                torch.save({'params': state}, Path(self.opt['path']['models'], level_file(level)))

    # ------------------------------ loading ------------------------------ #

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """As in BasicSR; a file that is not a checkpoint of the network is an OptionError that says why.

        To test all levels, the checkpoint must be the backward stage's. With ``param_key_g: null``, a new run's network
        and its EMA are both the file itself; a resumed run reads what the run has saved. Networks that are not resumed
        are read as in a new run.
        """
        paths = self.opt['path']
        named = next((key for key, path in paths.items() if path == load_path), '')  # unless the class has its own file
        network, key_option = (named.replace('pretrain_network', name) for name in ('network', 'param_key'))
        resumes = network in resumed_networks(self.opt)
        if named and paths.get(key_option, 'params') is None:
            param_key = param_key or 'params' if resumes else None
        try:
            loaded = read_checkpoint(load_path)
            if not self.is_train:
                require_nested(loaded)
            state = state_dict_of(loaded, param_key, f': {key_option}: null takes it')
            if resumes or not self.is_train:
                require_levels(state, self.network.smallest_level)
            with loaded_strictly(state, self._as_saved(net, state)) if strict else nullcontext():
                super().load_network(net, load_path, strict, param_key)
            self.loaded.add(load_path)
        except CheckpointError as error:
            option = 'resume_state' if resumes else named or 'pretrain_network_g'
            allowed = f'a checkpoint of {network or "network_g"}; {error}'
            raise OptionError(f'path.{option}', load_path, allowed) from error

    def _print_different_keys_loading(
        self, crt_net: nn.Module, load_net: dict[str, Tensor], strict: bool = True
    ) -> None:
        super()._print_different_keys_loading(self._as_saved(crt_net, load_net), load_net, strict)

    def _as_saved(self, net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        """The module of ``net`` that matches a checkpoint: for an MSSR network and a plain checkpoint, the backbone."""
        bare: nn.Module = self.get_bare_model(net)
        return bare.backbone if isinstance(bare, MSSR) and is_plain(state) else bare
