"""The MSSR architecture: any registered SR network as a family of nested sub-networks."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from operator import attrgetter
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.stateless import _reparametrize_module

from mssr_basicsr.archs.feature_taps import find_feature_taps
from mssr_basicsr.archs.recomputation import recomputed_within
from mssr_basicsr.foundation.buffers import buffer_tree
from mssr_basicsr.foundation.checkpoints import CheckpointError
from mssr_basicsr.foundation.checks import (
    OptionError,
    arguments_checked,
    closest,
    find_registered,
    is_number,
    match_names,
    nearest_first,
    require_int,
)
from mssr_basicsr.foundation.modes import acts_on_modes
from mssr_basicsr.method import MAX_LEVELS
from mssr_basicsr.method.criteria import Criterion, scores_of
from mssr_basicsr.method.level_map import LevelMap, count, mask_of, num_kept, prune
from mssr_basicsr.scalable.architectures import facts_about
from mssr_basicsr.scalable.building import without_weight_files


def check_sparsity(sparsity: Any) -> list[float]:
    """``network_g.sparsity`` as floats; OptionError unless it is 0 for the dense level, then rising, and below 1."""
    if not isinstance(sparsity, (list, tuple)) or len(sparsity) < 2:
        raise OptionError('network_g.sparsity', sparsity, 'a list of two or more, such as [0, 0.5, 0.75]')
    if len(sparsity) > MAX_LEVELS:
        raise OptionError('network_g.sparsity', f'{len(sparsity)} levels', f'at most {MAX_LEVELS} levels')
    for k, share in enumerate(sparsity):
        low = -1 if k == 0 else sparsity[k - 1]
        if not is_number(share) or not low < share < 1 or (k == 0 and share):
            allowed = '0 (level 0 is the dense network)' if k == 0 else f'a share above {low} and below 1'
            raise OptionError(f'network_g.sparsity[{k}]', share, allowed)
    return [float(share) for share in sparsity]


def find_prunable(backbone: nn.Module, prunable: Sequence[str], unprunable: Sequence[str]) -> list[str]:
    """The names of the weights that pruning may remove.

    These are the weights of convolutions and linear layers (never biases, norms or attention tables: our choice, as
    these are under 1 % of the parameters) that match a pattern of ``prunable`` and none of ``unprunable``. Weights that
    the architecture keeps from training, such as those that shift colours, are not among them.
    """
    layers = [name for name, layer in backbone.named_modules() if isinstance(layer, (_ConvNd, nn.Linear))]
    names = [f'{name}.weight' for name in layers]
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    if not any(name not in parameters or parameters[name].requires_grad for name in names):
        allowed = 'a network with convolutions or linear layers that train'
        raise OptionError('network_g.backbone', type(backbone).__name__, allowed)
    removed = set(match_names('network_g.unprunable', unprunable, names))
    kept = [name for name in match_names('network_g.prunable', prunable, names) if name not in removed]
    computed = [name for name in kept if name not in parameters]
    if computed:
        allowed = f'a network whose weights are parameters ({computed[0]} is computed, as weight_norm does), '
        raise OptionError('network_g.backbone', type(backbone).__name__, allowed + 'or name it in unprunable')
    kept = [name for name in kept if parameters[name].requires_grad]
    if not kept:
        raise OptionError('network_g.unprunable', list(unprunable), 'patterns that leave one of ' + ', '.join(names))
    for name in kept:
        shared = [other for other, weight in parameters.items() if weight is parameters[name] and other != name]
        if shared:
            allowed = f'a network whose layers share no weights ({name} is also {shared[0]}), or name it in unprunable'
            raise OptionError('network_g.backbone', type(backbone).__name__, allowed)
    return kept


def is_plain(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of a plain backbone, as stock BasicSR saves it."""
    return not any(key.startswith('level_map.') for key in state_dict)


