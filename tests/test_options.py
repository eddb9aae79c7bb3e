"""Wrong options: each gives one clear error, which names the option, before any training starts."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from conftest import BACKBONES, TOY_EDSR, Run, pruned_mssr
from torch import Tensor, nn

from mssr_basicsr.adapter.backbone_options import BackboneOptions, expose_backbone_options
from mssr_basicsr.foundation.checks import OptionError

NETWORK = 'network_g'
TRAIN = 'train'

# (where in the YAML, the wrong value or DELETE, the error's text)
DELETE = object()
WRONG_FORWARD: list[tuple[str, Any, str]] = [
    (
        'network_g.type',
        'EDSR',
        "network_g.type: found 'EDSR'; allowed: MSSR, with MSSRForwardModel.",
    ),
    (
        'network_g.backbone',
        None,
        'network_g.backbone: found None; allowed: the options of an architecture, with its type.',
    ),
    (
        'network_g.backbone.type',
        'EDSRR',
        "network_g.backbone.type: found 'EDSRR'; allowed: EDSR; or else BasicVSR, ",
    ),
    (
        'network_g.backbone.num_feats',
        8,
        'network_g.backbone.num_feats: found 8; allowed: num_feat (EDSR takes num_in_ch, num_out_ch, num_feat, ',
    ),
    (
        'network_g.sparsity',
        0.5,
        'network_g.sparsity: found 0.5; allowed: a list of two or more, such as [0, 0.5, 0.75].',
    ),
    (
        'network_g.sparsity',
        [0.1, 0.5],
        'network_g.sparsity[0]: found 0.1; allowed: 0 (level 0 is the dense network).',
    ),
    (
        'network_g.sparsity',
        [0, 0.75, 0.5],
        'network_g.sparsity[2]: found 0.5; allowed: a share above 0.75 and below 1.',
    ),
    (
        'network_g.sparsity',
        [0, 0.5, 93.75],
        'network_g.sparsity[2]: found 93.75; allowed: a share above 0.5 and below 1.',
    ),
    (
        'network_g.level',
        1,
        'network_g.level: found 1; allowed: nothing, since MSSRForwardModel sets the level (a fixed one is for other '
        'model classes).',
    ),
    (
        'network_g.prunable',
        ['body.*', 'tail.*'],
        "network_g.prunable[1]: found 'tail.*'; allowed: a pattern that matches one of conv_first.weight, body.0.conv1",
    ),
    (
        'network_g.prunable',
        'body.*',
        'network_g.prunable: found \'body.*\'; allowed: a list of patterns such as ["body.*"].',
    ),
    (
        'network_g.prunable',
        5,
        'network_g.prunable: found 5; allowed: a list of patterns such as ["body.*"].',
    ),
    (
        'network_g.unprunable',
        ['*'],
        "network_g.unprunable: found ['*']; allowed: patterns that leave one of conv_first.weight, ",
    ),
    (
        'network_g.feature_taps',
        ['blocks.*'],
        "network_g.feature_taps[0]: found 'blocks.*'; allowed: a pattern that matches one of conv_first, body, body.0",
    ),
    (
        'train.total_iter',
        10,
        'train.total_iter: found 10; allowed: 12 (4 at level 0 + 4 at level 1 + 4 at level 2).',
    ),
    (
        'train.level_iter',
        DELETE,
        'train.level_iter: found None; allowed: a whole number of at least 1, or a list of 3.',
    ),
    (
        'train.level_iter',
        [4, 8],
        'train.level_iter: found [4, 8]; allowed: a whole number, or a list of 3 (one per trained level).',
    ),
    (
        'train.level_iter',
        [4, 0, 8],
        'train.level_iter[1]: found 0; allowed: a whole number of at least 1.',
    ),
    (
        'train.level_iter',
        float('inf'),
        'train.level_iter: found inf; allowed: a whole number of at least 1, or a list of 3.',
    ),
    (
        'train.level_iter',
        float('nan'),
        'train.level_iter: found nan; allowed: a whole number of at least 1, or a list of 3.',
    ),
    (
        'train.first_level',
        1,
        'path.pretrain_network_g: found None; allowed: a checkpoint of the backbone, with train.first_level: 1.',
    ),
    (
        'train.criterion',
        'magnitude',
        "train.criterion: found 'magnitude'; allowed: global_magnitude, lamp, layer_magnitude, random.",
    ),
    (
        'train.rewind',
        'weight',
        "train.rewind: found 'weight'; allowed: lr, none, weights.",
    ),
    (
        'train.rewind_iter',
        5,
        'train.rewind_iter: found 5; allowed: a whole number from 0 to 4.',
    ),
    (
        'train.precision',
        'fp16',
        "train.precision: found 'fp16'; allowed: bf16, fp32 (fp16 would need loss scaling; bf16 does ",
    ),
    (
        'train.precision',
        'half',
        "train.precision: found 'half'; allowed: bf16, fp32.",
    ),
    (
        'train.channels_last',
        'yes, please',
        "train.channels_last: found 'yes, please'; allowed: true, false.",
    ),
    (
        'val.precision',
        16,
        'val.precision: found 16; allowed: bf16, fp32.',
    ),
    (
        'val.precison',
        'bf16',
        "val.precison: found 'bf16'; allowed: val.precision (there is no option precison).",
    ),
    (
        'val.metrics.psnr',
        {'type': 'calculate_psnr_published', 'crop_border': 2, 'round_Y': True},
        'val.metrics.psnr.round_Y: found True; allowed: round_y.',
    ),
    (
        'val.metrics.psnr',
        {'type': 'calculate_psnr_published', 'crop_border': 2, 'test_y_channel': True},
        'val.metrics.psnr.test_y_channel: found True; allowed: nothing (calculate_psnr_published takes better, crop',
    ),
    (
        'train.ssd_opt.type',
        'SSD',
        "train.ssd_opt.type: found 'SSD'; allowed: ",
    ),
    (
        'train.ssd_opt',
        {'type': 'MSELoss'},
        "train.ssd_opt.type: found 'MSELoss'; allowed: SSDLoss or a class derived from it.",
    ),
    (
        'train.ssd_opt.num_depths',
        4,
        "train.ssd_opt.num_depths: found 4; allowed: a whole number from 1 to 3 (the feature taps), or 'all'.",
    ),
    (
        'train.ssd_opt.target',
        'ground_truth',
        "train.ssd_opt.target: found 'ground_truth'; allowed: both, gt, teacher.",
    ),
    (
        'train.ssd_opt.batch_share',
        50,
        'train.ssd_opt.batch_share: found 50; allowed: a share above 0 and up to 1.',
    ),
    (
        'train.ssd_opt.loss_weight',
        -1,
        'train.ssd_opt.loss_weight: found -1; allowed: a number of at least 0.',
    ),
    (
        'train.ssd_opt.loss_weight',
        [1.0],
        'train.ssd_opt.loss_weight: found [1.0]; allowed: a number of at least 0.',
    ),
    (
        'train.ssd_opt.loss_weight',
        float('inf'),
        'train.ssd_opt.loss_weight: found inf; allowed: a number of at least 0.',
    ),
    (
        'train.ssd_opt.criterion',
        'L1Loss',
        "train.ssd_opt.criterion: found 'L1Loss'; allowed: the options of a loss, with its type.",
    ),
    (
        'train.ssd_opt.criterion',
        {'type': 'L1'},
        "train.ssd_opt.criterion.type: found 'L1'; allowed: ",
    ),
    (
        'train.ssd_opt.criterion',
        {'type': 'L1Loss', 'weight': 2},
        'train.ssd_opt.criterion.weight: found 2; allowed: nothing (L1Loss takes loss_weight, reduction).',
    ),
    (
        'train.ssd_opt.depths',
        2,
        'train.ssd_opt.depths: found 2; allowed: num_depths (SSDLoss takes num_depths, criterion, ',
    ),
    (
        'train.net_d_init_iters',
        4,
        'train.net_d_init_iters: found 4; allowed: a number below 4, the iterations of the shortest level: it restarts '
        'at each level, and until then only the discriminator trains.',
    ),
    (
        'train.tsa_iter',
        100,
        'train.tsa_iter: found 100; allowed: a number below 4, the iterations of the shortest level: ',
    ),
    (
        'train.scheduler.periods',
        [3],
        'train.scheduler.periods: found [3]; allowed: periods that add up to 4 or more (the schedule is for one',
    ),
    (
        'train.criterian',
        'lamp',
        "train.criterian: found 'lamp'; allowed: train.criterion (there is no option criterian).",
    ),
    (
        'train.rewnd',
        'lr',
        "train.rewnd: found 'lr'; allowed: train.rewind (there is no option rewnd).",
    ),
    (
        'train.ssd_op',
        {'type': 'SSDLoss'},
        "train.ssd_op: found {'type': 'SSDLoss'}; allowed: train.ssd_opt (there is no option ssd_op).",
    ),
    (
        'train.expansion',
        {'type': 'SequentialExpansion'},
        'allowed: nothing, since only MSSRBackwardModel reads it: remove it.',
    ),
    (
        'network_g.sparcity',
        [0, 0.5],
        'network_g.sparcity: found [0, 0.5]; allowed: sparsity (there is no option sparcity; the architecture',
    ),
    (
        'network_g.prunnable',
        ['*'],
        "network_g.prunnable: found ['*']; allowed: prunable (there is no option prunnable; the architecture",
    ),
    (
        'network_g.num_feat',
        8,
        'network_g.num_feat: found 8; allowed: network_g.backbone.num_feat alone',
    ),
    (
        'base_model_typ',
        'SRModel',
        "base_model_typ: found 'SRModel'; allowed: base_model_type (there is no option base_model_typ).",
    ),
    (
        'base_model_type',
        'SRGANModl',
        "base_model_type: found 'SRGANModl'; allowed: SRGANModel; or else ",
    ),
    (
        'base_model_type',
        'MSSRModel',
        '(MSSRModel cannot be extended: it is one of the MSSR models).',
    ),
    (
        'base_model_type',
        'StyleGAN2Model',
        '(StyleGAN2Model cannot be extended: it is not an SRModel).',
    ),
    (
        'base_model_type',
        'HATModel',
        "base_model_type: found 'HATModel'; allowed: EDVRModel, ",
    ),
    (
        'train.optim_g.lr',
        '1e-4',
        "train.optim_g.lr: found '1e-4'; allowed: a number; YAML reads this as a string, write !!float 1e-4.",
    ),
    (
        'logger.save_checkpoint_freq',
        '1e1',
        "logger.save_checkpoint_freq: found '1e1'; allowed: a number; YAML reads this as a string, write !!float 1e1.",
    ),
    (
        'val.val_freq',
        3,
        "val.val_freq: found 3; allowed: a divisor of each level's iterations, [4, 4, 4], to validate each",
    ),
]
WRONG_BACKWARD: list[tuple[str, Any, str]] = [
    (
        'path.pretrain_network_g',
        None,
        "path.pretrain_network_g: found None; allowed: the forward stage's last checkpoint.",
    ),
    (
        'path.pretrain_network_g',
        'stock.pth',
        "path.pretrain_network_g: found 'stock.pth'; allowed: the forward stage's last checkpoint (nothing is ",
    ),
    (
        'network_g.sparsity',
        [0, 0.5, 0.9],
        "allowed: the forward stage's last checkpoint (its level 2 keeps 1692 of 6768 prunable weights; network_g.",
    ),
    (
        'train.recover',
        'tickets',
        "train.recover: found 'tickets'; allowed: rewind, ticket, zero.",
    ),
    (
        'train.ticket_opt',
        {'loss_weight': 1.0},
        "train.ticket_opt: found {'loss_weight': 1.0}; allowed: the options of a loss, with its type.",
    ),
    (
        'train.ticket_opt',
        {'type': 'L1'},
        "train.ticket_opt.type: found 'L1'; allowed: ",
    ),
    (
        'train.ticket_opt',
        {'type': 'L1Loss'},
        "net_g_level1.pth'; allowed: level 1's ticket as the forward stage wrote it, beside its last checkpoint "
        '(there is no such file).',
    ),
    (
        'train.expansion',
        DELETE,
        'train.expansion: found None; allowed: the options of a schedule, such as {type: SequentialExpansion}.',
    ),
    (
        'train.expansion.type',
        'Sequential',
        "train.expansion.type: found 'Sequential'; allowed: SequentialExpansion.",
    ),
    (
        'train.expansion.iters',
        3,
        'train.expansion.iters: found 3; allowed: nothing (SequentialExpansion takes level_iter).',
    ),
    (
        'train.total_iter',
        9,
        'train.total_iter: found 9; allowed: 6 (3 at level 1 + 3 at level 0).',
    ),
]


def ids(wrong: list[tuple[str, Any, str]]) -> list[str]:
    return [f'{option}={"-" if value is DELETE else value}' for option, value, _ in wrong]


def change(opt: dict[str, Any], option: str, value: Any) -> None:
    *path, key = option.split('.')
    node = reduce(dict.__getitem__, path, opt)
    if value is DELETE:
        del node[key]
    else:
        node[key] = value


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimize_parameters(model: Any, current_iter: int) -> None:
        raise AssertionError('the training has started')

    monkeypatch.setattr(SRModel, 'optimize_parameters', optimize_parameters)


@pytest.mark.usefixtures('no_training')
@pytest.mark.parametrize(('option', 'value', 'text'), WRONG_FORWARD, ids=ids(WRONG_FORWARD))
def test_wrong_options_of_the_forward_stage(
    option: str, value: Any, text: str, forward_opt: dict[str, Any], run: Run
) -> None:
    change(forward_opt, option, value)
    with pytest.raises(OptionError) as error:
        run(forward_opt)
    assert text in str(error.value)


@pytest.fixture(scope='module')
def forward_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with levels of the toy network, made without training."""
    path = tmp_path_factory.mktemp('checkpoint') / 'net_g_latest.pth'
    torch.save({'params': pruned_mssr(TOY_EDSR).state_dict()}, path)
    return str(path)


