"""Coordinate descent against the same steps in float64, one column and one group at a time."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import descent, gptq
from lowbit.algorithms.descent import descend
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme
from tests.algorithms.examples import SCHEMES, correlated_inputs, output_error, random_weight, second_moment

RIDGE = 0.01


def start(scheme: QuantScheme, rows: int = 48, columns: int = 192) -> tuple[Tensor, Tensor, QuantizedWeight]:
    """A weight, a Hessian, and what plain GPTQ makes of them."""
    weight, hessian = random_weight(rows, columns), second_moment(correlated_inputs(columns))
    return weight, hessian, gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16, rounds=0)[0]


def damped(hessian: Tensor, trust: float = 1.0) -> Tensor:
    own = hessian.diagonal().double()
    return trust * hessian.double() + torch.diag((1 - trust) * own + RIDGE)


def textbook(weight: Tensor, curve: Tensor, rounded: QuantizedWeight) -> Tensor:
    """Codes, scales, codes: every step looks at the whole error."""
    scheme = rounded.scheme
    width = scheme.columns_per_group(weight.shape[1])
    weight = weight.double()
    levels = rounded.codes.double() - rounded.zeros.double().repeat_interleave(width, 1)
    scales = rounded.scales.double()

    def error() -> Tensor:
        return weight - levels * scales.repeat_interleave(width, 1)

    def choose_codes() -> None:
        for k in range(weight.shape[1]):
            scale, zero = scales[:, k // width], rounded.zeros[:, k // width].double()
            wanted = levels[:, k] * scale + (error() @ curve[:, k]) / curve[k, k]
            levels[:, k] = (wanted / scale).round().add(zero).clamp(0, scheme.levels - 1) - zero

    choose_codes()
    for group in range(scales.shape[1]):
        part = torch.zeros_like(levels)
        part[:, group * width : (group + 1) * width] = levels[:, group * width : (group + 1) * width]
        step = ((error() @ curve) * part).sum(1) / ((part @ curve) * part).sum(1)
        scales[:, group] = (scales[:, group] + step).to(rounded.scales.dtype).double()
    choose_codes()
    return levels * scales.repeat_interleave(width, 1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """All digits of float32, also on a CPU whose matrix units would multiply in bfloat16."""
    monkeypatch.setattr(descent, "bfloat16_products", nullcontext)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("trust", [1.0, 0.7])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_textbook(scheme: QuantScheme, trust: float) -> None:
    weight, hessian, rounded = start(scheme)
    found = descend(weight, hessian, rounded, ridge=RIDGE, trust=trust, rounds=1, block_size=40).dequantize()
    expected = textbook(weight, damped(hessian, trust), rounded)
    assert (found.double() - expected).abs().lt(1e-3).double().mean() > 0.9


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_few_digits_are_enough(scheme: QuantScheme) -> None:
    weight, hessian, rounded = start(scheme)
    found = descend(weight, hessian, rounded, ridge=RIDGE, rounds=1).dequantize()
    expected = textbook(weight, damped(hessian), rounded)
    assert output_error(found, weight, damped(hessian)) == pytest.approx(
        output_error(expected, weight, damped(hessian)), rel=0.02
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_falls(scheme: QuantScheme) -> None:
    weight, hessian, rounded = start(scheme)
    errors = [output_error(rounded.dequantize(), weight, damped(hessian))]
    for rounds in range(3):
        found = descend(weight, hessian, rounded, ridge=RIDGE, rounds=rounds)
        errors.append(output_error(found.dequantize(), weight, damped(hessian)))
    assert errors[1] < errors[0]
    for before, after in pairwise(errors[1:]):
        assert after < 1.005 * before


@pytest.mark.usefixtures("exact")
def test_no_single_code_is_left_to_better() -> None:
    """With scales as they are: what coordinate descent ends at."""
    weight, hessian, rounded = start(QuantScheme(3, 32))
    curve = damped(hessian)
    for _ in range(12):
        rounded = descend(weight, hessian, rounded, ridge=RIDGE, rounds=0)
    error = weight.double() - rounded.dequantize().double()
    step = rounded.scales.double().abs().repeat_interleave(32, 1)
    # Moving a code by one step changes the error by step^2 H_kk - 2 step |slope|, and never for the better.
    slope, inside = (error @ curve).abs(), (rounded.codes > 0) & (rounded.codes < 7)
    gain = 2 * step * slope - step.square() * curve.diagonal()
    assert (gain[inside] < 1e-2 * (step.square() * curve.diagonal())[inside]).double().mean() > 0.999


def test_it_pays_on_other_tokens() -> None:
    weight, tokens = random_weight(64, 192), correlated_inputs(192, tokens=4000)
    seen, other = second_moment(tokens[:2000]), second_moment(tokens[2000:])
    errors = [
        output_error(
            gptq.quantize_weight(weight, seen, QuantScheme(3, 64), torch.bfloat16, rounds=rounds)[
                0
            ].dequantize(),
            weight,
            other,
        )
        for rounds in (0, 1, 2)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_dead_columns_have_no_say_in_a_scale() -> None:
    tokens = correlated_inputs(96)
    tokens[:, :40] = 0
    weight, hessian = random_weight(8, 96), second_moment(tokens)
    scheme = QuantScheme(4, 32)
    rounded, _ = gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16, rounds=0)
    found = descend(weight, hessian, rounded, ridge=RIDGE)
    assert torch.equal(found.scales[:, 0], rounded.scales[:, 0])
    assert torch.equal(found.codes[:, :32], rounded.codes[:, :32])
    assert not torch.equal(found.scales[:, 1], rounded.scales[:, 1])