def require_nested(checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a checkpoint is the forward stage's, which has trained its smallest level last.

    The weights of its larger levels have been rewound and trained since those levels ended.
    """
    if 'rewind' in checkpoint:
        raise CheckpointError('it is from the forward stage; the levels are only nested after the backward stage')


def require_levels(state_dict: Mapping[str, Tensor], smallest: int) -> None:
    """Raise CheckpointError unless ``smallest`` is the smallest level in a state dict, if it is not a plain one.

    With too many levels in ``network_g.sparsity`` the smallest would have none of the prunable weights; with too few,
    it would have those of several.
    """
    found = max((int(t.max()) for key, t in state_dict.items() if key.startswith('level_map.')), default=smallest)
    if found != smallest:
        raise CheckpointError(f'its smallest level is {found}, but that of network_g.sparsity is {smallest}')


def refuse_unknown(unknown: Mapping[str, Any], backbone: Any) -> None:
    """Raise OptionError for options that :class:`MSSR` does not have: misspelt ones, or the backbone's."""
    for key, found in unknown.items():
        known = [name for name in inspect.signature(MSSR).parameters if name != 'unknown']
        if isinstance(backbone, Mapping) and key in backbone:
            raise OptionError(f'network_g.{key}', found, f'network_g.backbone.{key} alone')
        allowed = closest(key, known) or f'one of {", ".join(known)}'
        reason = f"(there is no option {key}; the architecture's own go into network_g.backbone)"
        raise OptionError(f'network_g.{key}', found, f'{allowed} {reason}')


@ARCH_REGISTRY.register()
class MSSR(nn.Module):
    """An SR network that holds nested sub-networks of itself, its levels (Lin et al., CVPR 2023).

    At each level it is the backbone with the weights outside the level's mask set to zero. The backbone's code stays as
    it is, and so do the names in ``named_parameters``, by which a model class may choose what trains; whatever else a
    class reads or sets of its network and MSSR does not have, such as ``no_weight_decay``, is the backbone's. A masked
    weight keeps its value and gets a gradient of exactly zero. In eval mode without gradients, masking is done once, in
    the first forward pass, and again only after the weights, the level map or the level have changed. A backbone that
    changes when it enters eval mode, such as one that merges convolutions, then does so with the masked weights, too.

    Args:
        backbone: the options, with ``type``, of any architecture registered with BasicSR.
        sparsity: the removed share of the prunable weights at each level, from 0 (dense) to K (smallest).
        level: the level to run at, for a stock ``SRModel`` or ``basicsr/test.py``; MSSR's own models set it
            themselves, and refuse it here. Above 0, the checkpoint's level map must have that level. A checkpoint of
            the forward stage holds only its smallest level as it was trained: for others, use the backward stage's
            checkpoint, or ``net_g_level{k}.pth``.
        prunable: name patterns of the weights that pruning may remove, among those of convolutions and linear layers.
            Default: all of them.
        unprunable: name patterns of weights to exclude from these. Default: none.
        feature_taps: name patterns of the modules after which self-distillation can pass features to the larger
            network. Default: the trunk's blocks, found by :func:`find_feature_taps`.

    The state dict has the backbone's entries under ``backbone.`` and the level map's, uint8, under ``level_map.``.
    ``load_state_dict`` also accepts a plain state dict of the backbone: all of its weights are then in every level, as
    before the first pruning.
    """

    _version = 1  # of the state dict's format; torch keeps it in every state dict, and so in every checkpoint

    def __init__(
        self,
        backbone: Mapping[str, Any] | None = None,
        sparsity: Sequence[float] | None = None,
        level: int = 0,
        prunable: Sequence[str] | None = None,
        unprunable: Sequence[str] | None = None,
        feature_taps: Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, backbone)
        self.sparsity = check_sparsity(sparsity)
        self._level = require_int('network_g.level', level, 0, self.smallest_level)
        if not isinstance(backbone, Mapping) or 'type' not in backbone:
            raise OptionError('network_g.backbone', backbone, 'the options of an architecture, with its type')
        architecture = find_registered(ARCH_REGISTRY, backbone['type'])
        if architecture is None:
            allowed = nearest_first(backbone['type'], [name for name, _ in ARCH_REGISTRY if name != 'MSSR'])
            allowed += '; others must be imported first: by their own train.py, or by mssr COMMAND --import MODULE'
            raise OptionError('network_g.backbone.type', backbone['type'], allowed)
        self.backbone_options = deepcopy(without_weight_files(backbone))
        with arguments_checked('network_g.backbone', backbone, architecture):
            self.backbone: nn.Module = build_network(backbone)

        self.prunable_names = find_prunable(
            self.backbone, ('*',) if prunable is None else prunable, () if unprunable is None else unprunable
        )
        self.feature_taps = find_feature_taps(self.backbone, feature_taps, facts_about(backbone['type']).trunk)
        weights = self.prunable_weights()
        self.level_map = buffer_tree(self.whole_level_map())
        # Of the weights' dtype: a product with a bool tensor takes several times as long.
        self.mask = buffer_tree(
            {name: torch.ones_like(w, requires_grad=False) for name, w in weights.items()}, persistent=False
        )
        #: Whether normalisation layers use, and leave as they are, the running statistics that they have, as they do
        #: in the backward stage, since all levels share them.
        self.keep_statistics = False
        self._num_running = 0  # forward passes, and parts of such that are computed again
        self._mask_is_current = False
        self._acts_on_modes = acts_on_modes(self.backbone)
        self._masked_weights: dict[str, Tensor] = {}  # that eval mode has in place of the backbone's own
        self._masked_from: list[tuple[int, int]] | None = None
        # Level maps and masks change with the level only, on all ranks at once: DDP need not send them each forward.
        # This is the last attribute that is set here: see __setattr__.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if not name.startswith('backbone.')
        ]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get('_modules', {}).get('backbone')  # None while this is built or unpickled
            if backbone is None or (name.startswith('__') and name.endswith('__')):  # copy and pickle look for these
                raise
            return getattr(backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What :meth:`__getattr__` finds in the backbone is set there, too, once ``__init__`` has set its own."""
        own = name in vars(self) or name in vars(self).get('_modules', {}) or hasattr(type(self), name)
        if own or '_ddp_params_and_buffers_to_ignore' not in vars(self) or not hasattr(self.backbone, name):
            super().__setattr__(name, value)
        else:
            setattr(self.backbone, name, value)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As for ``nn.Module``, but by the backbone's own names. (MSSR itself has no parameters.)"""
        if recurse:
            yield from self.backbone.named_parameters(prefix, True, remove_duplicate)

    @property
    def smallest_level(self) -> int:
        """K, the number of the smallest sub-network."""
        return len(self.sparsity) - 1

    @property
    def level(self) -> int:
        """The level that the network is at: 0 is dense. Setting it takes effect in the next forward pass."""
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        self._level = require_int('level', level, 0, self.smallest_level)
        self._mask_is_current = False

    def prunable_weights(self) -> dict[str, Tensor]:
        """The backbone's prunable weights by name, unmasked: the parameters themselves."""
        return dict(zip(self.prunable_names, self._weights()))

    def get_level_map(self) -> dict[str, Tensor]:
        """The level map by weight name: uint8 tensors with the weights' shapes; the buffers themselves."""
        return dict(self.level_map.named_buffers())

    def whole_level_map(self) -> dict[str, Tensor]:
        """A new level map in which every level has all weights, as before the first pruning."""
        return {
            name: torch.full_like(weight, self.smallest_level, dtype=torch.uint8)
            for name, weight in self.prunable_weights().items()
        }

    def set_level_map(self, level_map: LevelMap) -> None:
        """Copy ``level_map`` (one tensor per prunable weight) into the network's."""
        for name, levels in self.get_level_map().items():
            levels.copy_(level_map[name])
        self._mask_is_current = False

    @torch.no_grad()
    def prune(self, level: int, criterion: Criterion, generator: torch.Generator) -> None:
        """Make sub-network ``level`` from ``level - 1`` by pruning the weights with the lowest scores to its sparsity.

        Args:
            level: the level to make; level ``level - 1`` must have been made and be the smallest so far.
            criterion: gives the scores; see :mod:`mssr_basicsr.method.criteria`.
            generator: for criteria that draw random numbers.

        Raises:
            OptionError: the criterion does not give each weight a score.
        """
        level_map, weights = self.get_level_map(), self.prunable_weights()
        detached = {name: weight.detach() for name, weight in weights.items()}
        scores = scores_of(criterion, detached, mask_of(level_map, level), generator)
        total = sum(weight.numel() for weight in weights.values())
        self.set_level_map(prune(level_map, scores, level, num_kept(total, self.sparsity[level])))

    @torch.no_grad()
    def export(self, level: int) -> dict[str, Tensor]:
        """Level ``level`` as a plain state dict (copies) that the unmodified backbone loads with ``strict=True``."""
        state = {name: tensor.clone() for name, tensor in self.backbone.state_dict().items()}
        for name, mask in mask_of(self.get_level_map(), level).items():
            state[name][~mask] = 0
        return state

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """What the backbone makes of its inputs with the sub-network at the current level.

        Most take one tensor, (N, C, H, W), and return the upscaled images.
        """
        weights = self._level_weights()
        with recomputed_within(lambda: self._with_weights(weights), self.backbone):
            return self.backbone(*inputs, **keywords)

    @contextmanager
    def _with_weights(self, weights: dict[str, Tensor]) -> Iterator[None]:
        self._num_running += 1
        try:
            with _reparametrize_module(self.backbone, weights):
                yield
        finally:
            self._num_running -= 1

    @contextmanager
    def refuse_unmasked_layers(self) -> Iterator[None]:
        """While the context is open, a prunable layer that runs with unmasked weights is an error.

        A model class may reach the layers, or other methods that run them, as attributes of this network.

        Raises:
            OptionError: when a prunable layer runs neither in a forward pass of this network nor again by
                ``torch.utils.checkpoint`` (see :func:`recomputed_within`): its weight would not be masked there, and
                every level would be the dense network.
        """

        def refuse(layer: nn.Module, inputs: Any) -> None:
            if not self._num_running:
                allowed = (
                    'a network whose layers run in its forward pass, and again only by torch.utils.checkpoint without '
                    'contexts of its own'
                )
                raise OptionError('network_g.backbone', self.backbone_options['type'], allowed)

        layers = [self.backbone.get_submodule(name.rpartition('.')[0]) for name in self.prunable_names]
        handles = [layer.register_forward_pre_hook(refuse) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _weights(self) -> list[Tensor]:
        # By attribute, since the copies that DataParallel makes of a module have no named_parameters.
        return [attrgetter(name)(self.backbone) for name in self.prunable_names]

    def _level_weights(self) -> dict[str, Tensor]:
        """The weights, by name, that a forward pass has in place of the backbone's own."""
        acts_on_eval = self._acts_on_modes and not self.training
        if self._level == 0 and not acts_on_eval:
            return {}
        self.update_mask()
        weights = self._weights()
        with_gradients = self.training or torch.is_grad_enabled()
        if with_gradients and not acts_on_eval:
            return self._masked(weights)
        # BasicSR's EMA changes .data, which no version counter sees; but its test() calls eval() before each image,
        # which drops these weights (see train).
        source = [(weight.data_ptr(), weight._version) for weight in weights]
        if not with_gradients and self._masked_from == source:
            return self._masked_weights
        masked = self._masked(weights)
        if acts_on_eval:
            self._leave_eval_mode()
            self._enter_eval_mode(masked)
        else:
            self._masked_weights = masked
        self._masked_from = None if with_gradients else source
        return masked

    def _masked(self, weights: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.prunable_names, torch._foreach_mul(weights, list(self.mask.buffers()))))

    def _enter_eval_mode(self, weights: dict[str, Tensor]) -> None:
        """Put the backbone, which acts on modes, into eval mode with ``weights``, which it may change: not its own."""
        in_full_precision = torch.autocast(next(iter(weights.values())).device.type, enabled=False)
        with self._with_weights(weights), torch.no_grad(), in_full_precision:
            self.backbone.eval()
        self._masked_weights = {name: weight.detach() for name, weight in weights.items()}

    def _leave_eval_mode(self) -> None:
        """Put the backbone into train mode; what it undoes in its weights then, it undoes where it has done it."""
        weights = {name: weight.clone() for name, weight in self._masked_weights.items()}
        with self._with_weights(weights), torch.no_grad():
            self.backbone.train()
        self._masked_weights, self._masked_from = {}, None

    def update_mask(self) -> None:
        """Set the mask to that of the current level; the forward pass does this too.

        Raises:
            OptionError: the level map does not have this level; the network would silently be larger.
        """
        if self._mask_is_current:
            return
        masks = mask_of(self.get_level_map(), self._level)
        lacking = self.why_lacking(self._level)
        if lacking is not None:
            allowed = f'a level that the loaded MSSR checkpoint has, trained with this sparsity ({lacking})'
            raise OptionError('network_g.level', self._level, allowed)
        for name, buffer in self.mask.named_buffers():
            buffer.copy_(masks[name])
        self._masked_from = None
        self._mask_is_current = True

    def why_lacking(self, level: int) -> str | None:
        """None if the level map has ``level`` at the sparsity asked for; otherwise what it has instead."""
        masks = mask_of(self.get_level_map(), level)
        total = sum(mask.numel() for mask in masks.values())
        kept, expected = count(masks), num_kept(total, self.sparsity[level])
        if abs(kept - expected) <= max(1, 1e-3 * total):
            return None
        asked = f'network_g.sparsity[{level}] = {self.sparsity[level]} asks for {expected}'
        return f'its level {level} keeps {kept} of {total} prunable weights; {asked}'

    def train(self, mode: bool = True) -> MSSR:
        """As for ``nn.Module``; also drops the masked weights that are cached for eval mode.

        With :attr:`keep_statistics` normalisation layers stay in eval mode.
        """
        if self._acts_on_modes:
            self._leave_eval_mode()
            if not mode:
                own = self.prunable_weights()
                self._enter_eval_mode({name: weight.detach().clone() for name, weight in own.items()})
            self.training = mode  # its other modules, level map and mask, have none
        else:
            super().train(mode)
            self._masked_weights = {}
        self._masked_from = None
        if self.keep_statistics:
            for module in self.backbone.modules():
                if isinstance(module, _NormBase):
                    module.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for ``nn.Module``, for a state dict of this class or a plain one of the backbone.

        Raises:
            OptionError: ``level`` is above 0 and the loaded level map does not have that level.
            CheckpointError: the state dict's format is newer than this class supports.
        """
        versions = getattr(state_dict, '_metadata', {})  # of its modules, some of which convert what is older
        version = versions.get('', {}).get('version', 1)
        if is_plain(state_dict):
            state_dict = OrderedDict(
                {
                    **{f'backbone.{key}': value for key, value in state_dict.items()},
                    **{f'level_map.{key}': value for key, value in self.whole_level_map().items()},
                }
            )
            of_backbone = {f'backbone.{name}'.rstrip('.'): version for name, version in versions.items()}
            state_dict._metadata = of_backbone  # type: ignore[attr-defined]  # where torch keeps them
        elif version > self._version:
            raise CheckpointError(
                f'its format is version {version}; this mssr-basicsr reads up to {self._version}: update mssr-basicsr'
            )
        result = super().load_state_dict(state_dict, strict, assign)
        self._mask_is_current = False
        self._masked_from = None
        self.update_mask()
        return result