@pytest.mark.usefixtures('no_training')
@pytest.mark.parametrize(('option', 'value', 'text'), WRONG_BACKWARD, ids=ids(WRONG_BACKWARD))
def test_wrong_options_of_the_backward_stage(
    option: str, value: Any, text: str, backward_opt: dict[str, Any], run: Run, forward_checkpoint: str
) -> None:
    torch.save({'params': build_network(TOY_EDSR).state_dict()}, 'stock.pth')
    backward_opt['path']['pretrain_network_g'] = forward_checkpoint
    change(backward_opt, option, value)
    with pytest.raises(OptionError) as error:
        run(backward_opt)
    assert text in str(error.value)


@pytest.mark.usefixtures('no_training')
def test_what_the_scalable_file_cannot_hold_is_refused_before_training(backward_opt: dict[str, Any], run: Run) -> None:
    backbone = {**BACKBONES['SwinIR'], 'patch_norm': 'yes, please'}
    torch.save({'params': pruned_mssr(backbone).state_dict()}, 'swinir.pth')
    backward_opt['network_g']['backbone'] = backbone
    backward_opt['path']['pretrain_network_g'] = 'swinir.pth'
    with pytest.raises(OptionError, match=r"network_g\.backbone: .* a \.mssr file can hold \(.*found 'yes, please'"):
        run(backward_opt)


