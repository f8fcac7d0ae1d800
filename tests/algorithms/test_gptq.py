"""GPTQ against the textbook: explicit inverse, one column at a time, float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit import grid
from lowbit.algorithms import gptq, rtn
from lowbit.errors import LowbitError
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme
from tests.algorithms.examples import SCHEMES, correlated_inputs, output_error, random_weight, second_moment

W4 = QuantScheme(4, 32)


def textbook(
    weight: Tensor, hessian: Tensor, damp: float, trust: float, order: list[int], params: QuantizedWeight
) -> Tensor:
    """OBQ in a fixed order (Frantar et al. 2022, equations 2 and 3): the weight as it will be loaded."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    own = hessian.diagonal()
    hessian = trust * hessian + torch.diag((1 - trust) * own + damp * own.mean())
    inverse = torch.linalg.inv(hessian)
    width = params.scheme.columns_per_group(len(hessian))
    for k in order:
        scale, zero = params.scales[:, k // width].double(), params.zeros[:, k // width].double()
        codes = torch.clamp(torch.round(weight[:, k] / scale) + zero, 0, params.scheme.levels - 1)
        error = (weight[:, k] - (codes - zero) * scale) / inverse[k, k]
        weight -= error[:, None] * inverse[k][None, :]
        inverse -= inverse[:, k : k + 1] @ inverse[k : k + 1] / inverse[k, k]
    return weight


def rows_that_agree(a: Tensor, b: Tensor) -> float:
    """Share of the rows that are the same all along: one tie broken otherwise changes all that follows."""
    return (a.double() - b.double()).abs().amax(1).lt(1e-3).double().mean().item()


@pytest.mark.parametrize("trust", [1.0, 0.7])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_textbook(scheme: QuantScheme, act_order: bool, trust: float) -> None:
    weight, hessian = random_weight(64, 96), second_moment(correlated_inputs(96))
    quantized, note = gptq.quantize_weight(
        weight, hessian, scheme, torch.bfloat16, damp=0.05, trust=trust, act_order=act_order, rounds=0,
        block_size=40,
    )  # fmt: skip
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(96))
    expected = textbook(weight, hessian, 0.05, trust, order, quantized)
    assert note == ""
    assert rows_that_agree(quantized.dequantize(), expected) >= 0.9
    assert output_error(quantized.dequantize(), weight, hessian) == pytest.approx(
        output_error(expected, weight, hessian), rel=0.02
    )


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_white_inputs_leave_nothing_to_compensate(scheme: QuantScheme, act_order: bool) -> None:
    weight, identity = random_weight(9, 96), torch.eye(96)
    nearest, _ = rtn.quantize_weight(weight, None, scheme, torch.bfloat16)
    plain, _ = gptq.quantize_weight(
        weight, identity, scheme, torch.bfloat16, act_order=act_order, shrinks=(), again=False, rounds=0
    )
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(plain, name), getattr(nearest, name))

    searched, _ = gptq.quantize_weight(
        weight, identity, scheme, torch.bfloat16, act_order=act_order, rounds=0
    )
    scales, zeros = grid.search_params(
        weight, scheme, torch.bfloat16, lambda errors: errors.square().sum(-1), beside=1
    )
    assert torch.equal(searched.scales.float(), scales)
    assert torch.equal(searched.codes, grid.quantize(weight, scales, zeros, scheme))


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 32), QuantScheme(3, 64, False), QuantScheme(2, -1)], ids=str
)
@pytest.mark.parametrize("act_order", [True, False])
def test_block_size_changes_nothing(scheme: QuantScheme, act_order: bool) -> None:
    weight, hessian = random_weight(60, 192), second_moment(correlated_inputs(192))
    warnings.simplefilter("error")  # 192 columns are not too many for the kernel
    results = [
        gptq.quantize_weight(
            weight, hessian, scheme, torch.bfloat16, act_order=act_order, rounds=0, block_size=size
        )[0]
        for size in (1, 7, 32, 100, 5000)
    ]
    for other in results[1:]:
        assert torch.equal(other.scales, results[0].scales)
        assert rows_that_agree(other.dequantize(), results[0].dequantize()) >= 0.9


