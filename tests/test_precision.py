"""Training in bf16 and with channels-last features: what uses them, and what stays float32 and contiguous."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from basicsr.archs import build_network
from basicsr.archs.discriminator_arch import VGGStyleDiscriminator
from basicsr.archs.edsr_arch import EDSR
from conftest import TOY_EDSR, Run, contents, equal, forget_after, load, load_network
from torch import Tensor, nn
from toy import add_discriminator

from mssr_basicsr.foundation.checks import OptionError
from mssr_basicsr.models import levelwise_training
from mssr_basicsr.models.precision import computing

CPU = torch.device('cpu')
FAST = {'precision': 'bf16', 'channels_last': True}


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


# ------------------------------ one network ------------------------------ #


def test_bf16_by_hand() -> None:
    """bf16 has 8 bits: 1 + 1/128 + 1/512 becomes 1 + 1/128, and three times that lies between two numbers."""
    layer = nn.Conv2d(1, 1, 1)
    layer.weight.data.fill_(1 + 1 / 128 + 1 / 512)
    layer.bias.data.zero_()
    x = torch.full((1, 1, 2, 2), 3.0)
    with computing([layer], CPU, 'bf16'):
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, torch.full((1, 1, 2, 2), 3 + 4 / 128))  # and not 3 + 2/128: to the even one
    assert y.dtype == layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.item() == 12
    assert torch.equal(layer(x), torch.full((1, 1, 2, 2), 3 * (1 + 1 / 128 + 1 / 512)))


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_channels_last_only_changes_the_layout_inside(precision: str) -> None:
    network, x = build_network(TOY_EDSR), torch.rand(2, 3, 8, 8)
    inside: list[Tensor] = []
    for block in network.body:
        block.register_forward_hook(lambda module, inputs, output: inside.append(output))
    with computing([network], CPU, precision, channels_last=True):
        y = network(x)
        y.sum().backward()
    assert all(is_channels_last(features) for features in inside)
    assert {features.dtype for features in inside} == {torch.bfloat16 if precision == 'bf16' else torch.float32}
    stay = [y, *network.parameters(), *(parameter.grad for parameter in network.parameters())]
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in stay)
    expected = network(x)
    # Rounding adds up along the whole network, so it is measured by the range of the outputs: one near 0 is not more
    # exact than the others. In bf16, whose numbers are 1/128 apart, 2000 random networks differ by up to 0.6 % of it.
    tolerance = 1e-5 if precision == 'fp32' else 2e-2
    assert (y - expected).abs().max() <= tolerance * (expected.max() - expected.min())
    assert not is_channels_last(inside[-1])  # the last call was outside of the context


class Images(NamedTuple):
    image: Tensor
    others: Any


def test_outputs_of_every_kind_are_float32() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = torch.nn.functional.linear(x, torch.eye(2))
            return {'images': [y, (y, None)], 'index': y.argmax(-1), 'named': Images(y, [y])}

    network = Several()
    with computing([network], CPU, 'bf16'):
        output = network(torch.ones(1, 2))
    first, (second, nothing) = output['images']
    assert first.dtype == second.dtype == torch.float32
    assert nothing is None and output['index'].dtype == torch.int64
    named = output['named']
    assert type(named) is Images and named.image.dtype == named.others[0].dtype == torch.float32


def test_a_network_that_does_not_support_channels_last_is_named() -> None:
    flattening = VGGStyleDiscriminator(3, 2, input_size=128)
    with computing([flattening], CPU, 'fp32', channels_last=True):
        with pytest.raises(OptionError, match=r'train\.channels_last: found True; .* code of VGGStyleDiscriminator'):
            flattening(torch.rand(2, 3, 128, 128))
        with pytest.raises(OptionError, match=r'VGGStyleDiscriminator takes no \(N, C, H, W\)'):
            flattening(torch.rand(1, 2, 3, 128, 128))


# ------------------------------ both stages ------------------------------ #


@pytest.fixture
def fast_opts(forward_opt: dict[str, Any], backward_opt: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for opt in (forward_opt, backward_opt):
        opt['train'].update(FAST)
    backward_opt['train']['ticket_opt'] = {'type': 'L1Loss'}
    return forward_opt, backward_opt


def tensors_in(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    items = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def test_both_stages_in_bf16(
    fast_opts: tuple[dict[str, Any], dict[str, Any]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in training computes in bf16 and channels-last, validation does not, and files are as ever.

    Every level of the backward stage's result is bit for bit what it was before each expansion.
    """
    seen: set[tuple[bool, bool, torch.dtype, bool]] = set()
    forward = EDSR.forward

    def spy(network: Any, x: Tensor) -> Tensor:
        y = network.conv_first(x)
        seen.add((network.training, torch.is_grad_enabled(), y.dtype, is_channels_last(y)))
        return forward(network, x)

    monkeypatch.setattr(EDSR, 'forward', spy)
    student, teacher, validation = (
        (True, True, torch.bfloat16, True),
        (False, True, torch.bfloat16, True),
        (False, False, torch.float32, False),
    )
    for opt in fast_opts:
        seen.clear()
        experiment = run(opt)
        seen.discard((False, False, torch.float32, True))  # finding out what the finished images need not run
        assert seen == {student, teacher, validation}
        files = [*experiment.glob('models/*.pth'), *experiment.glob('training_states/*.state')]
        assert len(files) > 6
        for file in files:
            saved = load(file)
            for tensor in tensors_in({**saved, 'mssr': None}):
                assert tensor.is_contiguous()
                assert tensor.dtype in (torch.float32, torch.uint8), file
    models = experiment / 'models'
    for key in ('params', 'params_ema'):
        result = load_network(models / 'net_g_latest.pth', key)
        for level in range(3):
            assert equal(result.export(level), load(models / f'net_g_level{level}.pth')['params'])