@pytest.mark.usefixtures('no_training')
@pytest.mark.parametrize('option', ['datasets.val_2.name', 'val.metrics.psnr\u3000y'])
def test_names_that_the_scalable_file_cannot_hold_are_refused_before_training(
    option: str, forward_opt: dict[str, Any], backward_opt: dict[str, Any], run: Run, forward_checkpoint: str
) -> None:
    """The file has the metrics that are measured in training. An ideographic space is not printable."""
    name = 'Set\u3000A' if option == 'datasets.val_2.name' else option.rpartition('.')[2]
    for opt in (forward_opt, backward_opt):
        if name == 'Set\u3000A':
            opt['datasets']['val_2'] = {**opt['datasets']['val'], 'name': name}
        else:
            opt['val']['metrics'][name] = opt['val']['metrics'].pop('psnr')
    backward_opt['path']['pretrain_network_g'] = forward_checkpoint
    with pytest.raises(OptionError) as error:
        run(backward_opt)
    reason = f'(found {name!r}; allowed: printable characters)'
    assert str(error.value) == f'{option}: found {name!r}; allowed: one that a .mssr file can hold {reason}.'
    with pytest.raises(AssertionError, match='the training has started'):
        run(forward_opt)
    (log,) = Path('experiments/forward').glob('*.log')
    assert f'WARNING: {option}: MSSRBackwardModel will refuse it, since no .mssr file can hold it {reason}' in (
        log.read_text()
    )