def test_rows_do_not_meet() -> None:
    """Weights that share an input are stacked, quantized once and split."""
    hessian = second_moment(correlated_inputs(128))
    parts = [random_weight(rows, 128, seed) for seed, rows in enumerate((16, 40, 8))]
    stacked, _ = gptq.quantize_weight(torch.cat(parts), hessian, W4, torch.bfloat16, rounds=0)
    for part, together in zip(parts, stacked.split_rows([16, 40, 8]), strict=True):
        alone, _ = gptq.quantize_weight(part, hessian, W4, torch.bfloat16, rounds=0)
        assert torch.equal(alone.scales, together.scales)
        assert rows_that_agree(alone.dequantize(), together.dequantize()) >= 0.85


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_beats_nearest_on_correlated_inputs(scheme: QuantScheme, act_order: bool) -> None:
    weight, hessian = random_weight(32, 192), second_moment(correlated_inputs(192))
    nearest, _ = rtn.quantize_weight(weight, None, scheme, torch.bfloat16)
    quantized, _ = gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16, act_order=act_order)
    error, floor = (output_error(q.dequantize(), weight, hessian) for q in (quantized, nearest))
    assert error < 0.6 * floor


def test_search_and_order_pay() -> None:
    """On the tokens of calibration and on others alike."""
    weight, seen = random_weight(64, 192), correlated_inputs(192, tokens=4000)
    calibration, held_out = second_moment(seen[:2000]), second_moment(seen[2000:])
    for hessian in (calibration, held_out):
        errors = [
            output_error(
                gptq.quantize_weight(weight, calibration, QuantScheme(3, 64), torch.bfloat16, **options)[
                    0
                ].dequantize(),
                weight,
                hessian,
            )
            for options in ({"act_order": False, "shrinks": ()}, {"shrinks": ()}, {})
        ]
        assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_ranges_are_chosen_again_for_what_is_rounded(scheme: QuantScheme) -> None:
    """The codes are the nearest ones of what the search was given; and it pays, with zeros above all."""
    weight, hessian = random_weight(64, 192), second_moment(correlated_inputs(192))
    given: list[Tensor] = []
    search = grid.search_params

    def watched(weight: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        given.append(weight)
        return search(weight, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "search_params", watched)
        patch.setattr(gptq, "COARSE", 1)
        once, twice = (
            gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16, again=again, rounds=0)[0]
            for again in (False, True)
        )
    assert given[1] is given[0] is weight
    again = grid.quantize(given[2], once.scales, once.zeros, scheme)
    assert (again == once.codes).double().mean() > 0.999
    first, second = (output_error(q.dequantize(), weight, hessian) for q in (once, twice))
    grouped = scheme.group_size > 0 and not scheme.symmetric and scheme.bits < 8
    assert second < (0.99 if grouped else 1.03) * first


def test_dead_column_is_rounded_as_it_stands() -> None:
    inputs = correlated_inputs(96)
    inputs[:, [3, 50]] = 0
    weight, hessian = random_weight(8, 96), second_moment(inputs)
    assert (hessian.diagonal() == 0).sum() == 2
    quantized, note = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16)
    assert note == ""
    at_rest = grid.quantize(weight, quantized.scales.float(), quantized.zeros.float(), W4)
    assert torch.equal(quantized.codes[:, [3, 50]], at_rest[:, [3, 50]])

    # It has no say in anything else: the other columns are as if it did not exist.
    weight[:, [3, 50]] = 0
    again, _ = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16, shrinks=())
    weight[:, [3, 50]] = 0.01
    nudged, _ = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16, shrinks=())
    others = [k for k in range(96) if k not in (3, 50)]
    assert torch.equal(again.codes[:, others], nudged.codes[:, others])


def test_group_of_dead_columns() -> None:
    inputs = correlated_inputs(96)
    inputs[:, :32] = 0
    weight = random_weight(8, 96)
    quantized, _ = gptq.quantize_weight(weight, second_moment(inputs), W4, torch.bfloat16)
    nearest, _ = rtn.quantize_weight(weight, None, W4, torch.bfloat16)
    assert torch.equal(quantized.codes[:, :32], nearest.codes[:, :32])


