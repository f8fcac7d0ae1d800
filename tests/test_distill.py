"""Training scales end to end: gradients against autograd's own, and a model that gets closer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme, grid
from lowbit.algorithms import rtn
from lowbit.distill import distill
from lowbit.errors import LowbitError
from lowbit.judge import head_inputs
from lowbit.quantized import QuantizedWeight
from lowbit.trainable import TrainableLinear, within_steps
from lowbit.training import Norms
from tests.algorithms.examples import random_weight

W4 = QuantScheme(4, 32)


def quantized(rows: int = 24, columns: int = 64, symmetric: bool = True) -> QuantizedWeight:
    return rtn.quantize_weight(
        random_weight(rows, columns), None, QuantScheme(4, 32, symmetric), torch.bfloat16
    )[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_the_gains_is_autograds(symmetric: bool) -> None:
    start = quantized(symmetric=symmetric)
    layer = TrainableLinear(start, torch.randn(24), torch.float32)
    torch.nn.init.ones_(layer.gains)
    x, wanted = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 24)
    (layer(x) - wanted).square().sum().backward()

    gains = torch.ones(24, 2, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    dense = grid.dequantize(start.codes, start.scales.float(), start.zeros, start.scheme)
    dense = dense.to(torch.bfloat16).float() * gains.repeat_interleave(32, 1)
    (torch.nn.functional.linear(y, dense, layer.bias) - wanted).square().sum().backward()
    assert torch.allclose(layer.gains.grad, gains.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-3)


def test_gains_end_up_in_the_scales_and_nowhere_else() -> None:
    start = quantized()
    layer = TrainableLinear(start, None, torch.bfloat16)
    assert torch.equal(layer.weight, start.dequantize(torch.bfloat16))
    with torch.no_grad():
        layer.gains[3, 1] = 1.5
    layer.refresh()
    after = layer.quantized()
    assert torch.equal(after.codes, start.codes)
    assert torch.equal(after.zeros, start.zeros)
    assert torch.equal(layer.weight, after.dequantize(torch.bfloat16))
    changed = (after.scales != start.scales).nonzero().tolist()
    assert changed == [[3, 1]]
    assert float(after.scales[3, 1]) == pytest.approx(1.5 * float(start.scales[3, 1]), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_begin_anywhere_within_a_step(dtype: torch.dtype) -> None:
    """They change no number, and of a tenth of a step that is learned, a tenth of them shows it at once."""
    values = random_weight(64, 50).mul(0.01).to(dtype)
    values[0, :3] = torch.tensor([0.0, 2.0**-7, -(2.0**-9)])
    gains = within_steps(values, dtype)
    assert torch.equal((values.float() * gains).to(dtype), values)
    moved = (values.float() * gains * (1 + torch.finfo(dtype).eps / 10)).to(dtype) != values
    assert 0.1 < moved.double().mean() < 0.2  # a step is eps to eps / 2 of a number


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_begin_as_they_are(family: str, tiny_model: Callable[..., Path]) -> None:
    """Those of bfloat16 numbers anywhere within a step; those that add 1 to theirs at a gain of 1."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}
    norms = Norms(model)
    for name, weight in norms.weights().items():
        assert torch.equal(weight, before[name])
        assert bool((norms.gains[name] == 1).all()) == (family == "gemma3")
    norms.refresh()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def rounded_model(folder: Path) -> tuple[torch.nn.Module, dict[str, QuantizedWeight]]:
    """A tiny model with its blocks' matrices rounded to 3 bits, and the weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            weight, _ = rtn.quantize_weight(module.weight.data, None, QuantScheme(3, 32), torch.bfloat16)
            weights[name] = weight
            module.weight.data = weight.dequantize(torch.bfloat16).float()
    return model, weights


def rows(count: int) -> Tensor:
    return torch.randint(3, 90, (count, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_training_brings_the_model_closer(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    targets = [found[0] for found in head_inputs(original, rows(48).split(1))]
    model, weights = rounded_model(folder)
    heads = {name: parameter.clone() for name, parameter in model.named_parameters()}
    steps = []
    done = distill(
        model, weights, rows(48), targets, epochs=4, learning_rate=5e-3, tokens_per_step=256,
        progress=lambda step, of, kl: steps.append((step, of)),
    )  # fmt: skip
    assert done.after < 0.95 * done.before
    assert steps[-1] == (done.steps, done.steps)
    assert done.weights.keys() == weights.keys()
    for name, weight in done.weights.items():
        assert torch.equal(weight.codes, weights[name].codes)
    assert any(not torch.equal(done.norms[name], heads[name]) for name in done.norms)

    # What it hands over is what it judged: put into a fresh model, the divergence is the same.
    fresh, _ = rounded_model(folder)
    for name, weight in done.weights.items():
        fresh.get_submodule(name).weight.data = weight.dequantize(torch.bfloat16).float()
    for name, norm in done.norms.items():
        fresh.get_parameter(name).data = norm.bfloat16().float()  # as most files hold it
    with torch.no_grad():
        p, q = (m(input_ids=rows(48)[45:]).logits.log_softmax(-1) for m in (original, fresh))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(done.after, rel=1e-5)


def test_too_few_rows_are_refused(tiny_model: Callable[..., Path]) -> None:
    model, weights = rounded_model(tiny_model("llama"))
    with pytest.raises(LowbitError, match="too few to train on"):
        distill(model, weights, rows(1), [torch.zeros(32, 64)])
