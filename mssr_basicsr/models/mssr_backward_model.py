"""The backward stage: recovering and fine-tuning just the pruned weights, from the smallest level to the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from mssr_basicsr.adapter.ranks import digest
from mssr_basicsr.foundation.checkpoints import CheckpointError, read_checkpoint, require_same_entries, state_dict_of
from mssr_basicsr.foundation.checks import OptionError, require_one_of
from mssr_basicsr.foundation.saving import write_whole
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import count, delta_of
from mssr_basicsr.method.recovery import RECOVERY_STARTS, recover_weights
from mssr_basicsr.method.schedules import Stage, build_expansion
from mssr_basicsr.models.mssr_model import MSSRModel, frozen_copy
from mssr_basicsr.scalable.errors import ScalableFileError
from mssr_basicsr.scalable.packing import level_metrics, pack


@MODEL_REGISTRY.register()
class MSSRBackwardModel(MSSRModel):
    """Grows the smallest level back: recovers the weights that the last pruning step took, trains those alone; again.

    It starts from the forward stage's last checkpoint (``path.pretrain_network_g``, read from ``params_ema`` if there
    is one). All that a smaller level has, biases and norms included, stays bit-identical, so that the one set of
    weights in the result is every level. That is checked when each stage ends.

    Options under ``train``:
        expansion: options of the expansion schedule, with its type, a name in ``EXPANSION_REGISTRY``.
        recover: what recovered weights start from, ``ticket`` (default), ``rewind`` or ``zero``; see
            :func:`recover_weights`.
        ticket_opt: options of a loss, with its type, that compares a level's images with those of its own ticket; it
            is added to the pixel loss. The tickets are the ``net_g_level{k}.pth`` beside ``path.pretrain_network_g``;
            ``ticket_level{k}.pth`` are copies, which a resumed run needs. Default: none.
    """

    distillation_option = 'ticket_opt'

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['path'].get('pretrain_network_g') is None:
            raise OptionError('path.pretrain_network_g', None, "the forward stage's last checkpoint")
        if not opt['path'].get('resume_state'):
            opt['path'].setdefault('param_key_g', 'params_ema')  # BasicSR takes params where there is no params_ema
        super().__init__(opt)

    def plan_stages(self) -> list[Stage]:
        self.recover = self._train_opt.get('recover', 'ticket')
        require_one_of('train.recover', self.recover, RECOVERY_STARTS)
        network = self.network
        for name, module in network.backbone.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                allowed = f'one without running statistics, which change smaller levels ({name} has them)'
                raise OptionError('network_g.backbone', type(network.backbone).__name__, allowed)
        delta_sizes = [count(delta_of(network.get_level_map(), k)) for k in range(network.smallest_level + 1)]
        if sum(delta_sizes[:-1]) == 0:
            allowed = "the forward stage's last checkpoint (in this one nothing is pruned)"
            raise OptionError('path.pretrain_network_g', self.opt['path']['pretrain_network_g'], allowed)
        for level in range(1, network.smallest_level + 1):  # raises unless the checkpoint's level map has them all
            network.level = level
            network.update_mask()
        network.level = 0
        try:
            self._pack()  # what the file cannot hold is refused now, and not after days of training
        except ScalableFileError as error:
            allowed = f'one that a .mssr file can hold ({error})'
            raise OptionError('network_g.backbone', network.backbone_options, allowed) from error
        return build_expansion(self._train_opt.get('expansion'), delta_sizes)

    def init_training_settings(self) -> None:
        super().init_training_settings()
        if self.cri_distill is not None:
            self.ticket = frozen_copy(self.network.backbone)
            for stage in self.stages:
                self._load_ticket(stage.level)  # a wrong file is refused now, and not after days of training
            self.add_to_pixel_loss(self._ticket_loss)

    def _ticket_file(self, level: int) -> Path:
        """The ticket of ``level``: as the forward stage wrote it or, once a stage has begun, this stage's own copy."""
        copy = Path(self.opt['path']['models'], f'ticket_level{level}.pth')
        begun = bool(self.opt['path'].get('resume_state')) or copy.is_file()
        return copy if begun else Path(self.opt['path']['pretrain_network_g']).with_name(f'net_g_level{level}.pth')

    def _load_ticket(self, level: int) -> None:
        path = self._ticket_file(level)
        try:
            ticket = state_dict_of(read_checkpoint(path), 'params')
            require_same_entries(ticket, self.ticket.state_dict())
        except CheckpointError as error:
            allowed = f"what the forward stage wrote as level {level}'s ticket, beside its last checkpoint ({error})"
            raise OptionError('train.ticket_opt', str(path), allowed) from error
        self.ticket.load_state_dict(ticket)

    def _ticket_loss(self, output: Tensor, gt: Tensor) -> dict[str, Tensor]:
        return {'l_ticket': self.cri_distill(output, self.ticket(self.lq))}

    def levels_to_validate(self) -> Sequence[int]:
        return range(self.network.level, self.network.smallest_level + 1)

    def _smaller(self, stage: Stage) -> int:
        """The level that is there already when ``stage`` begins."""
        index = self.stages.index(stage)
        return self.stages[index - 1].level if index > 0 else self.network.smallest_level

    def begin_stage(self, stage: Stage) -> None:
        if stage == self.stages[0]:
            self._recover()
            self.export_level(self.network.smallest_level)
            self._copy_tickets()

    def _recover(self) -> None:
        network, rewind_point = self.network, {}
        if self.recover == 'rewind':
            path = self.opt['path']['pretrain_network_g']
            checkpoint = read_checkpoint(path)
            if 'rewind' not in checkpoint:
                raise OptionError('train.recover', 'rewind', f'ticket, zero ({path} has no rewind point)')
            rewind_point = checkpoint['rewind']
        pruned = delta_of(network.get_level_map(), 0, network.smallest_level)
        recover_weights(network.prunable_weights(), pruned, self.recover, rewind_point)

    def _copy_tickets(self) -> None:
        if self.cri_distill is not None and self.opt['rank'] == 0:
            for level in [stage.level for stage in self.stages]:
                data = self._ticket_file(level).read_bytes()
                write_whole(Path(self.opt['path']['models'], f'ticket_level{level}.pth'), data)

    def _restart_optimizer(self, stage: Stage) -> None:
        super()._restart_optimizer(stage)
        if self.cri_distill is not None:
            self._load_ticket(stage.level)

    def freeze_weights(self, stage: Stage) -> FrozenWeights:
        """Only the delta trains."""
        smaller = self._smaller(stage)
        self._digests = {level: self._digest(level) for level in range(smaller, self.network.smallest_level + 1)}
        delta = delta_of(self.network.get_level_map(), stage.level, smaller)
        return FrozenWeights(self.network.backbone, delta, others_train=False)

    def _digest(self, level: int) -> str:
        return digest(self.network.export(level))

    def _pack(self) -> bytes:
        return pack(self.result, self.opt['scale'], level_metrics(self.records.values()))

    def write_result(self) -> None:
        """Write ``net_g.mssr``, every level in one file. Rank 0 does."""
        if self.opt['rank'] == 0:
            path = Path(self.opt['path']['models'], 'net_g.mssr')
            data = self._pack()
            write_whole(path, data)
            get_root_logger().info(f'All levels in one file of {len(data):,} bytes: {path}')

    def check_result(self, stage: Stage) -> None:
        """Raise RuntimeError unless every smaller level is, bit for bit, what it was before the stage."""
        changed = [level for level, before in self._digests.items() if self._digest(level) != before]
        if changed:
            raise RuntimeError(f'End of level {stage.level}: smaller levels {changed} are not what they were')
        get_root_logger().info(f'Levels {sorted(self._digests)} are bit-identical to before level {stage.level}.')
