"""Feature taps: the depths of a network at which self-distillation passes features to the larger network.

A tap is a module whose output is the trunk's feature map at one depth. If two networks have the same architecture, the
features of the first at a tap can be fed into the second, which finishes the image from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mssr_basicsr.archs.recomputation import recomputed_within
from mssr_basicsr.foundation.checks import OptionError, match_names
from mssr_basicsr.foundation.patching import replaced


def find_feature_taps(network: nn.Module, patterns: Sequence[str] | None = None, trunk: str | None = None) -> list[str]:
    """The names of the taps, shallowest first.

    Args:
        network: the backbone.
        patterns: shell-style patterns of module names (option ``network_g.feature_taps``).
        trunk: if there are no patterns: the name of the container that is the trunk, where known
            (:func:`mssr_basicsr.register_architecture`). Otherwise the trunk is the longest suitable one of the
            network's own containers (``nn.Sequential``, ``nn.ModuleList``): a series of blocks of the same class,
            each block being a tap, or a series of convolutions and activations, each activation being a tap.

    Returns:
        The names; an empty list when no patterns are given and no trunk is found.
    """
    if patterns is not None:
        return match_names('network_g.feature_taps', patterns, [name for name, _ in network.named_modules() if name])

    rows_of_blocks, rows_of_layers = [], []
    containers = network.named_children() if trunk is None else [(trunk, network.get_submodule(trunk))]
    for name, child in containers:
        if not isinstance(child, (nn.Sequential, nn.ModuleList)):
            continue
        layers = {f'{name}.{key}': layer for key, layer in child.named_children()}
        kinds = {type(layer) for layer in layers.values()}
        if len(kinds) == 1 and not issubclass(kinds.pop(), (_ConvNd, nn.Linear)):
            rows_of_blocks.append(list(layers))
        elif all(isinstance(layer, _ConvNd) or _is_activation(layer) for layer in layers.values()):
            rows_of_layers.append([key for key, layer in layers.items() if _is_activation(layer)])
    return max(rows_of_blocks or rows_of_layers, key=len, default=[])


def _is_activation(layer: nn.Module) -> bool:
    return type(layer).__module__ == nn.ReLU.__module__


@contextmanager
def record_outputs(network: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """While the context is open, keep what each of the ``taps`` returns, by its name and in the order of its runs.

    Once the caller has cleared the mapping, nothing more is kept.
    """
    outputs: dict[str, list[Any]] = {tap: [] for tap in taps}

    def hook_of(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in outputs:  # no longer, once the caller has cleared them
                outputs[name].append(output)

        return keep

    handles = [network.get_submodule(name).register_forward_hook(hook_of(name)) for name in taps]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def features_of(outputs: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """By tap, the features among what :func:`record_outputs` has kept of one forward pass.

    They are part of the autograd graph: a loss on them reaches the weights before the tap.

    Raises:
        OptionError: a tap did not run once, as in a recurrent network, which runs its modules once per frame, or in one
            that has run twice; or it did not return one tensor.
    """
    for tap, given in outputs.items():
        if len(given) != 1 or not isinstance(given[0], Tensor):
            what = f'runs {len(given)} times' if len(given) != 1 else f'returns a {type(given[0]).__name__}'
            allowed = 'modules that run once per forward pass and return one tensor (or no train.ssd_opt)'
            raise OptionError('network_g.feature_taps', f'{tap}, which {what}', allowed)
    return {tap: features for tap, (features,) in outputs.items()}


class ImageFinisher:
    """Finishes images from another network's features: the larger network's part in self-distillation.

    Args:
        network: the frozen larger network, in eval mode and with weights that require no gradient, so that a finished
            image only costs gradient memory for the activations after the tap.
        taps: its taps, shallowest first.

    What the passed features replace is not computed if the trunk's structure allows it, that is, if the taps lie in
    one series of modules and the image depends on the earlier modules of the series only through the tap. Images from
    several taps then form one batch from each tap on. Both are tested (the network's own features must give the
    network's own image), not assumed. The test is of the weights that the network has in the first call: with others,
    such as a skip connection that is no longer zero, another finisher is needed.
    """

    def __init__(self, network: nn.Module, taps: Sequence[str]) -> None:
        self.network = network
        self.taps = taps
        self._skipped: dict[str, list[nn.Module]] | None = None
        self._one_batch = False

    def finish(self, x: Tensor, features: Mapping[str, Tensor]) -> list[Tensor]:
        """For each of ``features``, the image, (N, C, H, W), that the network makes of ``x`` if its tap returns these.

        Gradients flow to ``features``, which are in the order of the taps.
        """
        self.try_out(x)
        assert self._skipped is not None
        if self._one_batch:
            return list(self._run(x, features, self._skipped[next(iter(features))]).chunk(len(features)))
        return [self._run(x, {tap: given}, self._skipped[tap]) for tap, given in features.items()]

    def _run(self, x: Tensor, features: Mapping[str, Tensor], skipped: Sequence[nn.Module]) -> Tensor:
        """The images from all of ``features``, as one batch; the modules ``skipped``, before all taps, do not run."""

        @contextmanager
        def given() -> Iterator[None]:
            with ExitStack() as stack:
                for module in skipped:
                    stack.enter_context(replaced(module, 'forward', lambda features, *args, **kwargs: features))
                for i, (tap, output) in enumerate(features.items()):
                    module = self.network.get_submodule(tap)
                    stack.enter_context(replaced(module, 'forward', _giving(output, module.forward if i else None)))
                yield

        with recomputed_within(given, self.network):
            return self.network(torch.cat([x] * len(features)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def try_out(self, x: Tensor) -> None:
        """Find out once, with the first image of ``x``, what need not run because the features at a tap are given.

        In fp32, even where the network computes in bf16, since coarser rounding would hide it; without drawing from
        torch's random numbers, which a resumed run, in which this happens again, must find as they were.
        """
        if self._skipped is not None:
            return
        x = x[:1].float()
        in_fp32 = replaced(self.network, 'forward', partial(type(self.network).forward, self.network))
        generators = torch.random.fork_rng([] if x.device.type == 'cpu' else [x.device])
        with in_fp32, torch.autocast(x.device.type, enabled=False), generators:
            with record_outputs(self.network, self.taps) as outputs:
                image = self.network(x)
            if not isinstance(image, Tensor):
                raise TypeError(f'the network returns a {type(image).__name__}, not one tensor')
            features = features_of(outputs)
            before = {tap: self._before(tap) for tap in self.taps}
            skippable = {tap for tap in self.taps if self._gives(image, x, {tap: features[tap]}, before[tap])}
            self._skipped = {tap: before[tap] if tap in skippable else [] for tap in self.taps}
            in_one_row = len({tap.rpartition('.')[0] for tap in self.taps}) == 1 and len(skippable) == len(self.taps)
            self._one_batch = in_one_row and self._gives(image, x, features, before[self.taps[0]])

    def _before(self, tap: str) -> list[nn.Module]:
        """The modules before ``tap`` in its row."""
        row, _, index = tap.rpartition('.')
        siblings = list(self.network.get_submodule(row).named_children())
        return [module for _, module in siblings[: [name for name, _ in siblings].index(index)]]

    def _gives(self, image: Tensor, x: Tensor, features: Mapping[str, Tensor], skipped: Sequence[nn.Module]) -> bool:
        """Whether the network makes ``image`` of ``x`` if its taps return ``features`` and ``skipped`` do not run."""
        try:
            images = self._run(x, features, skipped)
        except (RuntimeError, TypeError):  # a module that does more than pass its features on
            return False
        return all(torch.allclose(one, image, rtol=1e-4, atol=1e-5) for one in images.chunk(len(features)))


def _giving(features: Tensor, forward: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """A tap's forward that gives ``features``, after what ``forward`` makes of the shallower taps' if there are any."""
    if forward is None:
        return lambda *args, **kwargs: features
    return lambda *args, **kwargs: torch.cat([forward(*args, **kwargs), features])