@pytest.mark.usefixtures('no_training')
def test_a_name_is_not_refused_where_nothing_is_validated(
    backward_opt: dict[str, Any], run: Run, forward_checkpoint: str
) -> None:
    backward_opt['datasets']['val']['name'] = 'Set\u3000A'
    backward_opt['path']['pretrain_network_g'] = forward_checkpoint
    del backward_opt['val']
    with pytest.raises(AssertionError, match='the training has started'):
        run(backward_opt)


@pytest.mark.usefixtures('no_training')
def test_the_forward_stage_only_warns_of_it(forward_opt: dict[str, Any], run: Run) -> None:
    """It writes no such file."""
    forward_opt['network_g']['backbone'] = {**BACKBONES['SwinIR'], 'patch_norm': 'yes, please'}
    with pytest.raises(AssertionError, match='the training has started'):
        run(forward_opt)
    (log,) = Path('experiments/forward').glob('*.log')
    said = (
        r"WARNING: network_g\.backbone: MSSRBackwardModel will refuse it, since .* \(backbone: found 'yes, please'; al"
    )
    assert re.search(said, log.read_text())


@pytest.mark.usefixtures('no_training')
def test_no_rewind_point_to_recover_from(backward_opt: dict[str, Any], run: Run, forward_checkpoint: str) -> None:
    backward_opt['path']['pretrain_network_g'] = forward_checkpoint
    backward_opt['train']['recover'] = 'rewind'
    with pytest.raises(OptionError, match=r"train\.recover: found 'rewind'; allowed: ticket, zero \(.* has no rewind"):
        run(backward_opt)


