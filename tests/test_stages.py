"""Both stages, end to end, through BasicSR's own pipeline."""

from __future__ import annotations

import json
import math
import random
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest import mock

import numpy as np
import pytest
import torch
import toy
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
from conftest import (
    BACKBONES,
    SPARSITY,
    TOY_EDSR,
    Run,
    contents,
    equal,
    forget_after,
    load,
    load_network,
    pruned_mssr,
    save_as_forward_stage,
)
from torch import Tensor, nn
from toy import Normalised

from mssr_basicsr.archs.feature_taps import ImageFinisher
from mssr_basicsr.archs.mssr_arch import MSSR
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.losses.ssd_loss import SSDLoss
from mssr_basicsr.method.criteria import CRITERION_REGISTRY
from mssr_basicsr.method.level_map import num_kept
from mssr_basicsr.method.schedules import EXPANSION_REGISTRY, LevelTraining
from mssr_basicsr.models.backward_stage import BackwardStage
from mssr_basicsr.models.forward_stage import ForwardStage
from mssr_basicsr.models.levelwise_training import LevelwiseTraining
from mssr_basicsr.models.nested_levels import NestedLevels
from mssr_basicsr.scalable.model import ScalableModel

pytestmark = pytest.mark.slow
TOTAL = sum(weight.numel() for weight in MSSR(TOY_EDSR, SPARSITY).prunable_weights().values())


class Starts(list):  # type: ignore[type-arg]
    """What a model looked like at the start of each of its stages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        begin = LevelwiseTraining.begin_level

        def spy(model: Any, training: LevelTraining) -> None:
            begin(model, training)
            self.append(
                {
                    'level': training.level,
                    'weights': deepcopy(model.network.backbone.state_dict()),
                    'ema': deepcopy(model.net_g_ema.state_dict()),
                    'network': deepcopy(model.network.state_dict()),
                    'rewind': deepcopy(model.rewind_point.state_dict()) if hasattr(model, 'rewind_point') else None,
                    'momenta': len(model.optimizer_g.state),
                    'lr': model.get_current_learning_rate()[0],
                    'schedulers': len(model.schedulers),
                }
            )

        monkeypatch.setattr(LevelwiseTraining, 'begin_level', spy)


# ------------------------------ forward ------------------------------ #


def test_the_forward_stage(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels of the asked sizes, nested; survivors rewound; optimizer, EMA and schedule anew; everything recorded."""
    starts = Starts(monkeypatch)
    forward_opt['train']['optim_g']['weight_decay'] = 0.1  # pruned weights must stay what they were all the same
    forward_opt['logger']['use_tb_logger'] = True
    models = run(forward_opt) / 'models'

    final = load(models / 'net_g_latest.pth')
    assert final.keys() == {'params', 'params_ema', 'rewind', 'teacher'}
    level_map = load_network(models / 'net_g_latest.pth').get_level_map()
    tickets = [load(models / f'net_g_level{level}.pth') for level in range(3)]
    for level, ticket in enumerate(tickets):
        assert ticket.keys() == {'params'}
        build_network(TOY_EDSR).load_state_dict(ticket['params'], strict=True)
        kept = sum(int((ticket['params'][name] != 0).sum()) for name in level_map)
        assert kept == num_kept(TOTAL, SPARSITY[level]) == sum(int((m >= level).sum()) for m in level_map.values())

    for k, start in enumerate(starts):
        assert (start['level'], start['momenta'], start['lr'], start['schedulers']) == (k, 0, 1e-3, 1)
        assert equal(start['ema'], start['network'])
        if k > 0:
            for name, weight in start['weights'].items():
                alive = level_map[name] >= k if name in level_map else torch.ones_like(weight, dtype=torch.bool)
                assert torch.equal(weight[alive], start['rewind'][name][alive])
    assert len(starts) == 3

    # A pruned weight has, to the end, the value it had when the last level that contains it was done.
    for key in ('params', 'params_ema'):
        for name, levels in level_map.items():
            for level in range(3):
                parked = levels == level
                assert torch.equal(final[key][f'backbone.{name}'][parked], tickets[level]['params'][name][parked])

    records = json.loads((models / 'levels.json').read_text())
    assert [record['level'] for record in records] == [0, 1, 2]
    for record, sparsity in zip(records, SPARSITY):
        assert record['iterations'] == 4
        assert record['prunable_total'] == TOTAL
        assert record['sparsity'] == pytest.approx(sparsity, abs=1e-3)
        assert record['parameters_total'] - record['parameters'] == TOTAL - record['prunable']
        assert record['metrics']['toyval']['psnr'] > 5
        assert record['layer_density'].keys() == level_map.keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(models.parents[2] / 'tb_logger' / 'forward')).Reload()
    assert {'levels/toyval/psnr', 'layer_density/conv_first.weight', 'losses/l_pix', 'losses/l_ssd'} <= set(
        events.Tags()['scalars']
    )
    assert [event.step for event in events.Scalars('levels/toyval/psnr')] == [0, 1, 2]
    assert {f'metrics/toyval/psnr_level{level}' for level in range(3)} <= set(events.Tags()['scalars'])
    (layout,) = events.Tensors('custom_scalars__config__')
    assert rb'^metrics/(toyval/)?psnr_level\d+$' in layout.tensor_proto.string_val[0]


