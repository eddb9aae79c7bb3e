"""Feature taps, the larger network that finishes images, and the loss on them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from conftest import BACKBONES, TOY_EDSR
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mssr_basicsr.archs.feature_taps import ImageFinisher, features_of, find_feature_taps, record_outputs
from mssr_basicsr.archs.forward_pass import only_pass, record_passes
from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.losses.distillation_term import DistillationTerm
from mssr_basicsr.losses.self_distillation import SelfDistillation
from mssr_basicsr.losses.ssd_loss import SSDLoss

EXPECTED_TAPS = {
    'EDSR': ['body.0', 'body.1', 'body.2'],
    'MSRResNet': ['body.0', 'body.1', 'body.2'],
    'RCAN': ['body.0', 'body.1', 'body.2'],
    'RRDBNet': ['body.0', 'body.1', 'body.2'],
    'SRVGGNetCompact': ['body.1', 'body.3', 'body.5', 'body.7'],
    'SwinIR': ['layers.0', 'layers.1', 'layers.2'],
}


@pytest.mark.parametrize('name', BACKBONES)
def test_taps_are_found_and_what_features_replace_is_not_computed(name: str) -> None:
    network = build_network(BACKBONES[name]).eval()
    taps = find_feature_taps(network)
    assert taps == EXPECTED_TAPS[name]

    x = torch.rand(2, 3, 16, 16)
    finisher = ImageFinisher(network, taps)
    with torch.no_grad(), record_outputs(network, taps) as outputs:
        image = network(x)
    features = features_of(outputs)
    row, blocks = taps[0].split('.')[0], network.get_submodule(taps[0].split('.')[0])
    with_weights = [f'{row}.{i}' for i, block in blocks.named_children() if has_layers(block)]
    finisher.try_out(x)
    for tap in taps:
        with FlopCounterMode(display=False) as counter:
            (finished,) = finisher.finish(x, {tap: features[tap]})
        assert torch.allclose(finished, image, rtol=1e-4, atol=1e-5)
        operations = {module.partition('.')[2] for module in counter.get_flop_counts()}
        depth = int(tap.split('.')[1])
        expected = [block for block in with_weights if int(block.split('.')[1]) > depth]
        assert [block for block in with_weights if block in operations] == expected


def test_taps_have_the_names_of_the_modules() -> None:
    named = nn.Sequential()
    for i in range(3):
        named.add_module(f'block{i}', nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    assert find_feature_taps(nn.ModuleDict({'body': named})) == ['body.block0', 'body.block1', 'body.block2']
    shared = nn.ReLU()  # the container has one child less than elements
    row = nn.Sequential(nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 4, 3), nn.PReLU())
    assert find_feature_taps(nn.ModuleDict({'body': row})) == ['body.1', 'body.5']


def has_layers(module: nn.Module) -> bool:
    return any(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in module.modules())


class DenselyUsed(nn.Module):
    """A trunk all of whose blocks' outputs are used at the end: none of them may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return torch.stack(features).sum(0)


def test_what_is_still_needed_is_computed() -> None:
    network = DenselyUsed().eval()
    taps = find_feature_taps(network)
    assert taps == ['blocks.0', 'blocks.1', 'blocks.2']
    x, features = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        (image,) = ImageFinisher(network, taps).finish(x, {'blocks.1': features})
        expected = network.blocks[0](x) + features + network.blocks[2](features)
    assert torch.allclose(image, expected)


class SkipsFromZero(DenselyUsed):
    """Its first blocks reach the end by a skip connection whose weight is zero at first, as NAFNet's are."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (block(x) for block in list(self.blocks)[:2])
        return self.blocks[2](first + second) + self.share * first  # type: ignore[no-any-return]


def test_what_is_needed_is_found_out_for_each_teacher() -> None:
    """The student's features are its teacher's own, so that the term by hand is the loss of the teacher's image."""
    student = SkipsFromZero().eval()
    taps = ['blocks.1']
    distillation = SelfDistillation(SSDLoss('all'), deepcopy(student).requires_grad_(False), taps)
    x, gt = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    for share in (0.0, 1.0):
        student.share.data.fill_(share)
        distillation.load_teacher(student.state_dict())
        with distillation.watching(student, 'seed'):
            image = student(x)
            term = distillation.term(gt)
        assert term is not None and torch.allclose(term, (image - gt).abs().mean())


