"""The correction against a plain least-squares solver, and the two streams against the original model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme
from lowbit.algorithms import gptq, qronos
from lowbit.blocks import BlockQuantizer
from lowbit.formats import FORMATS
from lowbit.plan import make_plan
from lowbit.source import Source
from lowbit.stream import Stream
from tests.algorithms.examples import correlated_inputs, random_weight, second_moment

W4 = QuantScheme(4, 32)


def two_streams(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of the original and of a model that went astray before, `[tokens, 64]`."""
    original = correlated_inputs(64, seed)
    return original, original @ (torch.eye(64) + 0.05 * random_weight(64, 64, seed=7)) + 0.02


def correct(weight: Tensor, original: Tensor, seen: Tensor, damp: float = 0.1) -> tuple[Tensor, float]:
    """Corrected on some tokens, judged on others of the same kind."""
    other, other_seen = two_streams(seed=1)
    lacking = weight @ (original - seen).T @ seen / len(seen)
    held_out = other_seen, (other - other_seen) @ weight.T
    return qronos.correct(weight, second_moment(seen), lacking, held_out, damp)


def test_the_correction_is_the_ridge_solution() -> None:
    original, seen = two_streams()
    weight, hessian = random_weight(24, 64), second_moment(seen)
    found, factor = correct(weight, original, seen)

    strength = (0.1 * hessian.diagonal().mean() * len(seen)).sqrt()
    inputs = torch.cat([seen, strength * torch.eye(64)]).double()
    outputs = torch.cat([original @ weight.T, strength * weight.T]).double()
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    assert 0.8 < factor <= 1
    assert ((found.double() - weight) / factor - (expected - weight)).abs().max() < 1e-3


def test_rounding_the_corrected_weight_serves_the_original_better() -> None:
    original, seen = two_streams()
    weight, hessian = random_weight(24, 64), second_moment(seen)
    corrected, _ = correct(weight, original, seen, damp=0.01)

    def error(start: Tensor) -> float:
        rounded, _ = gptq.quantize_weight(start, hessian, W4, torch.bfloat16)
        return float((original @ weight.T - seen @ rounded.dequantize().T).square().mean())

    assert error(corrected) < 0.5 * error(weight)


def test_what_other_tokens_do_not_confirm_is_not_used() -> None:
    """Streams that part at random: fitted closely on few tokens, and worth nothing on others."""
    random = torch.Generator().manual_seed(0)
    seen, noise = torch.randn(2, 80, 64, generator=random)
    others, other_noise = torch.randn(2, 4000, 64, generator=random)
    weight = random_weight(24, 64)
    lacking, held_out = weight @ noise.T @ seen / len(seen), (others, other_noise @ weight.T)
    found, factor = qronos.correct(weight, second_moment(seen), lacking, held_out, damp=0.01)
    assert factor < 0.1
    assert (found - weight).norm() < 0.2 * weight.norm()


def test_the_same_inputs_leave_nothing_to_correct() -> None:
    inputs = correlated_inputs(64)
    weight, nothing = random_weight(24, 64), torch.zeros(24, 64)
    held_out = inputs, torch.zeros(len(inputs), 24)
    found, factor = qronos.correct(weight, second_moment(inputs), nothing, held_out)
    assert torch.equal(found, weight)
    assert factor == 0


def test_a_hessian_that_is_no_hessian_corrects_nothing() -> None:
    weight, held_out = random_weight(24, 64), (torch.ones(3, 64), torch.ones(3, 24))
    assert torch.equal(qronos.correct(weight, -torch.eye(64), weight, held_out)[0], weight)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_twins_carry_what_the_original_computes(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    source = Source(folder, torch.float32)
    plan = make_plan(source.model, W4, FORMATS["compressed-tensors"])
    source.load(source.keys_outside([plan.path]), torch.device("cpu"))
    calibration = list(torch.randint(3, 90, (4, 2, 24), generator=torch.Generator().manual_seed(0)))
    batches = [*calibration, calibration[0][:1], *calibration]
    stream = Stream(source.model, plan.blocks, batches)
    blocks = BlockQuantizer(
        source, plan, stream, "qronos", torch.bfloat16, torch.device("cpu"), lambda *told: None
    )
    layers = [layer for block in blocks for layer in block.layers]
    assert len({layer.name for layer in layers}) == len(layers) > 0

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    norm = original.model.norm
    for number, ids in enumerate(calibration):
        with torch.no_grad():
            expected = original.model(input_ids=ids).last_hidden_state
            twin, own = (norm(stream.hidden[i]) for i in (len(calibration) + 1 + number, number))
        assert torch.allclose(twin, expected, atol=1e-4)
        assert not torch.allclose(own, expected, atol=1e-3)
