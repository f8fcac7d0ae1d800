"""Training codes: gradients against autograd's own, Adam against torch's, and a model that gets closer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme, grid
from lowbit.algorithms import rtn
from lowbit.distill import Distilled, distill
from lowbit.judge import NO_TARGET, head_inputs, next_tokens
from lowbit.latent import BETAS, LatentLinear
from lowbit.quantized import QuantizedWeight
from tests.algorithms.examples import random_weight
from tests.test_distill import rounded_model, rows


def quantized(bits: int = 4, symmetric: bool = True) -> QuantizedWeight:
    scheme = QuantScheme(bits, 32, symmetric)
    return rtn.quantize_weight(random_weight(24, 64), None, scheme, torch.bfloat16)[0]


def straight_through(latents: Tensor) -> Tensor:
    return latents + (latents.round() - latents).detach()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_a_naive_twin_in_float64(symmetric: bool) -> None:
    torch.manual_seed(0)  # gradients of gains are sums that may nearly cancel
    start = quantized(symmetric=symmetric)
    layer = LatentLinear(start, None, torch.float32)
    torch.nn.init.ones_(layer.gains)
    taken: dict[int, Tensor] = {}

    def take(part: slice, gradient: Tensor) -> None:
        taken[part.start] = gradient.clone()  # it is overwritten

    layer.learner = take
    x, wanted = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 24)
    (layer(x) - wanted).square().sum().backward()

    latents = start.codes.double().requires_grad_(True)
    gains = torch.ones(24, 2, dtype=torch.float64, requires_grad=True)
    spread = lambda each: each.double().repeat_interleave(32, 1)  # noqa: E731
    y = x.detach().double().requires_grad_(True)
    dense = (straight_through(latents) - spread(start.zeros)) * spread(start.scales.float() * gains)
    dense = dense + (layer.weight.double() - dense).detach()  # rounded to bfloat16, straight through
    ((y @ dense.T) - wanted).square().sum().backward()

    found = torch.cat([taken[key] for key in sorted(taken)]) * start.scales.float().repeat_interleave(32, 1)
    assert latents.grad is not None
    assert gains.grad is not None
    assert y.grad is not None
    assert torch.allclose(found.double(), latents.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.gains.grad.double(), gains.grad, rtol=1e-2, atol=1e-2)
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)


def test_a_step_is_adafactors() -> None:
    """Against Adam with section 3's second moment in float64, whole; equal up to the first moment's bfloat16.

    The columns' moments are those of the passes before.
    """
    layer = LatentLinear(quantized(bits=8), None, torch.float32)
    twin, mean = layer.latents.double(), torch.zeros(24, 64).double()
    by_row, by_column = torch.zeros(24, 1).double(), torch.zeros(1, 64).double()
    sizes = torch.logspace(-1, 0.5, 64)
    for step in range(1, 13):
        gradient = torch.randn(24, 64, generator=torch.Generator().manual_seed(step)) * sizes
        layer.pace(step, 0.05)
        for part in (slice(0, 16), slice(16, 32)):
            layer._learn(part, gradient[part])
        g = gradient.double() * layer.scales.double().repeat_interleave(32, 1)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * g
        by_row = BETAS[1] * by_row + (1 - BETAS[1]) * (g**2).mean(1, keepdim=True)
        if step > 1:
            second = by_row / (1 - BETAS[1] ** step) * (by_column / by_column.mean())
            twin -= (0.05 * (mean / (1 - BETAS[0] ** step)) / second.sqrt()).clamp(-0.5, 0.5)
        by_column = BETAS[1] * by_column + (1 - BETAS[1]) * (g**2).sum(0, keepdim=True)
        twin.clamp_(0, 255)
    assert (twin - quantized(bits=8).codes).abs().max() > 0.2
    assert torch.allclose(layer.latents.double(), twin, atol=0.01)
    assert torch.equal(layer.codes, layer.latents.round().to(torch.uint8))


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_the_size_of_gradients_does_not_matter_nor_when_they_begin(size: float) -> None:
    moved = []
    for first, factor in ((1, 1.0), (4, size)):
        layer = LatentLinear(quantized(bits=8), None, torch.float32)
        for step in range(1, 9 + first):
            layer.pace(step, 0.01)
            if step >= first:
                gradient = torch.randn(24, 64, generator=torch.Generator().manual_seed(step - first))
                layer._learn(slice(0, 24), factor * gradient)
        moved.append((layer.latents - quantized(bits=8).codes).square().mean().sqrt())
    assert 0.005 < moved[0] < 0.1
    assert moved[1] == pytest.approx(float(moved[0]), rel=0.5)


def test_gradients_that_are_not_numbers_show() -> None:
    """Nothing hides that training has failed."""
    layer = LatentLinear(quantized(bits=8), None, torch.float32)
    for step, gradient in enumerate((torch.randn(24, 64), torch.full((24, 64), torch.nan)), start=1):
        layer.pace(step, 0.01)
        layer._learn(slice(0, 24), gradient)
    assert layer.latents.isnan().all()


def test_latents_stay_on_the_grid_and_the_codes_given_stay_as_they_are() -> None:
    start = quantized(bits=2)
    before = start.codes.clone()
    layer = LatentLinear(start, None, torch.bfloat16)
    for step in range(1, 9):
        layer.pace(step, 1.0)
        layer._learn(slice(0, 24), torch.ones(24, 64))
    layer.refresh()
    assert torch.equal(start.codes, before)
    after = layer.quantized()
    downwards = (after.scales > 0).repeat_interleave(32, 1)
    assert torch.equal(after.codes, torch.where(downwards, 0, 3).to(torch.uint8))
    assert torch.equal(layer.weight, after.dequantize(torch.bfloat16))


def trained(family: str, tiny_model: Callable[..., Path], data: bool = False, **options: float) -> Distilled:
    folder = tiny_model(family)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    targets = [found[0] for found in head_inputs(original, rows(48).split(1))]
    model, weights = rounded_model(folder)
    return distill(
        model, weights, rows(48), list(next_tokens(rows(48))) if data else targets, tokens_per_step=256,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_codes_and_scales_together_come_closer_than_scales_alone(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    scales = trained(family, tiny_model, epochs=8, learning_rate=5e-3)
    both = trained(family, tiny_model, epochs=8, learning_rate=5e-3, latent_rate=0.03)
    assert both.before == scales.before
    assert both.after < scales.after < scales.before
    start = rounded_model(tiny_model(family))[1]
    moved = [(weight.codes != start[name].codes).float().mean() for name, weight in both.weights.items()]
    assert all(0 < part < 0.9 for part in moved)


def test_without_a_step_nothing_changes(tiny_model: Callable[..., Path]) -> None:
    done = trained("llama", tiny_model, learning_rate=0.0, latent_rate=0.0)
    start = rounded_model(tiny_model("llama"))[1]
    assert done.after == done.before
    for name, weight in done.weights.items():
        assert torch.equal(weight.codes, start[name].codes)
        assert torch.equal(weight.scales, start[name].scales)


def test_the_data_itself_is_learned(tiny_model: Callable[..., Path]) -> None:
    """The loss before training is transformers' own on the held-out rows."""
    done = trained("llama", tiny_model, data=True, epochs=8, latent_rate=0.03)
    model, _ = rounded_model(tiny_model("llama"))
    with torch.no_grad():
        held_out = rows(48)[45:]
        assert done.before == pytest.approx(float(model(input_ids=held_out, labels=held_out).loss), rel=1e-4)
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, NO_TARGET]]


def test_rounding_is_the_grids_own() -> None:
    start = quantized(symmetric=False)
    layer = LatentLinear(start, None, torch.float32)
    expected = grid.dequantize(start.codes, start.scales, start.zeros, start.scheme)
    assert torch.equal(layer.weight, expected.to(torch.bfloat16).float())