class Noisy(DenselyUsed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand(1))


def test_finding_out_what_is_needed_draws_no_random_numbers() -> None:
    network = Noisy().eval()
    before = torch.get_rng_state()
    ImageFinisher(network, find_feature_taps(network)).try_out(torch.rand(1, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_networks_of_one_output_can_be_distilled() -> None:
    class TwoOutputs(DenselyUsed):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x), x]

    network, x = TwoOutputs(), torch.rand(1, 3, 8, 8)
    distillation = SelfDistillation(SSDLoss(), network, find_feature_taps(network))
    with distillation.watching(network, 'seed'):
        network(x)
        with pytest.raises(TypeError, match='the network returns a list, not one tensor'):
            distillation.term(x)


def test_only_networks_of_one_input_can_be_distilled() -> None:
    class TwoInputs(DenselyUsed):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    network, x = TwoInputs(), torch.rand(1, 3, 8, 8)
    distillation = SelfDistillation(SSDLoss(), network, find_feature_taps(network))
    with distillation.watching(network, 'seed'):
        network(x, y=x)
        with pytest.raises(RuntimeError, match='the network takes 2 inputs'):
            distillation.term(x)


@pytest.mark.parametrize('name', BACKBONES)
def test_images_from_several_taps_are_those_from_each_alone(name: str) -> None:
    """As one batch, with the gradients of each; nothing after a tap runs twice."""
    torch.manual_seed(0)
    network = build_network(BACKBONES[name]).eval().requires_grad_(False)
    taps = find_feature_taps(network)[1:]
    x = torch.rand(2, 3, 16, 16)
    with record_outputs(network, taps) as outputs:
        network(torch.rand(2, 3, 16, 16))  # another image's features
    recorded = features_of(outputs)
    results, calls = {}, {}
    for together in (True, False):
        features = {tap: recorded[tap].clone().requires_grad_() for tap in taps}
        finisher = ImageFinisher(network, find_feature_taps(network))
        finisher.try_out(x)
        with FlopCounterMode(display=False) as counter:
            parts = [features] if together else [{tap: given} for tap, given in features.items()]
            images = [image for part in parts for image in finisher.finish(x, part)]
        calls[together] = counter.get_total_flops()
        torch.stack([(i + 1) * image.square().mean() for i, image in enumerate(images)]).sum().backward()
        results[together] = [*images, *(given.grad for given in features.values())]
    for one, other in zip(results[True], results[False]):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert calls[True] == calls[False]
    assert finisher._one_batch


def test_gradients_reach_the_features_and_not_the_larger_network() -> None:
    network = build_network(TOY_EDSR).eval().requires_grad_(False)
    student = deepcopy(network).requires_grad_(True)
    taps = find_feature_taps(network)
    x = torch.rand(1, 3, 16, 16)
    with record_outputs(student, ['body.1']) as outputs:
        student(x)
    features = features_of(outputs)
    (image,) = ImageFinisher(network, taps).finish(x, {'body.1': features['body.1']})
    image.sum().backward()
    has_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert 'body.1.conv2.weight' in has_gradient
    assert 'conv_first.weight' in has_gradient
    assert not any(name.startswith(('body.2', 'upsample', 'conv_last')) for name in has_gradient)
    assert all(parameter.grad is None for parameter in network.parameters())


def ssd_loss(**options: Any) -> SSDLoss:
    return SSDLoss(**options)


def test_the_loss_by_hand() -> None:
    images = [torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.7)]
    gt, teacher = torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 0.9)
    values = {
        target: ssd_loss(target=target, loss_weight=2.0)(images, gt, lambda: teacher).item()
        for target in ('gt', 'teacher', 'both')
    }
    # |0.5 - 1| and |0.7 - 1|, |0.5 - 0.9| and |0.7 - 0.9|: their means, times the weight 2
    assert values == pytest.approx({'gt': 2 * 0.4, 'teacher': 2 * 0.3, 'both': 2 * 0.35})


