"""Round to nearest: the grid and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.algorithms import ALGORITHMS, rtn
from lowbit.scheme import QuantScheme
from tests.algorithms.examples import SCHEMES, correlated_inputs, random_weight, second_moment


def by_hand(group: Tensor, scheme: QuantScheme) -> tuple[float, int]:
    """Scale and zero of the min-max grid of one group; a zero is 1 at least, which leaves less above it."""
    if scheme.symmetric:
        outermost = group[group.abs().argmax()]
        return float((-outermost / 2 ** (scheme.bits - 1)).half()), 2 ** (scheme.bits - 1)
    low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    top = 2**scheme.bits - 1
    scale = float(torch.tensor(max((high - low) / top, high / (top - 1))).half())
    return scale, min(max(round(-low / scale), 1), top)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_is_nearest_on_the_min_max_grid(scheme: QuantScheme) -> None:
    weight = random_weight(7, 96)
    quantized, note = rtn.quantize_weight(weight, None, scheme, torch.float16)
    assert note == ""
    values, length = quantized.dequantize().double(), scheme.columns_per_group(96)
    for row in range(7):
        for start in range(0, 96, length):
            group = weight[row, start : start + length]
            scale, zero = by_hand(group, scheme)
            index = row, start // length
            assert (float(quantized.scales[index]), int(quantized.zeros[index])) == (scale, zero)
            every = (torch.arange(2**scheme.bits).double()[:, None] - zero) * scale
            nearest = (every - group.double()).abs().amin(0)
            found = values[row, start : start + length]
            assert torch.allclose((found - group.double()).abs(), nearest, rtol=0, atol=1e-6)


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
