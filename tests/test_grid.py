"""The grid against its definition: every code, tried one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit import grid
from lowbit.errors import LowbitError
from lowbit.scheme import SUPPORTED_BITS, QuantScheme

SCHEMES = [
    QuantScheme(bits, group, symmetric)
    for bits in SUPPORTED_BITS
    for group in (16, 32, -1)
    for symmetric in (True, False)
]
DTYPES = (torch.bfloat16, torch.float16)
schemes = st.sampled_from(SCHEMES)
dtypes = st.sampled_from(DTYPES)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Rows of every kind: ordinary, one-sided, with outliers, constant, zero, tiny."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(draw(st.integers(1, 5)), 32 * draw(st.integers(1, 3)))
    kind = draw(st.sampled_from(["normal", "positive", "negative", "outlier", "constant", "zero"]))
    if kind == "positive":
        values = values.abs()
    elif kind == "negative":
        values = -values.abs()
    elif kind == "outlier":
        values[:, 3] *= 100
    elif kind == "constant":
        values = torch.full_like(values, values[0, 0].item())
    elif kind == "zero":
        values = torch.zeros_like(values)
    return values * 10.0 ** draw(st.integers(-3, 2))


def spread(params: Tensor, weight: Tensor) -> Tensor:
    """One scale or zero per weight, written without the code under test."""
    return params.repeat_interleave(weight.shape[1] // params.shape[1], dim=1)


@settings(max_examples=80, deadline=None)
@given(weights(), schemes, dtypes)
def test_no_other_code_is_closer(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    scales, zeros = grid.find_params(weight, scheme, dtype)
    codes = grid.quantize(weight, scales, zeros, scheme)
    restored = grid.dequantize(codes, scales, zeros, scheme)
    steps = spread(scales, weight).double()
    every_code = torch.arange(scheme.levels).double()[:, None, None]
    every_value = (every_code - spread(zeros, weight).double()) * steps
    torch.testing.assert_close(
        restored.double(), every_value.gather(0, codes.long()[None])[0], rtol=0, atol=0
    )
    best = (every_value - weight.double()).abs().amin(0)
    # Two codes tie within float32's rounding of the quotient.
    assert ((restored.double() - weight).abs() <= best + 1e-4 * steps.abs()).all()


@settings(max_examples=80, deadline=None)
@given(weights(), schemes, dtypes)
def test_params_are_what_a_format_can_store(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    original = weight.clone()
    scales, zeros = grid.find_params(weight, scheme, dtype)
    assert scales.shape == zeros.shape == (len(weight), scheme.num_groups(weight.shape[1]))
    assert torch.equal(scales.to(dtype).float(), scales)
    assert (scales != 0).all()
    assert torch.isfinite(scales).all()
    assert torch.equal(zeros, zeros.round())
    lowest, highest = (scheme.middle, scheme.middle) if scheme.symmetric else (1, scheme.levels - 1)
    assert zeros.min() >= lowest
    assert zeros.max() <= highest
    assert torch.equal(weight, original)


@settings(max_examples=80, deadline=None)
@given(weights(), schemes, dtypes)
def test_error_is_bounded_by_the_step(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    scales, zeros = grid.find_params(weight, scheme, dtype)
    restored = grid.dequantize(grid.quantize(weight, scales, zeros, scheme), scales, zeros, scheme)
    steps = (restored - weight).abs() / spread(scales, weight).abs()
    # Half a step, and what the ends of the range lose to a scale rounded to 8 bits of mantissa. A
    # symmetric grid ends one code early on the side opposite to the outermost weight.
    lost_at_the_ends = scheme.levels * torch.finfo(dtype).eps / 2 + (0.5 if scheme.symmetric else 0)
    assert steps.max() <= 0.5 + lost_at_the_ends + 1e-3


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_grid_uses_its_outermost_code(bits: int, dtype: torch.dtype, sign: int) -> None:
    torch.manual_seed(0)
    scheme = QuantScheme(bits, 32)
    weight = torch.randn(200, 64).clamp(-2, 2)
    weight[:, 5] = weight[:, 40] = 3.0 * sign
    scales, zeros = grid.find_params(weight, scheme, dtype)
    codes = grid.quantize(weight, scales, zeros, scheme)
    assert (codes[:, [5, 40]] == 0).all()
    assert (scales.sign() == -sign).all()
    torch.testing.assert_close(scales.abs(), torch.full_like(scales, 3 / scheme.middle), rtol=0.005, atol=0)


def test_values_by_hand() -> None:
    weight = torch.tensor([[4.0, -3.9, 2.0, 1.0, 0.0, -1.0, -2.0, 3.0]])
    scales, zeros = grid.find_params(weight, QuantScheme(3, -1), torch.float16)
    assert (scales.item(), zeros.item()) == (-1.0, 4.0)
    codes = grid.quantize(weight, scales, zeros, QuantScheme(3, -1))
    assert codes.tolist() == [[0, 7, 2, 3, 4, 5, 6, 1]]

    positive = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0]])
    scales, zeros = grid.find_params(positive, QuantScheme(3, -1, False), torch.float16)
    assert (scales.item(), zeros.item()) == (1.0, 1.0)
    codes = grid.quantize(positive, scales, zeros, QuantScheme(3, -1, False))
    assert codes.tolist() == [[1, 2, 3, 4, 5, 6, 7, 7]]

    scales, zeros = grid.find_params(-positive, QuantScheme(3, -1, False), torch.float16)
    assert zeros.item() == 7.0


def test_scale_that_overflows_is_refused() -> None:
    weight = torch.full((1, 32), 1e6)
    with pytest.raises(LowbitError, match="bfloat16") as caught:
        grid.find_params(weight, QuantScheme(4, 32), torch.float16)
    assert "\n" not in str(caught.value)
    scales, _ = grid.find_params(weight, QuantScheme(4, 32), torch.bfloat16)
    assert scales.item() == pytest.approx(-1e6 / 8, rel=0.005)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 7] = value
    with pytest.raises(LowbitError):
        grid.find_params(weight, QuantScheme(4, 32, symmetric=False), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_too_small_to_store_becomes_the_smallest(dtype: torch.dtype) -> None:
    scales, zeros = grid.find_params(torch.full((1, 32), 1e-42), QuantScheme(4, 32, False), dtype)
    assert scales.item() == torch.finfo(dtype).tiny
    restored = grid.dequantize(
        torch.full((1, 32), int(zeros), dtype=torch.uint8), scales, zeros, QuantScheme(4, 32, False)
    )
    assert not restored.any()


def squares(errors: Tensor) -> Tensor:
    return errors.square().sum(-1)


@settings(max_examples=40, deadline=None)
@given(weights(), schemes, dtypes)
def test_search_is_never_worse_than_min_max(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    original = weight.clone()
    plain, found = grid.find_params(weight, scheme, dtype), grid.search_params(weight, scheme, dtype, squares)
    plain_error, found_error = (
        squares(
            grid.to_groups(
                grid.dequantize(grid.quantize(weight, *params, scheme), *params, scheme) - weight, scheme
            )
        )
        for params in (plain, found)
    )
    assert (found_error <= plain_error).all()
    assert torch.equal(found[0].to(dtype).float(), found[0])
    assert torch.equal(weight, original)


def test_search_finds_the_best_of_what_it_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(grid, "SEARCHED_AT_ONCE", 200)  # several slices of rows
    scheme, shrinks = QuantScheme(3, 32), (0.9, 0.7, 1.1)
    weight = torch.randn(9, 64)
    scales, zeros = grid.search_params(weight, scheme, torch.float16, squares, shrinks)
    errors = []
    for shrink in (1.0, *shrinks):
        params = grid.find_params(weight, scheme, torch.float16, shrink)
        restored = grid.dequantize(grid.quantize(weight, *params, scheme), *params, scheme)
        errors.append((weight - restored).unflatten(1, (2, 32)).square().sum(-1))
    restored = grid.dequantize(grid.quantize(weight, scales, zeros, scheme), scales, zeros, scheme)
    found = (weight - restored).unflatten(1, (2, 32)).square().sum(-1)
    torch.testing.assert_close(found, torch.stack(errors).amin(0))
    assert len(set(torch.stack(errors).argmin(0).flatten().tolist())) > 1