def test_the_teachers_image_is_only_computed_if_needed() -> None:
    def teacher() -> Tensor:
        raise AssertionError

    ssd_loss(target='gt')([torch.zeros(1, 1, 2, 2)], torch.zeros(1, 1, 2, 2), teacher)


def test_a_share_of_the_batch_is_distilled() -> None:
    loss = ssd_loss(batch_share=0.5)
    drawn = [loss.sample_images(6, f'seed, iteration {i}') for i in range(200)]
    assert drawn == [loss.sample_images(6, f'seed, iteration {i}') for i in range(200)]
    assert {(images.start, images.stop) for images in drawn} == {(0, 3), (1, 4), (2, 5), (3, 6)}
    assert loss.sample_images(1, 'any') == slice(0, 1)
    assert ssd_loss().sample_images(6, 'any') == slice(0, 6)


def test_what_a_batch_share_distils_by_hand() -> None:
    """The loss of a batch of four with a share of a half is that of the two images by themselves, gradients too."""
    teacher = build_network(TOY_EDSR).eval().requires_grad_(False)
    student = build_network(TOY_EDSR)
    x, gt, taps = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 16, 16), find_feature_taps(teacher)
    losses = {}
    for share, seen in ((0.5, slice(None)), (1.0, ssd_loss(batch_share=0.5).sample_images(4, 'seed'))):
        distillation = SelfDistillation(ssd_loss(batch_share=share, target='both'), teacher, taps)
        student.zero_grad()
        with distillation.watching(student, 'seed'):
            student(x[seen])
            loss = distillation.term(gt[seen])
        loss.backward()
        losses[share] = [loss, *(parameter.grad for parameter in student.body[0].parameters())]
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(*losses.values()))


def test_depths_depend_only_on_the_seed() -> None:
    taps = [f'body.{i}' for i in range(8)]
    loss = ssd_loss(num_depths=2)
    drawn = [loss.sample_taps(taps, f'seed, iteration {i}') for i in range(200)]
    assert drawn == [loss.sample_taps(taps, f'seed, iteration {i}') for i in range(200)]
    assert all(len(set(depths)) == 2 and depths == sorted(depths) for depths in drawn)
    assert {tap for depths in drawn for tap in depths} == set(taps)
    assert ssd_loss(num_depths='all').sample_taps(taps, 'any') == taps


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_forward_pass_is_repeated_in_its_own_precision(dtype: torch.dtype) -> None:
    """That in which the network ran, and not the one of where its loss is computed."""
    network, x = nn.Linear(2, 2), torch.rand(1, 2)
    with record_passes(network) as passes, torch.autocast('cpu', dtype):
        network(x)
    assert only_pass(passes).repeated_by(network).dtype == dtype


# ------------------------------ the term in the pixel loss ------------------------------ #


def test_a_pixel_loss_with_the_term_is_called_and_changed_as_before() -> None:
    """By hand: differences of 1 and three times 0.2, or by their weights of the first alone; the term is 2."""
    image, gt = torch.tensor([[[[0.0, 0.8], [0.8, 0.8]]]]), torch.ones(1, 1, 2, 2)
    first = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    seen = []

    def term(output: Tensor, gt: Tensor) -> Tensor:
        seen.append((output is image, gt is expected))
        return torch.tensor(2.0)

    stock, expected = build_loss({'type': 'L1Loss', 'loss_weight': 3.0}), gt
    cri_pix = DistillationTerm('ssd_opt', term).add_to(stock)
    assert cri_pix is stock and cri_pix.loss_weight == 3.0
    assert float(cri_pix(image, gt)) == pytest.approx(3 * 0.4 + 2)
    assert float(cri_pix(image, gt, weight=first)) == pytest.approx(3 * 1 + 2)
    assert float(cri_pix(target=gt, pred=image, weight=first)) == pytest.approx(3 * 1 + 2)
    cri_pix.loss_weight = 1.0
    assert float(cri_pix(image, gt)) == pytest.approx(0.4 + 2)
    assert seen == [(True, True)] * 4