def test_model_classes_find_the_backbones_options() -> None:
    """In whatever way they look for one, as without MSSR; the architecture gets those of MSSR alone."""
    opt = {
        NETWORK: {'type': 'MSSR', 'sparsity': [0, 0.5], 'backbone': {'type': 'SwinIR', 'window_size': 8, 'depth': 2}}
    }
    expose_backbone_options(opt)
    network_opt = opt[NETWORK]
    assert 'window_size' in network_opt and 'patch_size' not in network_opt
    assert network_opt['window_size'] == network_opt.get('window_size', 7) == 8
    assert network_opt['type'] == 'MSSR' and network_opt.get('patch_size', 1) == 1
    assert network_opt.pop('depth', 3) == 2 and 'depth' not in network_opt
    assert list(network_opt) == ['type', 'sparsity', 'backbone'] == list(dict(**deepcopy(network_opt)))
    for backbone in (None, {}):
        with pytest.raises(KeyError, match='window_size'):
            BackboneOptions(type='MSSR', backbone=backbone)['window_size']
    with pytest.raises(KeyError, match='window_size'):
        BackboneOptions(type='MSSR')['window_size']


def test_the_backbones_options_are_removed_where_they_are() -> None:
    backbone = {'type': 'SwinIR', 'window_size': 8, 'depth': 2}
    network_opt = BackboneOptions(type='MSSR', backbone=backbone)
    assert (network_opt.pop('type'), network_opt.pop('depth')) == ('MSSR', 2)
    del network_opt['window_size']
    assert backbone == {'type': 'SwinIR'}
    assert network_opt.pop('window_size', default=7) == 7
    with pytest.raises(KeyError, match='window_size'):
        network_opt.pop('window_size')


def test_the_backbones_options_are_set_where_they_are() -> None:
    """By a model class. What the YAML has in the wrong place stays there, also in copies, for MSSR to refuse it."""
    backbone = {'type': 'SwinIR', 'window_size': 8, 'level': 3}
    network_opt = BackboneOptions(backbone=backbone, type='MSSR', depth=2)
    network_opt['upscale'] = 2
    network_opt.update(window_size=7, sparsity=[0, 0.5], depth=4, level=1)
    assert network_opt.setdefault('img_size', 48) == 48 and network_opt.setdefault('window_size', 1) == 7
    assert backbone == {'type': 'SwinIR', 'window_size': 7, 'level': 1, 'upscale': 2, 'img_size': 48}
    own = {'backbone': backbone, 'type': 'MSSR', 'depth': 4, 'sparsity': [0, 0.5]}
    for same in (network_opt, deepcopy(network_opt), network_opt.copy()):
        assert type(same) is BackboneOptions and dict(same) == own
    assert deepcopy(network_opt)['backbone'] is not backbone


