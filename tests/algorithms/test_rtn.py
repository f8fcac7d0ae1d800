"""Round to nearest: the grid and nothing else."""

from __future__ import annotations

import pytest
import torch

from lowbit import grid
from lowbit.algorithms import ALGORITHMS, rtn
from lowbit.scheme import QuantScheme
from tests.algorithms.examples import SCHEMES, correlated_inputs, random_weight, second_moment


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_is_nearest_on_the_min_max_grid(scheme: QuantScheme) -> None:
    weight = random_weight(7, 96)
    quantized, note = rtn.quantize_weight(weight, None, scheme, torch.float16)
    scales, zeros = grid.find_params(weight, scheme, torch.float16)
    assert note == ""
    assert torch.equal(quantized.codes, grid.quantize(weight, scales, zeros, scheme))
    assert torch.equal(quantized.dequantize(), grid.dequantize(quantized.codes, scales, zeros, scheme))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_every_algorithm_keeps_the_contract(name: str, scale_dtype: torch.dtype, scheme: QuantScheme) -> None:
    weight = random_weight(5, 96).to(torch.bfloat16)
    hessian = second_moment(correlated_inputs(96))
    before = weight.clone(), hessian.clone()
    quantized, note = ALGORITHMS[name].quantize_weight(weight, hessian, scheme, scale_dtype)
    assert note == ""
    assert (quantized.codes.dtype, quantized.zeros.dtype) == (torch.uint8, torch.uint8)
    assert quantized.scales.dtype == scale_dtype
    assert quantized.scheme == scheme
    assert int(quantized.codes.max()) < scheme.levels
    assert (quantized.scales != 0).all()
    assert quantized.zeros.min() >= 1
    if scheme.symmetric:
        assert (quantized.zeros == scheme.middle).all()
    for tensor in (quantized.codes, quantized.scales, quantized.zeros):
        assert tensor.is_contiguous()
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