def test_a_result_that_nothing_trains_by_leaves_the_term_to_the_next() -> None:
    """A class may compute the loss a first time for its log alone; what is distilled is there only once."""
    given = iter([torch.tensor(2.0)])
    cri_pix = DistillationTerm('ssd_opt', lambda output, gt: next(given, None)).add_to(nn.L1Loss())
    image, gt = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 2, 2)
    with torch.no_grad():
        assert float(cri_pix(image, gt)) == 1
    assert float(cri_pix(image, gt)) == 1 + 2


@pytest.mark.parametrize(
    ('pixel_loss', 'expected'), [(nn.functional.l1_loss, {'l_pix': 1.0, 'l_ssd': 2.0}), (None, {'l_ssd': 2.0})]
)
def test_a_pixel_loss_need_not_be_a_module_nor_be_there(pixel_loss: Any, expected: dict[str, float]) -> None:
    term = DistillationTerm('ssd_opt', lambda output, gt: torch.tensor(2.0))
    total = term.add_to(pixel_loss)(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert float(total) == sum(expected.values())
    assert {name: float(loss) for name, loss in term.split({'l_pix': total}).items()} == expected


class TwoValues(nn.Module):
    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return image.mean(), target.mean()


def test_a_pixel_loss_of_several_values_is_refused() -> None:
    """Even where there is nothing to distil yet: not after level 0."""
    cri_pix = DistillationTerm('ssd_opt', lambda output, gt: None).add_to(TwoValues())
    with pytest.raises(OptionError) as error:
        cri_pix(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    allowed = 'a loss that returns one tensor, not a tuple (or no train.ssd_opt)'
    assert str(error.value) == f"train.pixel_opt: found 'TwoValues'; allowed: {allowed}."


@pytest.mark.parametrize(
    ('logged', 'expected', 'warns'),
    [
        (lambda one, other: {'l_pix': one}, {'l_pix': 1, 'l_ssd': 2}, False),
        (lambda one, other: {'l_pix': 0.0 + one}, {'l_pix': 1, 'l_ssd': 2}, False),  # as NAFNet adds it up
        (lambda one, other: {'l_pix': one.detach(), 'l_g': one + 1}, {'l_pix': 1, 'l_ssd': 2, 'l_g': 4}, False),
        (lambda one, other: {'l_1': one, 'l_2': other()}, {'l_1': 1, 'l_2': 3, 'l_ssd': 4}, False),
        (lambda one, other: {'l_pix': 0.0 + one + other()}, {'l_pix': 4, 'l_ssd': 4}, False),
        (lambda one, other: {'l_1': one, 'l_10': 10 * other()}, {'l_1': 1, 'l_10': 50, 'l_ssd': 4}, True),
        (lambda one, other: {'l_pix': one / 2}, {'l_pix': 1.5, 'l_ssd': 2}, True),
    ],
)
def test_the_log_has_the_term_apart(
    logged: Any, expected: dict[str, float], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand, of one result that is 1 + 2 and another that is 3 + 2. One warning says what else has it as a part."""
    gt, term = torch.zeros(1, 1, 2, 2), DistillationTerm('ssd_opt', lambda output, gt: torch.tensor(2.0))
    cri_pix = term.add_to(build_loss({'type': 'L1Loss'}))
    for _ in range(2):
        term.begin_iteration()
        losses = logged(cri_pix(gt + 1, gt), lambda: cri_pix(gt + 3, gt))
        assert {name: float(loss) for name, loss in term.split(losses).items()} == expected
        assert term.split({'l_d': gt.sum()}) == {'l_d': gt.sum()}  # of a discriminator, which the class logs apart
    said = 'In the log, l_ssd is also a part of a loss in which the model class uses cri_pix.'
    assert caplog.text.count(said) == warns