class Levelled(nn.Module):
    """A toy network with an option that has the name of one of MSSR's."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(x), 2)


@pytest.mark.usefixtures('no_training')
def test_a_backbone_may_have_an_option_called_level(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Levelled', Levelled)
    forward_opt[NETWORK]['backbone'] = {'type': 'Levelled', 'level': 3}
    del forward_opt[TRAIN]['ssd_opt']
    with pytest.raises(AssertionError, match='the training has started'):
        run(forward_opt)


@pytest.mark.usefixtures('no_training')
def test_the_testing_model_does_not_train(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['model_type'] = 'MSSRModel'
    with pytest.raises(OptionError, match=r"model_type: found 'MSSRModel'; allowed: MSSRForwardModel, MSSRBackward"):
        run(forward_opt)


def test_there_is_a_teacher_only_for_self_distillation(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a copy of the network, in the device's memory."""
    teachers = []

    def look(model: Any, current_iter: int) -> None:
        teachers.append(hasattr(model, 'teacher'))
        raise AssertionError('the training has started')

    monkeypatch.setattr(SRModel, 'optimize_parameters', look)
    warnings_of(forward_opt, run)
    forward_opt['name'] = 'alone'
    del forward_opt['train']['ssd_opt']
    warnings_of(forward_opt, run)
    assert teachers == [True, False]


