"""The backward stage: recovers and fine-tunes only the pruned weights, from the smallest level to the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from basicsr.utils import get_root_logger
from torch import Tensor, nn

from mssr_basicsr.adapter.ranks import digest
from mssr_basicsr.adapter.records import level_file
from mssr_basicsr.adapter.stage_options import BackwardOptions
from mssr_basicsr.archs.forward_pass import ForwardPass, only_pass, record_passes
from mssr_basicsr.foundation.checkpoints import CheckpointError, loaded_strictly, read_checkpoint, state_dict_of
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.foundation.modes import weights_set
from mssr_basicsr.foundation.saving import write_whole
from mssr_basicsr.losses.distillation_term import require_same_shape
from mssr_basicsr.method.frozen_weights import FrozenWeights
from mssr_basicsr.method.level_map import count, delta_of
from mssr_basicsr.method.recovery import recover_weights
from mssr_basicsr.method.schedules import LevelTraining, plan_expansion
from mssr_basicsr.models.distilling_model import frozen_copy
from mssr_basicsr.models.levelwise_training import LevelwiseTraining, start_from_ema


class BackwardStage(LevelwiseTraining):
    """Grows the smallest level back, level by level: recovers the weights that were pruned last and trains only these.

    It starts from the forward stage's last checkpoint (``path.pretrain_network_g``, read from ``params_ema`` if there
    is one). Everything that a smaller level has, including biases, norms and running statistics, stays bit-identical,
    so that the resulting set of weights holds every level. This is checked at the start and the end of each level.

    The options are :class:`BackwardOptions`. Beside the models it writes ``net_g.mssr``, every level in one file, and,
    with ``ticket_opt``, ``ticket_level{k}.pth``, copies of the tickets, which a resumed run needs.
    """

    options_class = BackwardOptions
    options: BackwardOptions
    _passes: list[ForwardPass] | None = None  # of the iteration that runs

    def __init__(self, opt: dict[str, Any]) -> None:
        if opt['path'].get('pretrain_network_g') is None:
            raise OptionError('path.pretrain_network_g', None, "the forward stage's last checkpoint")
        start_from_ema(opt)
        super().__init__(opt)

    def make_plan(self) -> list[LevelTraining]:
        network = self.network
        delta_sizes = [count(delta_of(network.get_level_map(), k)) for k in range(network.smallest_level + 1)]
        for level in range(1, network.smallest_level + 1):
            lacking = network.why_lacking(level)
            if lacking is not None:
                if not any(delta_sizes[level - 1 : -1]):  # neither this level nor a smaller one has been made
                    done = f'this one has been pruned to level {level - 1} only'
                    lacking = done if level > 1 else 'nothing is pruned in this one'
                allowed = f"the forward stage's last checkpoint ({lacking})"
                raise OptionError('path.pretrain_network_g', self.opt['path']['pretrain_network_g'], allowed)
        return plan_expansion(self.options.expansion, delta_sizes)

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.network.keep_statistics = True
        self.network.train()
        self.cri_ticket = self.build_distillation_loss('ticket_opt', self.options.ticket_opt)
        if self.cri_ticket is not None:
            self.ticket = frozen_copy(self.network.backbone)
            for training in self.plan.trainings:
                self._load_ticket(training.level)  # a wrong file is refused now, and not after days of training
            self.distil_by('ticket_opt', self._ticket_loss)

    def levels_to_validate(self) -> Sequence[int]:
        return range(self.network.level, self.network.smallest_level + 1)

    # ------------------------------ from level to level ------------------------------ #

    def begin_run(self) -> None:
        """Recover all pruned weights; each level's training then uses its own."""
        self._recover()
        self.export_and_record(self.network.smallest_level)
        self._copy_tickets()

    def _recover(self) -> None:
        network, rewind_point = self.network, {}
        if self.options.recover == 'rewind':
            path = self.opt['path']['pretrain_network_g']
            checkpoint = read_checkpoint(path)
            if 'rewind' not in checkpoint:
                raise OptionError('train.recover', 'rewind', f'ticket, zero ({path} has no rewind point)')
            rewind_point = checkpoint['rewind']
        pruned = delta_of(network.get_level_map(), 0, network.smallest_level)
        recover_weights(network.prunable_weights(), pruned, self.options.recover, rewind_point)

    def freeze_weights(self, training: LevelTraining) -> FrozenWeights:
        """Only the delta trains."""
        delta = delta_of(self.network.get_level_map(), training.level, self._grown_from(training))
        return FrozenWeights(self.network.backbone, delta, others_train=False)

    def restart_training(self, training: LevelTraining) -> None:
        super().restart_training(training)
        smaller = range(self._grown_from(training), self.network.smallest_level + 1)
        self._digests = {level: self._digest(level) for level in smaller}
        if self.cri_ticket is not None:
            self._load_ticket(training.level)

    def _grown_from(self, training: LevelTraining) -> int:
        """The level that ``training`` grows into its own: that of the training before, at first the smallest."""
        before = self.plan.before(training)
        return self.network.smallest_level if before is None else before.level

    def check_result(self, training: LevelTraining) -> None:
        """Raise RuntimeError unless every smaller level is bit-identical to before this level's training."""
        changed = [level for level, before in self._digests.items() if self._digest(level) != before]
        if changed:
            raise RuntimeError(f'Training level {training.level} has changed the smaller levels {changed}')

    def _digest(self, level: int) -> str:
        return digest(self.network.export(level))

    def end_level(self, training: LevelTraining) -> None:
        super().end_level(training)
        get_root_logger().info(f'Level {training.level} left levels {sorted(self._digests)} bit-identical.')

    def write_result(self) -> None:
        """Write ``net_g.mssr``, every level in one file. Only rank 0 does this."""
        if self.opt['rank'] == 0:
            path = Path(self.opt['path']['models'], 'net_g.mssr')
            data = self.pack()
            write_whole(path, data)
            get_root_logger().info(f'All levels in one file of {len(data):,} bytes: {path}')

    # ------------------------------ tickets ------------------------------ #

    def networks_to_learn_from(self) -> list[nn.Module]:
        return [] if self.cri_ticket is None else [self.ticket]

    @contextmanager
    def distilling(self, current_iter: int) -> Iterator[None]:
        """Keep what the network is given, for its ticket to be given the same."""
        if self.cri_ticket is None:
            yield
        else:
            with record_passes(self.network.backbone) as self._passes:
                try:
                    yield
                finally:
                    self._passes = None

    def _ticket_loss(self, output: Tensor, gt: Tensor) -> Tensor | None:
        if self._passes is None:  # the class also uses the loss outside its iterations
            return None
        image = only_pass(self._passes).repeated_by(self.ticket)
        loss: Tensor = self.cri_ticket(output, image)
        require_same_shape('ticket_opt', output, image)
        return loss

    def _ticket_file(self, level: int) -> Path:
        """The file with the ticket of ``level``: the forward stage's or, once this stage has begun, its own copy."""
        copy = self._ticket_copy(level)
        begun = bool(self.opt['path'].get('resume_state')) or copy.is_file()
        return copy if begun else Path(self.opt['path']['pretrain_network_g']).with_name(level_file(level))

    def _ticket_copy(self, level: int) -> Path:
        return Path(self.opt['path']['models'], f'ticket_level{level}.pth')

    def _load_ticket(self, level: int) -> None:
        path = self._ticket_file(level)
        try:
            ticket = state_dict_of(read_checkpoint(path), 'params')
            with loaded_strictly(ticket, self.ticket), weights_set(self.ticket):
                self.ticket.load_state_dict(ticket)
        except CheckpointError as error:
            allowed = f"level {level}'s ticket as the forward stage wrote it, beside its last checkpoint ({error})"
            raise OptionError('train.ticket_opt', str(path), allowed) from error

    def _copy_tickets(self) -> None:
        if self.cri_ticket is not None and self.opt['rank'] == 0:
            for level in [training.level for training in self.plan.trainings]:
                write_whole(self._ticket_copy(level), self._ticket_file(level).read_bytes())
