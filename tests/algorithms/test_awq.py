"""AWQ: both searches against brute force on their own objective, and against real activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit import grid
from lowbit.algorithms import awq, rtn
from lowbit.errors import LowbitError
from lowbit.moments import output_errors
from lowbit.scheme import QuantScheme
from tests.algorithms.examples import SCHEMES, correlated_inputs, output_error, random_weight, second_moment

W4 = QuantScheme(4, 32)


def outlier_inputs(columns: int = 96) -> Tensor:
    """A few channels fifty times larger than the rest, as in the inputs of language models."""
    inputs = torch.randn(2000, columns, generator=torch.Generator().manual_seed(7))
    inputs[:, [5, 40, 41, 90]] *= 50
    return inputs


def rounded(weight: Tensor, factors: Tensor | None, scheme: QuantScheme) -> Tensor:
    """What the model computes with once factors are folded in: `Q(W * s) / s`."""
    factors = torch.ones(weight.shape[1]) if factors is None else factors
    return rtn.quantize_weight(weight * factors, None, scheme, torch.bfloat16)[0].dequantize() / factors


@pytest.mark.parametrize("block_size", [1, 30, 96, 4096])
def test_output_error_is_the_trace(block_size: int) -> None:
    errors, hessian = random_weight(13, 96), second_moment(correlated_inputs(96))
    expected = output_error(errors, torch.zeros_like(errors), hessian)
    assert float(output_errors(errors, hessian, block_size).sum()) == pytest.approx(expected, rel=1e-5)


def test_output_error_is_the_mean_over_tokens() -> None:
    inputs, errors = correlated_inputs(96), random_weight(13, 96)
    seen = (inputs @ errors.T).square().sum(1).mean().item()
    assert float(output_errors(errors, second_moment(inputs)).sum()) == pytest.approx(seen, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["outliers", "correlated", "white"])
def test_channel_scales_are_never_worse_than_none(scheme: QuantScheme, kind: str) -> None:
    inputs = {"outliers": outlier_inputs(), "correlated": correlated_inputs(96), "white": torch.eye(96)}[kind]
    weights, hessian = [random_weight(8, 96, 1), random_weight(24, 96, 2)], second_moment(inputs)
    factors = awq.find_channel_scales(weights, hessian, scheme, torch.bfloat16)
    if factors is not None:
        after, before = (
            sum(output_error(rounded(weight, f, scheme), weight, hessian) for weight in weights)
            for f in (factors, None)
        )
        assert after < before
        assert torch.isfinite(factors).all()
        assert (factors > 0).all()
        assert (factors.max() * factors.min()).item() == pytest.approx(1, rel=1e-4)


def test_channel_scales_recover_what_outliers_cost() -> None:
    weight, hessian = random_weight(64, 96), second_moment(outlier_inputs())
    factors = awq.find_channel_scales([weight], hessian, W4, torch.bfloat16)
    assert factors is not None
    with_factors, without = (output_error(rounded(weight, f, W4), weight, hessian) for f in (factors, None))
    assert with_factors < 0.4 * without
    large = torch.zeros(96, dtype=torch.bool).index_fill_(0, torch.tensor([5, 40, 41, 90]), True)
    assert factors[large].min() > factors[~large].max()


def test_channel_scales_are_the_best_of_the_candidates() -> None:
    """Brute force over the formula, written out again."""
    weights, hessian = (
        [random_weight(24, 96, 1), 3 * random_weight(8, 96, 2)],
        second_moment(correlated_inputs(96)),
    )
    rms = hessian.diagonal().sqrt()
    stacked = torch.cat(weights).abs().unflatten(1, (-1, 32))
    magnitude = (stacked / stacked.amax(-1, keepdim=True)).flatten(1).mean(0)
    errors = []
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        factors = rms**alpha * magnitude ** (alpha - 1)
        factors = factors / (factors.max() * factors.min()) ** 0.5
        errors.append((sum(output_error(rounded(w, factors, W4), w, hessian) for w in weights), factors))
    error, expected = min(errors, key=lambda pair: pair[0])
    assert error < sum(output_error(rounded(w, None, W4), w, hessian) for w in weights)
    found = awq.find_channel_scales(weights, hessian, W4, torch.bfloat16, points=5)
    torch.testing.assert_close(found, expected)


def test_channel_scales_of_a_model_with_dead_and_zero_columns() -> None:
    inputs, weight = outlier_inputs(), random_weight(8, 96)
    inputs[:, [0, 33]] = 0
    weight[:, [1, 33]] = 0
    factors = awq.find_channel_scales([weight], second_moment(inputs), W4, torch.bfloat16)
    assert factors is not None
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_useless_hessian_gives_no_channel_scales(value: float) -> None:
    hessian = torch.full((96, 96), value)
    assert awq.find_channel_scales([random_weight(4, 96)], hessian, W4, torch.bfloat16) is None


def group_error(restored: Tensor, weight: Tensor, hessian: Tensor, width: int) -> Tensor:
    """`(w - q)_g H_gg (w - q)_g^T` of every group, `[out, groups]`, in float64."""
    errors = (restored - weight).double().unflatten(1, (-1, width))
    blocks = torch.stack(
        [hessian[i : i + width, i : i + width] for i in range(0, len(hessian), width)]
    ).double()
    return torch.einsum("ogi,gij,ogj->og", errors, blocks, errors)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_clipping_is_never_worse_than_min_max(scheme: QuantScheme) -> None:
    weight, hessian = random_weight(16, 96), second_moment(correlated_inputs(96))
    width = scheme.columns_per_group(96)
    clipped, _ = awq.quantize_weight(weight, hessian, scheme, torch.bfloat16)
    nearest, _ = rtn.quantize_weight(weight, None, scheme, torch.bfloat16)
    after, before = (group_error(q.dequantize(), weight, hessian, width) for q in (clipped, nearest))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum()


def test_clipping_takes_the_best_shrink_of_every_group() -> None:
    scheme, shrinks = QuantScheme(3, 32, symmetric=False), (0.9, 0.75, 0.6)
    weight, hessian = random_weight(16, 96), second_moment(correlated_inputs(96))
    tried = []
    for shrink in (1.0, *shrinks):
        params = grid.find_params(weight, scheme, torch.float16, shrink)
        restored = grid.dequantize(grid.quantize(weight, *params, scheme), *params, scheme)
        tried.append(group_error(restored, weight, hessian, 32))
    clipped, _ = awq.quantize_weight(weight, hessian, scheme, torch.float16, shrinks=shrinks)
    found = group_error(clipped.dequantize(), weight, hessian, 32)
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-4, atol=0)
    assert len(set(torch.stack(tried).argmin(0).flatten().tolist())) > 1


def test_clipping_beats_nearest_by_the_whole_output() -> None:
    weight, hessian = random_weight(32, 96), second_moment(correlated_inputs(96))
    for scheme in (QuantScheme(3, 32), QuantScheme(4, -1), QuantScheme(4, 32, symmetric=False)):
        clipped, _ = awq.quantize_weight(weight, hessian, scheme, torch.bfloat16)
        nearest, _ = rtn.quantize_weight(weight, None, scheme, torch.bfloat16)
        after, before = (output_error(q.dequantize(), weight, hessian) for q in (clipped, nearest))
        assert after < 0.85 * before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_useless_hessian_falls_back_and_says_so(value: float) -> None:
    weight, hessian = random_weight(4, 96), torch.eye(96)
    hessian[3, 4] = value
    quantized, note = awq.quantize_weight(weight, hessian, W4, torch.bfloat16)
    nearest, _ = rtn.quantize_weight(weight, None, W4, torch.bfloat16)
    assert "not finite" in note
    assert torch.equal(quantized.codes, nearest.codes)


def test_no_calibration_token_falls_back_and_says_so() -> None:
    quantized, note = awq.quantize_weight(random_weight(4, 96), torch.zeros(96, 96), W4, torch.bfloat16)
    nearest, _ = rtn.quantize_weight(random_weight(4, 96), None, W4, torch.bfloat16)
    assert "no calibration token" in note
    assert torch.equal(quantized.codes, nearest.codes)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_constant_weight(scheme: QuantScheme, value: float) -> None:
    weight, hessian = torch.full((4, 96), value), second_moment(correlated_inputs(96))
    quantized, note = awq.quantize_weight(weight, hessian, scheme, torch.bfloat16)
    assert note == ""
    assert output_error(quantized.dequantize(), weight, hessian) <= 1e-3 * output_error(
        0 * weight, weight, hessian
    )


def test_asks_for_what_it_needs() -> None:
    with pytest.raises(LowbitError, match="hessian"):
        awq.quantize_weight(random_weight(4, 64), None, W4, torch.bfloat16)