@pytest.mark.usefixtures('no_training')
def test_gpus_that_are_not_there(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    forward_opt['num_gpu'] = 1
    with pytest.raises(OptionError, match=r'num_gpu: found 1; allowed: 0, auto \(torch finds no GPU\)'):
        run(forward_opt)


@pytest.mark.usefixtures('no_training')
def test_several_gpus_without_a_launcher(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BasicSR would stop after a third of the iterations, each with three times the batch."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    forward_opt['num_gpu'] = 'auto'
    with pytest.raises(OptionError, match=r'num_gpu: found 3; allowed: 1 \(auto takes all .*\), or .* with torchrun'):
        run(forward_opt)


@pytest.mark.usefixtures('no_training')
def test_a_schedule_for_the_whole_training(forward_opt: dict[str, Any], run: Run) -> None:
    """A stock YAML's: with 4 iterations a level, the learning rate would not come down."""
    forward_opt['train']['scheduler'] = {
        'type': 'CosineAnnealingRestartLR',
        'periods': [4, 8],
        'restart_weights': [1, 1],
    }
    said = warnings_of(forward_opt, run)
    assert (
        'train.scheduler.periods: no level reaches iteration 12: the schedule restarts at each level, and the' in said
    )
    forward_opt['name'] = 'steps'
    forward_opt['train']['scheduler'] = {'type': 'MultiStepLR', 'milestones': [2, 40], 'gamma': 0.5}
    assert 'train.scheduler.milestones: no level reaches iteration 40: ' in warnings_of(forward_opt, run)
    forward_opt['name'] = 'fitting'
    forward_opt['train']['scheduler'] = {'type': 'MultiStepLR', 'milestones': [2, 4], 'gamma': 0.5}
    assert 'train.scheduler' not in warnings_of(forward_opt, run)


@pytest.mark.usefixtures('no_training')
def test_a_level_that_ends_before_the_learning_rate_comes_down(forward_opt: dict[str, Any], run: Run) -> None:
    """The longest level has 8 iterations; the others end halfway through its period."""
    forward_opt['train'].update(level_iter=[4, 4, 8], total_iter=16)
    cosine = {'type': 'CosineAnnealingRestartLR', 'periods': [8], 'restart_weights': [1]}
    forward_opt['train']['scheduler'] = cosine
    expected = (
        'train.scheduler: a level ends after 4 iterations, before the learning rate has come down at iteration 8: '
        'the schedule restarts at each level, and these have [4, 4, 8].'
    )
    assert warnings_of(forward_opt, run).count(expected) == 1
    forward_opt['name'] = 'steps'
    forward_opt['train']['scheduler'] = {'type': 'MultiStepLR', 'milestones': [2, 8], 'gamma': 0.5}
    assert expected in warnings_of(forward_opt, run)
    forward_opt['name'] = 'fitting'
    forward_opt['train']['scheduler'] = {**cosine, 'periods': [4, 4], 'restart_weights': [1, 1]}
    assert 'train.scheduler' not in warnings_of(forward_opt, run)


@pytest.mark.usefixtures('no_training')
def test_phases_that_last_as_long_as_a_level(forward_opt: dict[str, Any], run: Run) -> None:
    """They restart at each level, so they would never be over; a warm-up only where the schedule restarts, too."""
    plain = deepcopy(forward_opt['train'])
    level_iter = {'level_iter': [8, 4, 4], 'total_iter': 16, 'scheduler': {'type': 'MultiStepLR', 'milestones': [4]}}
    forward_opt['train'].update(level_iter, warmup_iter=4, fix_flow=3)
    said = warnings_of(forward_opt, run)
    assert 'train.warmup_iter: 4 is not below 4, the iterations of the shortest level: ' in said
    assert 'train.fix_flow: ' not in said
    forward_opt.update(name='keeps_the_rate', train={**plain, **level_iter, 'rewind': 'none'})
    forward_opt['train'].update(warmup_iter=7, fix_flow=4)
    said = warnings_of(forward_opt, run)
    assert 'train.warmup_iter: ' not in said
    assert 'train.fix_flow: 4 is not below 4, the iterations of the shortest level: it restarts at each level, ' in said


def warnings_of(opt: dict[str, Any], run: Run) -> str:
    """The warnings in the log of a run, which stops where it would train."""
    with pytest.raises(AssertionError, match='the training has started'):
        run(opt)
    (log,) = Path('experiments', opt['name']).glob('train_*.log')
    return '\n'.join(line for line in log.read_text().splitlines() if 'WARNING' in line)


@pytest.mark.usefixtures('no_training')
def test_options_that_the_model_class_never_reads_are_named(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3}
    forward_opt['train'].update(tsa_iter=1, gan_opt={'type': 'GANLoss'}, total_itr=12)
    said = warnings_of(forward_opt, run)
    assert 'MSSRForwardModel with SRModel reads none of these options: network_d (the nearest' in said
    assert all(f'train.{name}' in said for name in ('tsa_iter', 'gan_opt'))
    assert 'train.total_itr (the nearest that is read is total_iter)' in said


@pytest.mark.usefixtures('no_training')
def test_misspelt_options_outside_train_are_named(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['path'].update(pretrain_network='x.pth', strict_load=False)
    forward_opt['logger'].update(save_freq=4, wandb={'projct': 'mssr'})
    forward_opt['datasets']['train']['use_flip'] = True
    forward_opt['datasets']['val']['gt_sise'] = 32
    forward_opt['val']['save_imgs'] = True
    forward_opt['val']['metrics']['psnr']['test_Y_channel'] = True
    said = warnings_of(forward_opt, run)
    assert said.partition('reads none of these options: ')[2] == (
        'path.pretrain_network (the nearest that is read is pretrain_network_g), '
        'path.strict_load (the nearest that is read is strict_load_g), '
        'val.save_imgs (the nearest that is read is save_img), '
        'logger.save_freq, '
        'logger.wandb.projct (the nearest that is read is project), '
        'datasets.train.use_flip (the nearest that is read is use_hflip), '
        'datasets.val.gt_sise (the nearest that is read is gt_size), '
        'val.metrics.psnr.test_Y_channel (the nearest that is read is test_y_channel).'
    )


class OfOneNetwork(SRModel):
    def test(self) -> None:
        if self.opt['network_g']['type'] == 'EDSR':
            raise AssertionError
        super().test()

    def validation(self, *args: Any) -> None:
        raise AssertionError('calculate_lpips')


@pytest.mark.usefixtures('no_training')
def test_a_class_that_looks_for_the_backbones_type_is_named(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'OfOneNetwork', OfOneNetwork)
    said = warnings_of({**forward_opt, 'base_model_type': 'OfOneNetwork'}, run)
    assert said.partition('WARNING: ')[2] == (
        'OfOneNetwork names EDSR in its code. If it compares network_g.type with that, it finds MSSR there; '
        "the backbone's is network_g.backbone.type."
    )


class ReadsEverywhere(SRModel):
    """It reads options in what is no plain method."""

    @property
    def colours(self) -> Any:
        return self.opt['train']['colour_share']

    @classmethod
    def textures(cls, opt: dict[str, Any]) -> Any:
        return opt['train']['texture_share']

    @staticmethod
    def edges(opt: dict[str, Any]) -> Any:
        return opt['train']['edge_share']


@pytest.mark.usefixtures('no_training')
def test_options_that_something_reads_are_not_named(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them those of a metric that passes on what it gets."""

    def passes_on(img: Any, img2: Any, **others: Any) -> float:
        return float(calculate_psnr(img, img2, **others))

    monkeypatch.setattr(METRIC_REGISTRY, '_obj_map', {**METRIC_REGISTRY._obj_map, 'passes_on': passes_on})
    forward_opt['val'].update(precision='fp32', suffix=None, pbar=False)
    forward_opt['val']['metrics']['other'] = {'type': 'passes_on', 'crop_border': 2, 'better': 'higher'}
    forward_opt['val']['metrics']['psnr']['better'] = 'higher'
    forward_opt['path']['param_key_g'] = 'params'
    forward_opt['logger']['wandb'] = {'project': None, 'resume_id': None}
    forward_opt['datasets']['train'].update(pin_memory=False, num_prefetch_queue=1, filename_tmpl='{}', color='rgb')
    forward_opt['datasets']['train'].update(mean=None, std=None, persistent_workers=False)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'ReadsEverywhere', ReadsEverywhere)
    forward_opt['base_model_type'] = 'ReadsEverywhere'
    forward_opt['train'].update(colour_share=1, texture_share=1, edge_share=1)
    assert 'reads none of these options' not in warnings_of(forward_opt, run)


@pytest.mark.usefixtures('no_training')
def test_a_dataset_that_is_no_class_is_not_looked_into(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = partial(DATASET_REGISTRY.get('PairedImageDataset'))
    monkeypatch.setattr(DATASET_REGISTRY, '_obj_map', {**DATASET_REGISTRY._obj_map, 'Made': made})
    forward_opt['datasets']['train'].update(type='Made', whatever=1)
    assert 'reads none of these options' not in warnings_of(forward_opt, run)


@pytest.mark.usefixtures('no_training')
def test_a_metric_without_options_is_refused(forward_opt: dict[str, Any], run: Run) -> None:
    forward_opt['val']['metrics']['psnr'] = None
    with pytest.raises(OptionError, match=r'val\.metrics\.psnr: found None; allowed: a mapping'):
        run(forward_opt)


@pytest.mark.usefixtures('no_training')
def test_a_misspelt_metric_is_refused_before_the_first_validation(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_opt['val']['metrics']['psnr']['type'] = 'calculate_pnsr'
    expected = r"val\.metrics\.psnr\.type: found 'calculate_pnsr'; allowed: calculate_psnr\."
    with pytest.raises(OptionError, match=expected):
        run(forward_opt)
    forward_opt['val']['metrics']['psnr']['type'] = 'calculate_lpips'  # what OfOneNetwork computes itself
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'OfOneNetwork', OfOneNetwork)
    warnings_of({**forward_opt, 'base_model_type': 'OfOneNetwork'}, run)


@pytest.mark.usefixtures('no_training')
def test_a_backbone_with_little_to_prune_is_reported(forward_opt: dict[str, Any], run: Run) -> None:
    ecbsr = {'type': 'ECBSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 2, 'num_channel': 8, 'with_idt': False}
    ecbsr.update(act_type='prelu', scale=2)
    forward_opt['network_g']['backbone'] = ecbsr
    network = build_network(ecbsr)
    prunable = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
    total = sum(parameter.numel() for parameter in network.parameters())
    said = warnings_of(forward_opt, run)
    assert f'Only {prunable:,} of the {total:,} parameters ({prunable / total:.0%}) are prunable' in said
    assert f'Every level has the other {total - prunable:,}.' in said