@pytest.mark.slow
def test_bf16_resumes_exactly(fast_opts: tuple[dict[str, Any], dict[str, Any]], run: Run) -> None:
    for opt, iteration in zip(fast_opts, (6, 4)):
        opt['logger']['save_checkpoint_freq'] = 2
        experiment = run(opt)
        uninterrupted = contents(experiment / 'models')
        forget_after(experiment, iteration)
        run(opt, '--auto_resume')
        assert contents(experiment / 'models') == uninterrupted
        shutil.copytree(experiment / 'models', 'kept', dirs_exist_ok=True)


def test_bf16_trains_a_different_network_than_fp32(forward_opt: dict[str, Any], run: Run) -> None:
    """That is, the option does something; and, the toy being trained alike, not much."""
    forward_opt['train'].update(level_iter=4, total_iter=12)
    weights = {}
    for precision in ('fp32', 'bf16'):
        forward_opt['train']['precision'] = precision
        weights[precision] = load(run({**deepcopy(forward_opt), 'name': precision}) / 'models' / 'net_g_level0.pth')
    one, other = (state['params']['conv_last.weight'] for state in weights.values())
    assert not torch.equal(one, other)
    assert torch.allclose(one, other, atol=4e-3)


def test_a_gan_in_bf16(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator too computes in bf16, and is given, gives, and learns from, float32."""
    from basicsr.archs.discriminator_arch import UNetDiscriminatorSN
    from basicsr.losses.gan_loss import GANLoss

    add_discriminator(forward_opt, 'SRGANModel')
    forward_opt['train'].update(FAST)
    seen = []
    discriminate, judge = UNetDiscriminatorSN.forward, GANLoss.forward

    def spy(network: Any, x: Tensor) -> Tensor:
        seen.append((x.dtype, x.is_contiguous(), network.conv0(x).dtype))
        return discriminate(network, x)

    def spy_on_loss(loss: Any, prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert prediction.dtype == torch.float32
        return judge(loss, prediction, *args, **kwargs)

    monkeypatch.setattr(UNetDiscriminatorSN, 'forward', spy)
    monkeypatch.setattr(GANLoss, 'forward', spy_on_loss)
    models = run(forward_opt) / 'models'
    assert set(seen) == {(torch.float32, True, torch.bfloat16)} and len(seen) == 3 * 12
    assert all(tensor.dtype == torch.float32 for tensor in load(models / 'net_d_latest.pth')['params'].values())


def test_validation_in_bf16_on_request(forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = set()
    forward = EDSR.forward

    def spy(network: Any, x: Tensor) -> Tensor:
        if x.shape[-1] == 16:  # and not the small image by which the upscaling factor is checked
            dtypes.add((network.training, network.conv_first(x).dtype))
        return forward(network, x)

    monkeypatch.setattr(EDSR, 'forward', spy)
    del forward_opt['train']['ssd_opt']
    forward_opt['val']['precision'] = 'bf16'
    run(forward_opt)
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_processor_without_bf16_is_reported(
    forward_opt: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'train.precision: bf16: this processor has no bf16 arithmetic, so training will be slower than in fp32.'
    forward_opt['train']['precision'] = 'bf16'
    for lacks in (True, False):
        monkeypatch.setattr(levelwise_training, 'lacks_bf16', lambda device, lacks=lacks: lacks)
        (log,) = run({**deepcopy(forward_opt), 'name': f'lacks_{lacks}'}).glob('train_*.log')
        assert (text in log.read_text()) == lacks


def test_bf16_arithmetic_is_found_among_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mssr_basicsr.models import precision

    cpuinfo = tmp_path / 'cpuinfo'
    monkeypatch.setattr(precision, 'Path', lambda path: cpuinfo)
    assert not precision.lacks_bf16(CPU)  # nothing is known
    for flags, lacks in (('avx2 avx512f', True), ('avx512f avx512_bf16', False), ('asimd svebf16', False)):
        cpuinfo.write_text(f'flags : {flags}\n')
        assert precision.lacks_bf16(CPU) == lacks