@pytest.mark.parametrize(('level_iter', 'rewind_iter', 'expected'), [(4, 2, 2), (10, 0, 0), (30, None, 3)])
def test_the_rewind_point_is_the_weights_at_rewind_iter(
    level_iter: int,
    rewind_iter: int | None,
    expected: int,
    forward_opt: dict[str, Any],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default, that is after a tenth of level 0."""
    seen = {}
    optimize = ForwardStage.optimize_parameters

    def spy(model: Any, current_iter: int) -> None:
        seen.setdefault(current_iter - 1, deepcopy(model.network.backbone.state_dict()))
        optimize(model, current_iter)
        seen[current_iter] = deepcopy(model.network.backbone.state_dict())

    monkeypatch.setattr(ForwardStage, 'optimize_parameters', spy)
    forward_opt['train'].update(level_iter=[level_iter, 4, 4], total_iter=level_iter + 8, rewind_iter=rewind_iter)
    forward_opt['train']['scheduler']['periods'] = [level_iter]
    forward_opt['val']['val_freq'] = 2
    rewind = load(run(forward_opt) / 'models' / 'net_g_latest.pth')['rewind']
    assert [iteration for iteration, weights in seen.items() if equal(weights, rewind)] == [expected]


@pytest.mark.parametrize('rewind', ['lr', 'none'])
def test_the_survivors_may_keep_their_weights(
    rewind: str, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts(monkeypatch)
    forward_opt['train']['rewind'] = rewind
    models = run(forward_opt) / 'models'
    assert equal(starts[1]['weights'], load(models / 'net_g_level0.pth')['params'])
    if rewind == 'lr':
        assert [start['lr'] for start in starts] == [1e-3] * 3
    else:
        assert starts[1]['lr'] == starts[2]['lr'] < 5e-4
        assert [start['schedulers'] for start in starts] == [1, 0, 0]


def test_where_the_training_goes_on_only_the_first_level_warms_up(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['train'].update(rewind='none', warmup_iter=2, level_iter=[4, 4, 8], total_iter=16)
    experiment = run(forward_opt)
    (log,) = experiment.glob('*.log')
    rates = [float(rate) for rate in re.findall(r'lr:\((\S+),\)', log.read_text())]
    # Cosine annealing from 1e-3 over 4 iterations, the first of which has half of it; then what it ended with, however
    # long the other levels are.
    assert rates == [5e-4, 8.55e-4, 5.05e-4, 1.55e-4] + [1.55e-4] * 12


@pytest.mark.parametrize(('target', 'ema_decay'), [('gt', 0.9), ('teacher', 0), ('both', 0.9)])
def test_ssd_with_each_target_with_and_without_ema(
    target: str, ema_decay: float, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of every iteration by hand; the teacher is what the level before ended with, its EMA if there is one."""
    student, teacher, last = (build_network(TOY_EDSR) for _ in range(3))
    found, expected = [], []
    optimize = ForwardStage.optimize_parameters

    def finished(x: Tensor, depth: int) -> Tensor:
        """The teacher's image of ``x`` if its block ``depth`` returned what the student's does."""
        features = []
        with student.body[depth].register_forward_hook(lambda block, given, output: features.append(output)):
            student(x)
        with teacher.body[depth].register_forward_hook(lambda *_: features[0]):
            return teacher(x)  # type: ignore[no-any-return]

    def spy(model: Any, current_iter: int) -> None:
        student.load_state_dict(model.network.export(model.network.level))
        if model.step == 1:
            teacher.load_state_dict(last.state_dict())
            last.load_state_dict(student.state_dict())
        optimize(model, current_iter)
        with torch.no_grad():
            for name, weight in model.network.export(model.network.level).items():
                last.state_dict()[name].mul_(ema_decay).add_((1 - ema_decay) * weight)
            targets = {'gt': [model.gt], 'teacher': [teacher(model.lq)], 'both': [model.gt, teacher(model.lq)]}[target]
            losses = [(finished(model.lq, depth) - to).abs().mean() for depth in range(3) for to in targets]
        if model.network.level > 0:
            found.append(model.log_dict['l_ssd'])
            expected.append(float(torch.stack(losses).mean()))

    monkeypatch.setattr(ForwardStage, 'optimize_parameters', spy)
    forward_opt['train'].update(ema_decay=ema_decay, ssd_opt={'type': 'SSDLoss', 'num_depths': 'all', 'target': target})
    models = run(forward_opt) / 'models'
    assert len(found) == 8 and found == pytest.approx(expected, rel=1e-5)
    assert equal(load(models / 'net_g_latest.pth')['teacher'], load(models / 'net_g_level1.pth')['params'])


def test_each_iteration_distils_at_depths_of_its_own(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterations, distilled = [], {}
    optimize, finish = ForwardStage.optimize_parameters, ImageFinisher.finish

    def spy(model: Any, current_iter: int) -> None:
        iterations.append(current_iter)
        optimize(model, current_iter)

    def spy_on_finish(finisher: ImageFinisher, x: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
        distilled[iterations[-1]] = list(features)
        return finish(finisher, x, features)

    monkeypatch.setattr(ForwardStage, 'optimize_parameters', spy)
    monkeypatch.setattr(ImageFinisher, 'finish', spy_on_finish)
    forward_opt['train']['ssd_opt']['num_depths'] = 1
    run(forward_opt)
    level1, level2 = ([distilled[i] for i in range(first, first + 4)] for first in (5, 9))
    assert all(len(depths) == 1 for depths in level1 + level2)
    assert {depth for (depth,) in level1 + level2} == {'body.0', 'body.1', 'body.2'}
    assert all(len({depth for (depth,) in level}) > 1 for level in (level1, level2))
    assert level1 != level2


@pytest.mark.parametrize(('own', 'expected'), [({}, 0.25), ({'loss_weight': 2.0}, 2.0)])
def test_a_distillation_loss_has_the_pixel_losses_weight_unless_it_has_its_own(
    own: dict[str, float],
    expected: float,
    forward_opt: dict[str, Any],
    backward_opt: dict[str, Any],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward_opt['train']['pixel_opt']['loss_weight'] = backward_opt['train']['pixel_opt']['loss_weight'] = 0.25
    forward_opt['train']['ssd_opt'] = {'type': 'SSDLoss', 'num_depths': 'all', **own}
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss', **own}
    found, images = [], []
    finish, log = ImageFinisher.finish, LevelwiseTraining.reduce_loss_dict

    def spy_on_finish(*args: Any) -> list[Tensor]:
        images[:] = finish(*args)
        return images

    def spy(model: Any, losses: dict[str, Tensor]) -> dict[str, float]:
        reduced = log(model, losses)
        with torch.no_grad():
            if 'l_ssd' in reduced:
                differences = [nn.functional.l1_loss(image, model.gt) for image in images]
                found.append(reduced['l_ssd'] / float(torch.stack(differences).mean()))
            elif 'l_ticket' in reduced:
                found.append(reduced['l_ticket'] / float(nn.functional.l1_loss(model.output, model.ticket(model.lq))))
        return reduced

    monkeypatch.setattr(ImageFinisher, 'finish', spy_on_finish)
    monkeypatch.setattr(LevelwiseTraining, 'reduce_loss_dict', spy)
    run(forward_opt)
    assert found == [pytest.approx(expected)] * 8
    run(backward_opt)
    assert found == [pytest.approx(expected)] * 14


class Plain(nn.Module):
    def forward(self, image: Tensor, expected: Tensor) -> Tensor:
        return (image - expected).abs().mean()


def test_a_distillation_loss_may_have_no_weight(
    backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any class that compares two images will do, as docs/extending.md says."""
    monkeypatch.setitem(LOSS_REGISTRY._obj_map, 'Plain', Plain)
    save_as_forward_stage(pruned_mssr(TOY_EDSR), Path('pruned.pth'))
    backward_opt['path']['pretrain_network_g'] = 'pruned.pth'
    backward_opt['train'].update(ticket_opt={'type': 'Plain'})
    backward_opt['train']['pixel_opt']['loss_weight'] = 0.25
    (log,) = run(backward_opt).glob('*.log')
    assert 'l_ticket: 0.0000e+00' in log.read_text()  # in the first iteration: the level is still its ticket


class MeasuresLoss(SRModel):
    """It uses ``cri_pix`` in validation, too."""

    measured: ClassVar[list[float]] = []

    def test(self) -> None:
        super().test()
        self.measured.append(float(self.cri_pix(self.gt, self.gt)))


def test_only_the_training_distils(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the loss of an image compared with itself."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'MeasuresLoss', MeasuresLoss)
    monkeypatch.setattr(MeasuresLoss, 'measured', [])
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    for opt in (forward_opt, backward_opt):
        run({**opt, 'base_model_type': 'MeasuresLoss'})
    # Of 4 images: each level of the forward stage, the last one twice; those that the backward stage has by then.
    assert MeasuresLoss.measured == [0.0] * 4 * ((3 + 1) + (2 + 3 + 3))


def test_the_schedule_of_a_level_begins_with_a_warm_up(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rates by hand; the model class counts its iterations within the level, too."""
    seen = []
    optimize = SRModel.optimize_parameters

    def spy(model: Any, current_iter: int) -> None:
        seen.append((current_iter, model.get_current_learning_rate()[0]))
        optimize(model, current_iter)

    monkeypatch.setattr(SRModel, 'optimize_parameters', spy)
    high, low = 1e-3, 1e-5
    cosine = [low + (high - low) * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    level = list(enumerate([high / 2, *cosine[1:]], 1))  # in the first of two iterations, half of the learning rate
    for opt, expected in ((forward_opt, level * 3), (backward_opt, level[:3] * 2)):
        opt['train']['warmup_iter'] = 2
        run(opt)
        assert [iteration for iteration, _ in seen] == [iteration for iteration, _ in expected]
        assert [rate for _, rate in seen] == pytest.approx([rate for _, rate in expected])
        seen.clear()


class Repeating(nn.Module):
    """A toy network that runs its blocks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1)) for _ in range(2))
        self.tail = nn.Conv2d(3, 12, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.body, *self.body]:
            x = block(x)
        return nn.functional.pixel_shuffle(self.tail(x), 2)


@pytest.mark.parametrize('first_level', [0, 1])
def test_blocks_that_run_twice_cannot_be_distilled(
    first_level: int, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Repeating', Repeating)
    torch.save({'params': Repeating().state_dict()}, 'stock.pth')
    forward_opt['network_g']['backbone'] = {'type': 'Repeating'}
    forward_opt['path']['pretrain_network_g'] = 'stock.pth'
    forward_opt['train'].update(first_level=first_level, total_iter=12 - 4 * first_level, rewind_iter=0)
    with pytest.raises(OptionError, match=r"network_g\.feature_taps: found 'body\.0, which runs 2 times'"):
        run(forward_opt)


class TwoLosses(nn.Module):
    """As PerceptualLoss does, it returns two."""

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, None]:
        return (image - target).abs().mean(), None


@pytest.mark.parametrize('first_level', [0, 1])
def test_a_criterion_that_returns_no_tensor_is_refused_at_once(
    first_level: int, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after level 0, which distils nothing."""
    monkeypatch.setitem(LOSS_REGISTRY._obj_map, 'TwoLosses', TwoLosses)
    torch.save({'params': build_network(TOY_EDSR).state_dict()}, 'stock.pth')
    forward_opt['path']['pretrain_network_g'] = 'stock.pth'
    forward_opt['train'].update(first_level=first_level, total_iter=12 - 4 * first_level, rewind_iter=0)
    forward_opt['train']['ssd_opt']['criterion'] = {'type': 'TwoLosses'}
    expected = r"train\.ssd_opt\.criterion: found 'TwoLosses'; allowed: a loss that returns one tensor, not a tuple\."
    with pytest.raises(OptionError, match=expected):
        run(forward_opt)
    (log,) = Path('experiments/forward').glob('*.log')
    assert 'iter:       1' not in log.read_text()


def test_trying_out_the_distillation_draws_no_random_numbers(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the network does: a resumed run, which tries it again, would draw others."""
    models = run(forward_opt) / 'models'
    undisturbed = contents(models)
    forward, drawn = SSDLoss.forward, []

    def draw(loss: SSDLoss, *args: Any) -> Tensor:
        if not drawn:
            torch.rand(1), random.random(), np.random.random()
        drawn.append(loss)
        return forward(loss, *args)

    monkeypatch.setattr(SSDLoss, 'forward', draw)
    run(forward_opt)
    assert len(drawn) == 1 + 4 + 4  # once at level 0, and in each iteration of levels 1 and 2
    assert contents(models) == undisturbed


class Unusual(SRModel):
    """A model class that trains its network in a way of its own."""

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict({'l_pix': loss})
        if self.ema_decay > 0:
            self.model_ema(self.ema_decay)

    def loss(self) -> Tensor:
        raise NotImplementedError


class WithAutocast(Unusual):
    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            self.output = self.net_g(self.lq)
        return self.cri_pix(self.output, self.gt)  # type: ignore[no-any-return]


class WithPadding(Unusual):
    def loss(self) -> Tensor:
        self.output = self.net_g(nn.functional.pad(self.lq, (0, 8, 0, 8)))
        return self.cri_pix(self.output, nn.functional.pad(self.gt, (0, 16, 0, 16)))  # type: ignore[no-any-return]


class WithCroppedOutput(Unusual):
    def loss(self) -> Tensor:
        self.output = self.net_g(nn.functional.pad(self.lq, (0, 8, 0, 8)))[..., :32, :32]
        return self.cri_pix(self.output, self.gt)  # type: ignore[no-any-return]


class WithTwoPasses(Unusual):
    def loss(self) -> Tensor:
        self.output = (self.net_g(self.lq) + self.net_g(self.lq.flip(-1)).flip(-1)) / 2
        return self.cri_pix(self.output, self.gt)  # type: ignore[no-any-return]


class WithDistillationLate(Unusual):
    """It would use ``cri_pix`` after more iterations than there are."""

    def loss(self) -> Tensor:
        self.output = self.net_g(self.lq)
        loss = self.cri_pix if self.step > 100 else nn.MSELoss()
        return loss(self.output, self.gt)  # type: ignore[no-any-return]


class WithoutMemory(Unusual):
    def loss(self) -> Tensor:
        with mock.patch.object(SSDLoss, 'forward', side_effect=torch.cuda.OutOfMemoryError('out of memory')):
            return self.cri_pix(self.net_g(self.lq), self.gt)  # type: ignore[no-any-return]


class WithHelper(Unusual):
    """It calls ``cri_pix`` in a function of the module, which its own code does not name."""

    def loss(self) -> Tensor:
        return loss_of(self)


def loss_of(model: Any) -> Tensor:
    return model.cri_pix(model.net_g(model.lq), model.gt)  # type: ignore[no-any-return]


class WithListOfLosses(Unusual):
    """It keeps ``cri_pix`` under another name, by which it calls it, and adds up what it gives."""

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.losses = [self.cri_pix]

    def loss(self) -> Tensor:
        self.output = self.net_g(self.lq)
        return sum(loss(self.output, self.gt) for loss in self.losses)  # type: ignore[return-value]


class WithItsOwnLoss(Unusual):
    def loss(self) -> Tensor:
        self.output = self.net_g(self.lq)
        return (self.output - self.gt).square().mean()


class WithItsOwnCopy(WithItsOwnLoss):
    """It names ``cri_pix`` where it prepares the training, and only there."""

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.own_loss = deepcopy(self.cri_pix)


@pytest.mark.parametrize('base', [WithAutocast, WithPadding])
def test_features_are_those_of_the_iteration_itself(
    base: type, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the precision and of the input that the model class gives its network."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', base)
    finish, finished = ImageFinisher.finish, []

    def spy(finisher: ImageFinisher, x: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
        images = finish(finisher, x, features)
        dtypes = {tensor.dtype for tensor in features.values()}
        finished.append((tuple(images[0].shape), dtypes, torch.is_autocast_enabled('cpu')))
        return images

    monkeypatch.setattr(ImageFinisher, 'finish', spy)
    run({**forward_opt, 'base_model_type': 'Unusual'})
    autocast = ((2, 3, 32, 32), {torch.bfloat16}, True)
    padded = ((2, 3, 48, 48), {torch.float32}, False)
    assert finished == [autocast if base is WithAutocast else padded] * (1 + 4 + 4)


@pytest.mark.parametrize(
    ('base', 'expected'),
    [
        (
            WithTwoPasses,
            "network_g.feature_taps: found 'body.0, which runs 2 times'; allowed: modules that run once per forward "
            'pass and return one tensor (or no train.ssd_opt).',
        ),
        (
            WithCroppedOutput,
            "train.ssd_opt: found {'type': 'SSDLoss', 'num_depths': 2}; allowed: nothing, since it cannot be computed "
            'with Unusual and EDSR (The size of tensor a (48) must match the size of tensor b (32) at non-singleton '
            'dimension 3).',
        ),
        (
            WithItsOwnLoss,
            "train.ssd_opt: found {'type': 'SSDLoss', 'num_depths': 2}; allowed: nothing with Unusual, which computes "
            'its loss without cri_pix.',
        ),
        (
            WithItsOwnCopy,
            "train.ssd_opt: found {'type': 'SSDLoss', 'num_depths': 2}; allowed: nothing with Unusual, which computes "
            'its loss without cri_pix.',
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused_at_once(
    base: type, expected: str, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after level 0, which distils nothing."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', base)
    with pytest.raises(OptionError) as error:
        run({**forward_opt, 'base_model_type': 'Unusual'})
    assert str(error.value) == expected
    (log,) = Path('experiments/forward').glob('*.log')
    assert 'iter:       1' not in log.read_text()


class ReturnsList(nn.Module):
    """A toy network that returns a list of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [nn.functional.pixel_shuffle(self.conv(x), 2)]


class TakesLast(Unusual):
    def loss(self) -> Tensor:
        self.output = self.net_g(self.lq)[-1]
        return self.cri_pix(self.output, self.gt)  # type: ignore[no-any-return]


def test_a_ticket_that_returns_several_images_is_refused(
    backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them to learn from, only the model class knows."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', TakesLast)
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'ReturnsList', ReturnsList)
    save_as_forward_stage(pruned_mssr({'type': 'ReturnsList'}), Path('pruned.pth'))
    backward_opt['network_g']['backbone'] = {'type': 'ReturnsList'}
    backward_opt['path']['pretrain_network_g'] = 'pruned.pth'
    backward_opt['base_model_type'] = 'Unusual'
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    with pytest.raises(OptionError) as error:
        run(backward_opt)
    assert str(error.value) == (
        "train.ticket_opt: found {'type': 'L1Loss'}; allowed: nothing, since it cannot be computed with Unusual and "
        "ReturnsList ('list' object has no attribute 'size')."
    )


class OfOneChannel(Unusual):
    """It compares brightness alone."""

    def loss(self) -> Tensor:
        self.output = self.net_g(self.lq)
        return self.cri_pix(self.output.mean(1, keepdim=True), self.gt.mean(1, keepdim=True))  # type: ignore[no-any-return]


def test_images_that_the_model_class_changes_are_not_distilled(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would compare each of the network's three channels with their mean; the pixel loss itself may do that."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', OfOneChannel)
    save_as_forward_stage(pruned_mssr(TOY_EDSR), Path('pruned.pth'))
    backward_opt['path']['pretrain_network_g'] = 'pruned.pth'
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    colour, brightness = (2, 3, 32, 32), (2, 1, 32, 32)
    for opt, option, found in (
        (forward_opt, 'ssd_opt', f'{colour} and {brightness}'),
        (backward_opt, 'ticket_opt', f'{brightness} and {colour}'),
    ):
        opt['base_model_type'] = 'Unusual'
        with pytest.raises(OptionError) as error:
            run(opt)
        assert str(error.value) == (
            f"train.{option}: found 'images of {found}'; allowed: a model class that gives cri_pix images of the shape "
            f'that the network returns (or no train.{option}).'
        )
        (log,) = Path('experiments', opt['name']).glob('*.log')
        assert 'iter:       1' not in log.read_text()
        del opt['train'][option]
        run({**opt, 'name': f'without_{option}'})


def test_a_distillation_without_effect_is_reported(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', WithDistillationLate)
    (log,) = run({**forward_opt, 'base_model_type': 'Unusual'}).glob('*.log')
    said = 'WARNING: train.ssd_opt has had no effect: cri_pix has not been computed.'
    assert log.read_text().count(said) == 3  # in each level


@pytest.mark.parametrize('base', [WithHelper, WithListOfLosses])
def test_a_distillation_that_has_an_effect_is_not_doubted(
    base: type, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', base)
    (log,) = run({**forward_opt, 'base_model_type': 'Unusual'}).glob('*.log')
    assert log.read_text().count('l_ssd') == 8 and 'no effect' not in log.read_text()


def test_a_lack_of_memory_is_not_the_options_fault(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', WithoutMemory)
    with pytest.raises(torch.cuda.OutOfMemoryError, match='out of memory'):
        run({**forward_opt, 'base_model_type': 'Unusual'})


def test_a_ticket_that_cannot_be_learnt_from_is_refused(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(forward_opt)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Unusual', WithItsOwnLoss)
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    expected = r'train\.ticket_opt: found .*; allowed: nothing with Unusual, which computes its loss without cri_pix\.'
    with pytest.raises(OptionError, match=expected):
        run({**backward_opt, 'base_model_type': 'Unusual'})


class StepsLate(Unusual):
    """It adds up the gradients of three iterations."""

    def optimize_parameters(self, current_iter: int) -> None:
        loss = self.cri_pix(self.net_g(self.lq), self.gt)
        loss.backward()
        if current_iter % 3 == 0:
            self.optimizer_g.step()
            self.optimizer_g.zero_grad()
        self.log_dict = self.reduce_loss_dict({'l_pix': loss})


def test_a_levels_gradients_do_not_reach_the_next(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'StepsLate', StepsLate)
    end, begin, left = LevelwiseTraining.end_level, LevelwiseTraining.begin_level, []

    def spy(method: Any) -> Any:
        def spied(model: Any, training: LevelTraining) -> None:
            method(model, training)
            left.append(any(parameter.grad is not None for parameter in model.network.parameters()))

        return spied

    monkeypatch.setattr(LevelwiseTraining, 'end_level', spy(end))
    monkeypatch.setattr(LevelwiseTraining, 'begin_level', spy(begin))
    forward_opt['train']['ema_decay'] = 0
    run({**forward_opt, 'base_model_type': 'StepsLate'})
    assert left == [False, True, False, True, False, True]  # begin and end of each level, of 4 iterations


class WithoutEMA(SRModel):
    """It prepares its training by itself."""

    def init_training_settings(self) -> None:
        self.net_g.train()
        self.cri_pix = build_loss(self.opt['train']['pixel_opt'])
        self.setup_optimizers()
        self.setup_schedulers()

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        loss = self.cri_pix(self.net_g(self.lq), self.gt)
        loss.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict({'l_pix': loss})


class WithConstantRate(SRModel):
    def setup_schedulers(self) -> None:
        self.schedulers.append(torch.optim.lr_scheduler.LambdaLR(self.optimizer_g, lambda step: 0.5))


class SetsUpscale(SRModel):
    def __init__(self, opt: dict[str, Any]) -> None:
        opt['network_g']['upscale'] = opt['scale']
        super().__init__(opt)


class WithArrays(SRModel):
    """It validates pictures of NumPy's."""

    def get_current_visuals(self) -> dict[str, Any]:
        visuals = super().get_current_visuals()
        return {**visuals, 'gt': visuals['gt'].numpy(), 'result': visuals['result'].numpy()}

    def nondist_validation(self, dataloader: Any, *args: Any) -> None:
        for data in dataloader:
            self.feed_data(data)
            self.test()
            assert self.get_current_visuals()['gt'].shape == (1, 3, 32, 32)


@pytest.mark.parametrize('base', [WithoutEMA, WithConstantRate, SetsUpscale, WithArrays])
def test_model_classes_that_differ_from_basicsrs(
    base: type, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They train with MSSR as they do without it."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Base', base)
    forward_opt['base_model_type'] = 'Base'
    if base is WithConstantRate:
        del forward_opt['train']['scheduler']
    elif base is SetsUpscale:
        del forward_opt['network_g']['backbone']['upscale']  # of EDSR, 4 is the default
    experiment = run(forward_opt)
    (log,) = experiment.glob('*.log')
    assert log.read_text().count('lr:(5.000e-04,)') == (12 if base is WithConstantRate else 0)
    latest = load(experiment / 'models' / 'net_g_latest.pth')
    assert ('params_ema' in latest) == (base is not WithoutEMA)
    assert equal(
        load_network(experiment / 'models' / 'net_g_latest.pth').export(2),
        load(experiment / 'models' / 'net_g_level2.pth')['params'],
    )


class Refining(nn.Module):
    """A toy network that does not upscale, as SRCNN and VDSR."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class EnlargesFirst(SRModel):
    def feed_data(self, data: Any) -> None:
        super().feed_data(data)
        self.lq = nn.functional.interpolate(self.lq, scale_factor=self.opt['scale'], mode='bicubic')


def test_a_network_that_is_given_enlarged_images(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data need ``scale: 2``, and the file is of a network that upscales by 1, as a warning says."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Refining', Refining)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'EnlargesFirst', EnlargesFirst)
    del forward_opt['train']['ssd_opt']
    for opt in (forward_opt, backward_opt):
        opt['base_model_type'] = 'EnlargesFirst'
        opt['network_g']['backbone'] = {'type': 'Refining'}
        (log,) = run(opt).glob('*.log')
        assert 'WARNING: The network itself upscales by 1, and so will a .mssr file of it: scale: 2' in log.read_text()
    models = Path('experiments/backward/models')
    dense, image = Refining(), np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    dense.load_state_dict(load(models / 'net_g_level0.pth')['params'])
    model = ScalableModel(models / 'net_g.mssr', engine='torch')
    assert model.header.scale == 1
    expected = dense(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1) * 255
    assert np.array_equal(model.upscale(image), expected.round().byte().permute(1, 2, 0).numpy())


class OptimizerAtOnce(SRModel):
    """It creates an optimizer where only the first level would have it."""

    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.optimizers.append(torch.optim.SGD(self.net_g.parameters(), lr=1e-3))


class SchedulerAtOnce(SRModel):
    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.schedulers.append(torch.optim.lr_scheduler.LambdaLR(self.optimizer_g, lambda step: 0.5))


class Lookahead:
    """It wraps an optimizer, as one of the same name in other projects does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class WrapperAtOnce(SRModel):
    def init_training_settings(self) -> None:
        super().init_training_settings()
        self.optimizer_g = Lookahead(self.optimizer_g)


class WrapperInList(SRModel):
    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.optimizers = [Lookahead(optimizer) for optimizer in self.optimizers]


@pytest.mark.parametrize(
    ('base', 'what'),
    [
        (OptimizerAtOnce, 'optimizers'),
        (WrapperAtOnce, 'optimizers'),
        (WrapperInList, 'optimizers'),
        (SchedulerAtOnce, 'schedulers'),
    ],
)
def test_what_later_levels_would_not_have_is_refused(
    base: type[SRModel], what: str, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, base.__name__, base)
    expected = (
        f'base_model_type: found {base.__name__!r}; allowed: a class that creates all of its {what} in setup_{what} '
        f'({base.__name__} does not).'
    )
    with pytest.raises(OptionError) as error:
        run({**forward_opt, 'base_model_type': base.__name__})
    assert str(error.value) == expected


class WrapperInSetup(SRModel):
    """As :class:`WrapperAtOnce`, where each level has it; and it remembers something of its optimizer in training."""

    optimizer_step: Any = None
    wrapped: ClassVar[list[bool]] = []

    def setup_optimizers(self) -> None:
        super().setup_optimizers()
        self.optimizer_g = Lookahead(self.optimizer_g)

    def optimize_parameters(self, current_iter: int) -> None:
        super().optimize_parameters(current_iter)
        self.optimizer_step = current_iter
        self.wrapped.append(isinstance(self.optimizer_g, Lookahead))


def test_what_later_levels_have_is_not_refused(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'WrapperInSetup', WrapperInSetup)
    monkeypatch.setattr(WrapperInSetup, 'wrapped', [])
    run({**forward_opt, 'base_model_type': 'WrapperInSetup'})
    assert WrapperInSetup.wrapped == [True] * 12


class ByName(SRModel):
    """The last layer trains ten times as fast."""

    def setup_optimizers(self) -> None:
        options = self.opt['train']['optim_g']
        named = dict(self.get_bare_model(self.net_g).named_parameters())
        last = [named.pop(name) for name in ('conv_last.weight', 'conv_last.bias')]
        groups = [{'params': list(named.values())}, {'params': last, 'lr': 10 * options['lr']}]
        self.optimizer_g = self.get_optimizer(options.pop('type'), groups, **options)
        self.optimizers.append(self.optimizer_g)


def test_a_model_class_finds_parameters_by_their_own_names(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the learning rates that it gives them, a resumed run ends as an uninterrupted one."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'ByName', ByName)
    forward_opt['base_model_type'] = 'ByName'
    experiment = run(forward_opt)
    (optimizer,) = load(experiment / 'training_states' / '4.state')['optimizers']
    assert [(len(group['params']), group['initial_lr']) for group in optimizer['param_groups']] == [
        (18, 1e-3),
        (2, 1e-2),
    ]
    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 4)
    run(forward_opt, '--auto_resume')
    assert contents(experiment / 'models') == uninterrupted


class Freezing(SRModel):
    """It trains a part of its network, ``body.0`` from iteration 3 on, and changes options."""

    trained: ClassVar[list[set[str]]] = []  # in each iteration, those of PARTS that have changed
    rates: ClassVar[list[float]] = []

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.train_part('conv_last', False)
        self.opt['train']['noise'] = 0.5

    def init_training_settings(self) -> None:
        self.train_part('conv_first', False)
        self.opt['train']['optim_g']['lr'] = 4e-3
        super().init_training_settings()

    def setup_optimizers(self) -> None:
        self.opt['train']['optim_g']['lr'] /= 2
        super().setup_optimizers()

    def optimize_parameters(self, current_iter: int) -> None:
        if current_iter in (1, 3):
            self.train_part('body.0', current_iter == 3)
        before = {name: parameter.detach().clone() for name, parameter in self.net_g.named_parameters()}
        self.rates.append(self.get_current_learning_rate()[0])
        self.lq = self.lq + self.opt['train']['noise']
        super().optimize_parameters(current_iter)
        changed = [name for name, now in self.net_g.named_parameters() if not torch.equal(now, before[name])]
        self.trained.append({part for part in PARTS if any(part in name for name in changed)})

    def train_part(self, part: str, trains: bool) -> None:
        for name, parameter in self.net_g.named_parameters():
            if part in name:
                parameter.requires_grad_(trains)


PARTS = ('conv_first', 'body.0', 'body.1', 'conv_last')


def test_what_the_model_class_freezes_and_changes_stays_so(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each level, and in a run resumed while ``body.0`` does not train: the parts that train, the learning rates."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Freezing', Freezing)
    monkeypatch.setattr(Freezing, 'trained', [])
    monkeypatch.setattr(Freezing, 'rates', [])
    del forward_opt['train']['ssd_opt']
    forward_opt['base_model_type'] = 'Freezing'
    forward_opt['logger']['save_checkpoint_freq'] = 2
    experiment = run(forward_opt)
    of_a_level = [{'body.1'}] * 2 + [{'body.0', 'body.1'}] * 2
    assert Freezing.trained == of_a_level * 3
    cosine = [1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    assert Freezing.rates == pytest.approx(cosine * 3)

    uninterrupted = contents(experiment / 'models')
    forget_after(experiment, 6)
    run(forward_opt, '--auto_resume')
    assert Freezing.trained[12:] == of_a_level[2:] + of_a_level
    assert Freezing.rates[12:] == pytest.approx((cosine * 3)[6:])
    assert contents(experiment / 'models') == uninterrupted


def take_as_level_0(forward_opt: dict[str, Any], checkpoint: str) -> None:
    """Let a forward stage begin with the network in ``checkpoint``, and so train levels 1 and 2 alone."""
    forward_opt['path']['pretrain_network_g'] = checkpoint
    forward_opt['train'].update(first_level=1, total_iter=8)
    del forward_opt['train']['rewind_iter']


def test_a_stock_checkpoint_as_level_0(forward_opt: dict[str, Any], run: Run) -> None:
    torch.manual_seed(1)
    stock = build_network(TOY_EDSR).state_dict()
    torch.save({'params': stock}, 'stock.pth')
    take_as_level_0(forward_opt, 'stock.pth')
    models = run(forward_opt) / 'models'
    assert equal(load(models / 'net_g_latest.pth')['rewind'], stock)
    assert equal(load(models / 'net_g_level0.pth')['params'], stock)  # a ticket as the others', for the backward stage
    records = json.loads((models / 'levels.json').read_text())
    assert [record.get('iterations') for record in records] == [None, 4, 4]
    assert all(record['metrics']['toyval']['psnr'] > 0 for record in records)


class Renamed(nn.Module):
    """A toy network that also loads checkpoints from when its layer had another name, as some architectures do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, 1, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f'{prefix}old.')]:
            state_dict[name.replace('old.', 'conv.')] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(x), 2)


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace('conv.', 'old.'): tensor for name, tensor in state.items()}


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch saved batch normalisation before 0.4.1."""
    return {name: tensor for name, tensor in state.items() if not name.endswith('num_batches_tracked')}


@pytest.mark.parametrize(('architecture', 'make_old'), [(Renamed, with_old_names), (Normalised, without_counters)])
def test_what_the_backbone_loads_strictly_can_be_level_0(
    architecture: type[nn.Module], make_old: Any, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is not what it would save; the network decides, as in BasicSR."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Old', architecture)
    old, loaded = make_old(architecture().state_dict()), architecture()
    loaded.load_state_dict(old, strict=True)
    torch.save({'params': old}, 'stock.pth')
    forward_opt['network_g']['backbone'] = {'type': 'Old'}
    take_as_level_0(forward_opt, 'stock.pth')
    del forward_opt['train']['ssd_opt']
    models = run(forward_opt) / 'models'
    assert old.keys() != loaded.state_dict().keys()
    assert equal(load(models / 'net_g_level0.pth')['params'], loaded.state_dict())


def test_tickets_may_have_old_names(
    backward_opt: dict[str, Any], run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Renamed', Renamed)
    save_as_forward_stage(pruned_mssr({'type': 'Renamed'}), here / 'pruned.pth')
    for path in here.glob('net_g_level*.pth'):
        torch.save({'params': with_old_names(load(path)['params'])}, path)
    backward_opt['network_g']['backbone'] = {'type': 'Renamed'}
    backward_opt['path']['pretrain_network_g'] = 'pruned.pth'
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    (log,) = run(backward_opt).glob('*.log')
    assert 'l_ticket: 0.0000e+00' in log.read_text()  # in the first iteration: the level is still its ticket


def test_level_0_of_a_checkpoint_with_an_ema(forward_opt: dict[str, Any], run: Run) -> None:
    """It is the EMA unless ``param_key_g`` names the other; what is pruned, exported and measured is the same."""
    stock, other = build_network(TOY_EDSR).state_dict(), build_network(TOY_EDSR).state_dict()
    forward_opt['train'].update(first_level=1, total_iter=8)
    del forward_opt['train']['rewind_iter']
    found = []
    for name, checkpoint, key in (
        ('one', {'params': stock}, {}),
        ('ema', {'params': other, 'params_ema': stock}, {}),
        ('named', {'params': stock, 'params_ema': other}, {'param_key_g': 'params'}),
        ('bare', stock, {'param_key_g': None}),
    ):
        forward_opt['name'] = name  # BasicSR archives a folder under the second's name, where there may be one already
        torch.save(checkpoint, 'stock.pth')
        forward_opt['path'] = {'pretrain_network_g': 'stock.pth', **key}
        models = run(forward_opt) / 'models'
        assert equal(load(models / 'net_g_level0.pth')['params'], stock)
        assert equal(load(models / 'net_g_latest.pth')['rewind'], stock)
        found.append(contents(models))
        forget_after(models.parent, 4)
        assert contents(run(forward_opt, '--auto_resume') / 'models') == found[-1]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_new_run_with_a_resume_state_that_is_not_used(forward_opt: dict[str, Any], run: Run) -> None:
    """As BasicSR, ``--auto_resume`` does not read it; so the run starts as a new one does, from the EMA."""
    stock, other = build_network(TOY_EDSR).state_dict(), build_network(TOY_EDSR).state_dict()
    torch.save({'params': other, 'params_ema': stock}, 'stock.pth')
    take_as_level_0(forward_opt, 'stock.pth')
    forward_opt['path']['resume_state'] = '/elsewhere/8.state'
    said = 'path.resume_state: /elsewhere/8.state is not used: with --auto_resume the run begins anew'
    with pytest.warns(UserWarning, match=said):
        models = run(forward_opt, '--auto_resume') / 'models'
    assert equal(load(models / 'net_g_level0.pth')['params'], stock)


def test_a_forward_stages_checkpoint_is_no_level_0(forward_opt: dict[str, Any], run: Run) -> None:
    """The weights of its larger levels are no longer those that they ended with; a level that it has written is one."""
    models = run(forward_opt) / 'models'
    forward_opt['name'] = 'again'
    take_as_level_0(forward_opt, str(models / 'net_g_latest.pth'))
    expected = r'allowed: a trained network to use as level 0, such as net_g_level0\.pth beside it; it is from the forw'
    with pytest.raises(OptionError, match=expected):
        run(forward_opt)
    for dense in ('net_g_4.pth', 'net_g_level0.pth'):  # nothing has been pruned in the first yet
        forward_opt['path']['pretrain_network_g'] = str(models / dense)
        run({**forward_opt, 'name': dense})
    assert contents(models.parents[1] / 'net_g_4.pth' / 'models') == contents(
        models.parents[1] / 'net_g_level0.pth' / 'models'
    )


def test_each_level_may_have_its_own_iterations(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    forward_opt['train'].update(level_iter=[4, 4, 8], total_iter=16)
    forward_opt['train']['scheduler'].update(periods=[4, 4], restart_weights=[1, 1])
    records = json.loads((run(forward_opt) / 'models' / 'levels.json').read_text())
    assert [record['iterations'] for record in records] == [4, 4, 8]
    backward_opt['train'].update(expansion={'type': 'SequentialExpansion', 'level_iter': [3, 6]}, total_iter=9)
    backward_opt['train']['scheduler'].update(periods=[3, 3], restart_weights=[1, 1])
    records = json.loads((run(backward_opt) / 'models' / 'levels.json').read_text())
    assert [record.get('iterations') for record in records] == [6, 3, None]


def test_users_criteria_are_used(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_weights_first(weights: Any, masks: Any, generator: Any) -> dict[str, Tensor]:
        return {name: -torch.arange(weight.numel()).view_as(weight) for name, weight in weights.items()}

    monkeypatch.setattr(CRITERION_REGISTRY, '_entries', dict(CRITERION_REGISTRY._entries))
    CRITERION_REGISTRY.register(first_weights_first)
    forward_opt['train']['criterion'] = 'first_weights_first'
    level_map = load_network(run(forward_opt) / 'models' / 'net_g_latest.pth').get_level_map()
    assert all((levels.flatten().int().diff() <= 0).all() for levels in level_map.values())


def test_a_layer_that_is_pruned_away_is_reported(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_goes_first(weights: dict[str, Tensor], masks: Any, generator: Any) -> dict[str, Tensor]:
        return {name: weight.abs() * (name != 'conv_last.weight') for name, weight in weights.items()}

    monkeypatch.setattr(CRITERION_REGISTRY, '_entries', dict(CRITERION_REGISTRY._entries))
    CRITERION_REGISTRY.register(last_goes_first)
    forward_opt['train']['criterion'] = 'last_goes_first'
    (log,) = run(forward_opt).glob('train_*.log')
    warnings = [line for line in log.read_text().splitlines() if 'nothing left' in line]
    assert [line.partition('WARNING: ')[2] for line in warnings] == [
        'Level 1 has nothing left of conv_last.weight.',
        'Level 2 has nothing left of conv_last.weight.',
    ]


def test_a_diverged_training_stops_and_names_the_weight(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = ForwardStage.optimize_parameters

    def diverge(model: Any, current_iter: int) -> None:
        optimize(model, current_iter)
        model.net_g_ema.backbone.body[1].conv1.weight.data[0, 0, 0, 0] = float('nan')

    monkeypatch.setattr(ForwardStage, 'optimize_parameters', diverge)
    with pytest.raises(FloatingPointError, match=r'End of level 0: body\.1\.conv1\.weight is not finite'):
        run(forward_opt)


class ValidatesNetG(SRModel):
    """Validates as BasicSR's VideoRecurrentModel does: ``net_g``, whether there is an EMA or not."""

    def test(self) -> None:
        self.net_g.eval()
        with torch.no_grad():
            self.output = self.net_g(self.lq)
        self.net_g.train()

    def optimize_parameters(self, current_iter: int) -> None:
        assert self.net_g.training and not self.net_g_ema.training
        super().optimize_parameters(current_iter)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_exported_weights_are_validated_whatever_the_model_class_validates(
    precision: str, forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'ValidatesNetG', ValidatesNetG)
    forward_opt['val'].update(precision=precision, val_freq=2)
    measured = []
    for base in ('SRModel', 'ValidatesNetG'):
        models = run({**deepcopy(forward_opt), 'base_model_type': base}) / 'models'
        measured.append([record['metrics'] for record in json.loads((models / 'levels.json').read_text())])
        measured.append(load(models / 'net_g_latest.pth'))
    assert measured[0] == measured[2]
    assert all(equal(measured[1][key], measured[3][key]) for key in measured[1])


class RunsLayers(SRModel):
    """It reaches for the layers of its network in validation."""

    def test(self) -> None:
        super().test()
        self.get_bare_model(self.net_g).conv_first(self.lq)


def test_layers_without_their_masks_are_refused_in_validation_too(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every level would be measured as the dense network."""
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'RunsLayers', RunsLayers)
    with pytest.raises(OptionError, match='a network whose layers run in its forward pass'):
        run({**forward_opt, 'base_model_type': 'RunsLayers'})


class OwnValidation(SRModel):
    """It logs its metrics as BasicSR does, of which it keeps the best only where there is none yet."""

    def nondist_validation(self, dataloader: Any, current_iter: int, tb_logger: Any, save_img: bool) -> None:
        if not hasattr(self, 'best_metric_results'):
            self._initialize_best_metric_results(dataloader.dataset.opt['name'])
        self.metric_results = {'psnr': float(self.network.level)}
        self._log_validation_metric_values(current_iter, dataloader.dataset.opt['name'], tb_logger)


class SilentValidation(SRModel):
    def nondist_validation(self, dataloader: Any, current_iter: int, tb_logger: Any, save_img: bool) -> None:
        pass


def test_a_validation_of_its_own(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'OwnValidation', OwnValidation)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'SilentValidation', SilentValidation)
    own = run({**deepcopy(forward_opt), 'base_model_type': 'OwnValidation', 'name': 'own'})
    records = json.loads((own / 'models' / 'levels.json').read_text())
    assert [record['metrics'] for record in records] == [{'toyval': {'psnr': level}} for level in range(3)]

    silent = run({**forward_opt, 'base_model_type': 'SilentValidation', 'name': 'silent'})
    (log,) = silent.glob('*.log')
    assert "WARNING: levels.json lacks toyval's metrics, which SilentValidation does not report." in log.read_text()


# ------------------------------ backward ------------------------------ #


def test_the_backward_stage(forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run) -> None:
    """Every level, extracted from the result, is bit for bit what it was before each expansion.

    With everything in play that could move frozen weights: Adam's momentum, weight decay, EMA.
    """
    forward = run(forward_opt) / 'models'
    backward_opt['train']['optim_g']['weight_decay'] = 0.1
    models = run(backward_opt) / 'models'
    smallest = load_network(forward / 'net_g_latest.pth', 'params_ema').export(2)
    for key in ('params', 'params_ema'):
        result = load_network(models / 'net_g_latest.pth', key)
        assert equal(result.export(2), smallest)
        for level in range(3):  # net_g_level{k}.pth is written when level k is done, before the next expansion
            assert equal(result.export(level), load(models / f'net_g_level{level}.pth')['params'])
    dense = load_network(models / 'net_g_latest.pth').export(0)
    before = load_network(forward / 'net_g_latest.pth', 'params_ema').export(0)
    moved = {name for name in dense if not torch.equal(dense[name], before[name])}
    assert moved == {name for name in dense if name.endswith('weight')}

    records = json.loads((models / 'levels.json').read_text())
    assert [record['level'] for record in records] == [0, 1, 2]
    assert all(record['metrics']['toyval']['psnr'] > 5 for record in records)


def test_every_level_is_recorded_without_a_validation_set(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    """Those that a stage does not train, too: the forward stage's first and the backward stage's smallest."""
    torch.save({'params': build_network(TOY_EDSR).state_dict()}, 'stock.pth')
    take_as_level_0(forward_opt, 'stock.pth')
    kept = [TOTAL, num_kept(TOTAL, 0.5), num_kept(TOTAL, 0.75)]
    others = sum(p.numel() for p in build_network(TOY_EDSR).parameters()) - TOTAL
    for opt, iterations in ((forward_opt, [None, 4, 4]), (backward_opt, [3, 3, None])):
        del opt['val'], opt['datasets']['val']
        records = json.loads((run(opt) / 'models' / 'levels.json').read_text())
        assert [record['level'] for record in records] == [0, 1, 2]
        assert [record.get('iterations') for record in records] == iterations
        assert [record['parameters'] for record in records] == [others + count for count in kept]


class Fusing(nn.Module):
    """In eval mode it computes by one convolution what it trains as two, as SPAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1)) for _ in range(2))
        self.wide, self.narrow = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(3, 12, 3, 1, 1)
        self.fused = nn.Conv2d(3, 12, 3, 1, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        if self.training:
            return nn.functional.pixel_shuffle(self.wide(x) + self.narrow(x), 2)
        self.fused.weight.data = self.wide.weight.data + self.narrow.weight.data
        self.fused.bias.data = self.wide.bias.data + self.narrow.bias.data
        return nn.functional.pixel_shuffle(self.fused(x), 2)


class KeepsOutputs(SRModel):
    """It keeps what is validated: by level, the last input and output."""

    outputs: ClassVar[dict[int, tuple[Tensor, Tensor]]] = {}

    def test(self) -> None:
        super().test()
        self.outputs[self.network.level] = self.lq, self.output.clone()  # which metrics clamp in place


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['layer', 'buffer', 'weight'])
def test_a_network_that_merges_weights_when_it_enters_eval_mode(
    kind: str, forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is validated, learned from and written is, at each level, what the stock network makes of its checkpoint."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Merging', toy.Merging)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'KeepsOutputs', KeepsOutputs)
    monkeypatch.setattr(KeepsOutputs, 'outputs', {})
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    for opt in (forward_opt, backward_opt):
        opt['network_g']['backbone'] = {'type': 'Merging', 'kind': kind}
        opt['base_model_type'] = 'KeepsOutputs'
    forward_opt['logger']['save_checkpoint_freq'] = 2

    def stock(state: dict[str, Tensor]) -> nn.Module:
        network = toy.Merging(kind)
        network.load_state_dict(state, strict=True)
        return network.eval()

    def ticket(level: int) -> nn.Module:
        return stock(load(Path(f'experiments/forward/models/net_g_level{level}.pth'))['params'])

    def check_outputs(models: Path) -> None:
        assert KeepsOutputs.outputs.keys() == {0, 1, 2}
        for level, (x, output) in KeepsOutputs.outputs.items():
            with torch.no_grad():
                assert torch.equal(stock(load(models / f'net_g_level{level}.pth')['params'])(x), output)

    optimize, compared = LevelwiseTraining.optimize_parameters, []

    def spy(model: Any, current_iter: int) -> None:
        optimize(model, current_iter)
        for network in model.networks_to_learn_from():
            level = model.network.level - isinstance(model, ForwardStage)
            if level >= 0:
                compared.append(level)
                with torch.no_grad():
                    assert torch.equal(network(model.lq), ticket(level)(model.lq))

    monkeypatch.setattr(LevelwiseTraining, 'optimize_parameters', spy)
    models = run(forward_opt) / 'models'
    assert compared == [0] * 4 + [1] * 4
    check_outputs(models)
    before = contents(models)
    forget_after(models.parent, 6)
    assert contents(run(forward_opt, '--auto_resume') / 'models') == before

    compared.clear()
    models = run(backward_opt) / 'models'
    assert compared == [1] * 3 + [0] * 3
    check_outputs(models)
    with ScalableModel(models / 'net_g.mssr') as model:
        x, _ = KeepsOutputs.outputs[0]
        for level in (0, 1, 2):
            model.shrink(level)
            with torch.no_grad():
                expected, output = stock(load(models / f'net_g_level{level}.pth')['params'])(x), model.network(x)
            # What is merged into a weight itself is taken out of it again at each change of level, which rounds.
            assert torch.allclose(output, expected, rtol=0, atol=1e-6 if kind == 'weight' else 0)


class StaysInEval(SRModel):
    """As HAT's, it does not put its network back into training."""

    def test(self) -> None:
        self.net_g.eval()
        with torch.no_grad():
            self.output = self.net_g(self.lq)


def test_a_network_that_changes_weights_between_training_and_validation(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation more does not change the training."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Merging', toy.Merging)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'StaysInEval', StaysInEval)
    del forward_opt['train']['ssd_opt']
    forward_opt.update(base_model_type='StaysInEval')
    forward_opt['train']['ema_decay'] = 0
    forward_opt['network_g']['backbone'] = {'type': 'Merging', 'kind': 'weight'}
    trained = []
    for name, val_freq in (('often', 1), ('seldom', 4)):
        forward_opt['val']['val_freq'] = val_freq
        models = run({**deepcopy(forward_opt), 'name': name}) / 'models'
        trained.append(load(models / 'net_g_latest.pth')['params'])
    assert equal(*trained)


def test_a_network_that_computes_weights_in_eval_mode(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validating one level leaves the weights of the others as they were."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Fusing', Fusing)
    network_g = {**forward_opt['network_g'], 'backbone': {'type': 'Fusing'}}
    run({**forward_opt, 'network_g': network_g})
    models = run({**backward_opt, 'network_g': network_g}) / 'models'
    result = MSSR({'type': 'Fusing'}, SPARSITY)
    result.load_state_dict(load(models / 'net_g_latest.pth')['params_ema'])
    assert 'fused.weight' not in result.prunable_names
    x, levels = torch.rand(1, 3, 16, 16), [result.export(level) for level in range(3)]
    for level, exported in enumerate(levels):
        result.level = level
        plain = Fusing().eval()
        plain.load_state_dict(exported)
        with torch.no_grad():
            assert torch.equal(result.eval()(x), plain(x))


def test_a_level_trained_on_a_gpu_is_exported_from_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a machine without a GPU could not load the file, unless told to.

    The GPU is torch's meta device, which every machine has. Its tensors hold no values, so ``cpu`` makes some up.
    """
    network = MSSR(TOY_EDSR, SPARSITY).to('meta')
    monkeypatch.setattr(Tensor, 'cpu', lambda tensor: torch.zeros(tensor.shape))
    model = SimpleNamespace(opt={'rank': 0, 'path': {'models': str(tmp_path)}}, network=network)
    NestedLevels.export_level(cast(Any, model), 1)
    exported = load(tmp_path / 'net_g_level1.pth')['params']
    assert exported.keys() == network.backbone.state_dict().keys()
    assert {tensor.device.type for tensor in exported.values()} == {'cpu'}


@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone_goes_through_both_stages(
    name: str, forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    """Two iterations a level, with SSD and EMA; each level is then a checkpoint of the stock architecture."""
    for opt, total_iter in ((forward_opt, 6), (backward_opt, 4)):
        opt['network_g']['backbone'] = deepcopy(BACKBONES[name])
        opt['train']['total_iter'] = total_iter
        opt['val']['val_freq'] = 2
    forward_opt['train']['level_iter'] = 2
    backward_opt['train']['expansion']['level_iter'] = 2
    run(forward_opt)
    models = run(backward_opt) / 'models'
    network = MSSR(BACKBONES[name], SPARSITY)
    network.load_state_dict(load(models / 'net_g_latest.pth')['params'])
    for level in range(3):
        plain = load(models / f'net_g_level{level}.pth')['params']
        build_network(BACKBONES[name]).load_state_dict(plain, strict=True)
        assert equal(plain, network.export(level))


def test_running_statistics_stay_in_the_backward_stage(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All levels share them: they move in the forward stage, and are then left alone."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Normalised', Normalised)
    for opt in (forward_opt, backward_opt):
        opt['network_g']['backbone'] = {'type': 'Normalised'}
    del forward_opt['train']['ssd_opt']
    mean, count = 'body.1.running_mean', 'body.1.num_batches_tracked'
    before = load(run(forward_opt) / 'models' / 'net_g_latest.pth')['params_ema']
    models = run(backward_opt) / 'models'
    assert before[f'backbone.{mean}'].abs().max() > 0 and before[f'backbone.{count}'] > 0
    for level in range(3):
        plain = load(models / f'net_g_level{level}.pth')['params']
        assert torch.equal(plain[mean], before[f'backbone.{mean}'])
        assert torch.equal(plain[count], before[f'backbone.{count}'])


class ComputesWeights(nn.Module):
    """A toy network of which some weights are computed: by norms, and by spectral norms, which the training updates."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.normed = nn.utils.weight_norm(nn.Conv2d(8, 8, 1))
        self.spectral = nn.utils.spectral_norm(nn.Conv2d(8, 8, 1))
        self.last = nn.Conv2d(8, 12, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.last(self.spectral(self.normed(self.first(x)))), 2)


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
def test_buffers_that_training_changes(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As running statistics: those of the EMA, and of a level, are the network's; the backward stage leaves them."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'ComputesWeights', ComputesWeights)
    for opt in (forward_opt, backward_opt):
        opt['network_g'].update(backbone={'type': 'ComputesWeights'}, unprunable=['normed.*', 'spectral.*'])
    del forward_opt['train']['ssd_opt']
    models, name = run(forward_opt) / 'models', 'spectral.weight_u'
    levels = [load(models / f'net_g_level{level}.pth')['params'] for level in range(3)]
    assert not torch.equal(levels[0][name], levels[1][name])
    last = load(models / 'net_g_latest.pth')
    for key in ('params', 'params_ema'):
        assert torch.equal(last[key][f'backbone.{name}'], levels[2][name])
    models = run(backward_opt) / 'models'
    for level in range(3):
        assert torch.equal(load(models / f'net_g_level{level}.pth')['params'][name], levels[2][name])


@pytest.mark.parametrize('recover', ['ticket', 'rewind', 'zero'])
def test_what_recovered_weights_start_from(
    recover: str, forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = run(forward_opt) / 'models'
    starts = Starts(monkeypatch)
    backward_opt['train']['recover'] = recover
    run(backward_opt)
    level_map = load_network(forward / 'net_g_latest.pth').get_level_map()
    tickets = [load(forward / f'net_g_level{level}.pth')['params'] for level in range(3)]
    rewind = load(forward / 'net_g_latest.pth')['rewind']
    for start in starts:
        for name, levels in level_map.items():
            expected = {
                'ticket': tickets[start['level']][name],
                'rewind': rewind[name],
                'zero': torch.zeros_like(rewind[name]),
            }[recover]
            delta = levels == start['level']
            assert torch.equal(start['weights'][name][delta], expected[delta])


def test_a_level_may_learn_from_its_own_tickets_images(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = run(forward_opt) / 'models'
    tickets = [load(forward / f'net_g_level{level}.pth')['params'] for level in range(3)]
    levels = []
    optimize = BackwardStage.optimize_parameters

    def spy(model: Any, current_iter: int) -> None:
        optimize(model, current_iter)
        ticket = build_network(TOY_EDSR)
        ticket.load_state_dict(tickets[model.network.level])
        with torch.no_grad():
            expected = {
                'l_pix': torch.nn.functional.l1_loss(model.output, model.gt),
                'l_ticket': 0.5 * torch.nn.functional.l1_loss(model.output, ticket(model.lq)),
            }
        levels.append(model.network.level)
        assert model.log_dict['l_pix'] == pytest.approx(float(expected['l_pix']))
        assert model.log_dict['l_ticket'] == pytest.approx(float(expected['l_ticket']))

    monkeypatch.setattr(BackwardStage, 'optimize_parameters', spy)
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss', 'loss_weight': 0.5}
    models = run(backward_opt) / 'models'
    assert levels == [1, 1, 1, 0, 0, 0]
    assert equal(load_network(models / 'net_g_latest.pth').export(2), tickets[2])


def test_users_schedules_may_skip_levels(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtOnce:
        def __init__(self, num_iter: int) -> None:
            self.num_iter = num_iter

        def plan(self, delta_sizes: list[int]) -> list[LevelTraining]:
            assert sum(delta_sizes) == TOTAL
            return [LevelTraining(0, self.num_iter)]

    monkeypatch.setattr(EXPANSION_REGISTRY, '_entries', dict(EXPANSION_REGISTRY._entries))
    EXPANSION_REGISTRY.register(AtOnce)
    forward = run(forward_opt) / 'models'
    backward_opt['train'].update(expansion={'type': 'AtOnce', 'num_iter': 6})
    backward_opt['train']['scheduler']['periods'] = [6]
    models = run(backward_opt) / 'models'
    before, result = load_network(forward / 'net_g_latest.pth', 'params_ema'), load_network(models / 'net_g_latest.pth')
    assert equal(result.export(2), load(models / 'net_g_level2.pth')['params'])
    for name, weight in result.prunable_weights().items():
        assert torch.equal(weight != before.prunable_weights()[name], before.get_level_map()[name] < 2)
    records = json.loads((models / 'levels.json').read_text())
    assert [record.get('iterations') for record in records] == [6, None, None]


def test_a_frozen_weight_that_moved_is_noticed(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(forward_opt)
    optimize = BackwardStage.optimize_parameters

    def meddle(model: Any, current_iter: int) -> None:
        optimize(model, current_iter)
        model.net_g_ema.backbone.conv_last.bias.data[0] += 1e-7

    monkeypatch.setattr(BackwardStage, 'optimize_parameters', meddle)
    with pytest.raises(RuntimeError, match=r'Training level 1 has changed the smaller levels \[2\]'):
        run(backward_opt)


# ------------------------------ testing, stock models ------------------------------ #


def options_of_a_test(forward_opt: dict[str, Any], stage: str) -> dict[str, Any]:
    """Options of a test with the checkpoint that ``stage`` ended with, without name and model type."""
    opt = {key: forward_opt[key] for key in ('scale', 'num_gpu', 'manual_seed', 'network_g', 'val')}
    opt['datasets'] = {'test_1': deepcopy(forward_opt['datasets']['val'])}
    checkpoint = f'experiments/{stage}/models/net_g_latest.pth'
    opt['path'] = {'pretrain_network_g': checkpoint, 'param_key_g': 'params_ema'}
    opt['val'].update(save_img=True, suffix=None)
    return opt


def test_testing_every_level_and_one_level_with_the_stock_model(
    forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run
) -> None:
    run(forward_opt)
    trained = json.loads((run(backward_opt) / 'models' / 'levels.json').read_text())
    test_opt = options_of_a_test(forward_opt, 'backward')

    results = run({**deepcopy(test_opt), 'name': 'all', 'model_type': 'MSSRModel'})
    records = json.loads((results / 'levels.json').read_text())
    assert [record['level'] for record in records] == [0, 1, 2]
    assert [record['metrics'] for record in records] == [record['metrics'] for record in trained]
    assert (results / 'visualization' / 'level1' / 'toyval_level1' / '0_all.png').is_file()

    test_opt['network_g']['level'] = 1
    results = run({**test_opt, 'name': 'stock', 'model_type': 'SRModel'})
    log = next(results.glob('*.log')).read_text()
    assert f'psnr: {records[1]["metrics"]["toyval"]["psnr"]:.4f}' in log


def test_the_levels_of_the_forward_stages_checkpoint_are_not_tested(forward_opt: dict[str, Any], run: Run) -> None:
    """Only its smallest is as it was trained; the figures of the others would mean nothing."""
    run(forward_opt)
    test_opt = {**options_of_a_test(forward_opt, 'forward'), 'name': 'all', 'model_type': 'MSSRModel'}
    with pytest.raises(OptionError, match=r'path\.pretrain_network_g: found .*; it is from the forward stage; the lev'):
        run(test_opt)


@pytest.mark.parametrize('name', ['MSSRForwardModel', 'MSSRBackwardModel'])
def test_the_stages_do_not_test(name: str, forward_opt: dict[str, Any], run: Run) -> None:
    """They would test at the level at hand; one error says what does it at every level."""
    test_opt = {**options_of_a_test(forward_opt, 'backward'), 'name': 'all', 'model_type': name}
    with pytest.raises(OptionError, match=rf"model_type: found '{name}'; allowed: MSSRModel, which tests every level"):
        run(test_opt)


@pytest.mark.parametrize('sparsity', [[0, 0.5], [0, 0.5, 0.75, 0.875]])
def test_a_checkpoint_with_other_levels_is_not_tested(
    sparsity: list[float], forward_opt: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    """A level too many would be a network without any weight that can be pruned; its figures would mean nothing."""
    torch.save({'params': pruned_mssr(TOY_EDSR).state_dict()}, tmp_path / 'net.pth')
    test_opt = {**options_of_a_test(forward_opt, 'backward'), 'name': 'all', 'model_type': 'MSSRModel'}
    test_opt['path']['pretrain_network_g'] = str(tmp_path / 'net.pth')
    test_opt['network_g'] = {**test_opt['network_g'], 'sparsity': sparsity}
    with pytest.raises(
        OptionError, match=f'its smallest level is 2, but that of network_g.sparsity is {len(sparsity) - 1}'
    ):
        run(test_opt)


def test_the_stock_model_trains_a_fixed_level(forward_opt: dict[str, Any], run: Run) -> None:
    first = load_network(run(forward_opt) / 'models' / 'net_g_latest.pth')
    forward_opt.update(name='stock', model_type='SRModel')
    forward_opt['network_g']['level'] = 1
    forward_opt['path']['pretrain_network_g'] = 'experiments/forward/models/net_g_latest.pth'
    for key in ('level_iter', 'rewind_iter', 'ssd_opt'):
        del forward_opt['train'][key]
    forward_opt['train']['scheduler']['periods'] = [12]
    second = load_network(run(forward_opt) / 'models' / 'net_g_latest.pth')
    for name, levels in first.get_level_map().items():
        one, other = first.prunable_weights()[name], second.prunable_weights()[name]
        assert torch.equal(one[levels < 1], other[levels < 1])
        assert not torch.equal(one, other)