def test_fewer_tokens_than_columns() -> None:
    weight, hessian = random_weight(16, 128), second_moment(correlated_inputs(128, tokens=20))
    quantized, note = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16)
    nearest, _ = rtn.quantize_weight(weight, None, W4, torch.bfloat16)
    assert note == ""
    assert output_error(quantized.dequantize(), weight, hessian) < output_error(
        nearest.dequantize(), weight, hessian
    )


def test_raised_damping_is_reported() -> None:
    """Two inputs that are one input, no damping: singular."""
    inputs = correlated_inputs(64)
    inputs[:, 32:] = inputs[:, :32]
    hessian = second_moment(inputs)
    hessian.diagonal().mul_(0.995)  # as rounding errors would, a little indefinite
    weight = random_weight(8, 64)
    quantized, note = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16, damp=0.0, trust=1.0)
    assert note.startswith("damping raised from 0 to 0.")
    assert torch.isfinite(quantized.dequantize()).all()


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.full((64, 64), float("nan")), "not finite"),
        (
            torch.eye(64).index_put((torch.tensor(5), torch.tensor(9)), torch.tensor(float("inf"))),
            "not finite",
        ),
        (torch.ones(64, 64) - 3 * torch.eye(64), "no calibration token"),
        (3 * torch.ones(64, 64) - 2 * torch.eye(64) - 8 * torch.eye(64).flip(0), "not positive definite"),
        (torch.zeros(64, 64), "no calibration token"),
    ],
    ids=["nan", "inf", "negative", "indefinite", "zero"],
)
def test_useless_hessian_falls_back_and_says_so(hessian: Tensor, reason: str) -> None:
    weight = random_weight(8, 64)
    quantized, note = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16)
    nearest, _ = rtn.quantize_weight(weight, None, W4, torch.bfloat16)
    assert reason in note
    assert "rounded to nearest" in note
    assert torch.equal(quantized.codes, nearest.codes)
    assert torch.equal(quantized.scales, nearest.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
def test_constant_weight(scheme: QuantScheme, value: float) -> None:
    weight, hessian = torch.full((4, 96), value), second_moment(correlated_inputs(96))
    quantized, _ = gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16)
    assert torch.isfinite(quantized.dequantize()).all()
    assert output_error(quantized.dequantize(), weight, hessian) <= 1e-3 * output_error(
        0 * weight, weight, hessian
    )


def test_scale_of_hessian_does_not_matter() -> None:
    weight, hessian = random_weight(8, 64), second_moment(correlated_inputs(64))
    one, _ = gptq.quantize_weight(weight, hessian, W4, torch.bfloat16)
    for power in (2.0**-40, 2.0**40):
        other, _ = gptq.quantize_weight(weight, hessian * power, W4, torch.bfloat16)
        assert torch.equal(one.codes, other.codes)


def test_asks_for_what_it_needs() -> None:
    with pytest.raises(LowbitError, match="hessian"):
        gptq.quantize_weight(random_weight(4, 64), None, W4, torch.bfloat16)
    with pytest.raises(LowbitError, match="does not divide"):
        gptq.quantize_weight(random_weight(4, 48), torch.eye(48), W4, torch.bfloat16)


def test_a_little_distrust_pays_on_text_of_another_kind() -> None:
    """Both texts have the same channels; half of what goes together in one does not in the other."""
    weight, generator = random_weight(64, 192), torch.Generator().manual_seed(5)
    shared, own, foreign = (torch.randn(24, 192, generator=generator) for _ in range(3))
    drawn = torch.randn(2, 4000, 48, generator=generator)
    noise = 0.3 * torch.randn(2, 4000, 192, generator=generator)
    seen = second_moment(drawn[0] @ torch.cat([shared, own]) + noise[0])
    other = second_moment(drawn[1] @ torch.cat([shared, foreign]) + noise[1])
    wary, trusting = (
        gptq.quantize_weight(weight, seen, W4, torch.bfloat16, trust=trust)[0].dequantize()
        for trust in (gptq.TRUST, 1.0)
    )
    assert output_error(wary, weight, other) < 0.95 * output_error(trusting, weight, other)
    assert output_error(wary, weight, seen) < 1.5 * output_error(trusting, weight, seen)
