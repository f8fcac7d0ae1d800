"""GPTQ in a hurry: GPTQ all the same, and between rounding to nearest and the whole of it."""

from __future__ import annotations

import pytest
import torch

from lowbit import grid
from lowbit.algorithms import gptq, quick, rtn
from lowbit.scheme import QuantScheme
from tests.algorithms.examples import SCHEMES, correlated_inputs, output_error, random_weight, second_moment


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_lies_between_nearest_and_gptq(scheme: QuantScheme) -> None:
    weight, hessian = random_weight(64, 96), second_moment(correlated_inputs(96))
    nearest, whole, found = (
        output_error(rounded.dequantize(), weight, hessian)
        for module in (rtn, gptq, quick)
        for rounded, _ in [module.quantize_weight(weight, hessian, scheme, torch.bfloat16)]
    )
    assert whole < found < 0.9 * nearest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_white_inputs_leave_ranges_alone_to_choose(scheme: QuantScheme) -> None:
    weight = random_weight(9, 96)
    found, note = quick.quantize_weight(weight, torch.eye(96), scheme, torch.bfloat16)
    scales, zeros = grid.search_params(
        weight, scheme, torch.bfloat16, lambda errors: errors.square().sum(-1), quick.SHRINKS
    )
    assert note == ""
    assert torch.equal(found.scales.float(), scales)
    assert torch.equal(found.codes, grid.quantize(weight, scales, zeros, scheme))
