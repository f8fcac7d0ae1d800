"""Random quantized weights on any grid."""

from __future__ import annotations

import torch

from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme


def random_weight(
    scheme: QuantScheme, shape: tuple[int, int], scale_dtype: torch.dtype, seed: int = 0
) -> QuantizedWeight:
    """Every code and every zero from 1 up occurs; half of the scales are negative."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    out_features, in_features = shape
    groups = (out_features, scheme.num_groups(in_features))
    codes = torch.randint(0, scheme.levels, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(groups, generator=generator) + 0.01
    scales *= torch.randint(0, 2, groups, generator=generator) * 2 - 1
    zeros = torch.randint(1, scheme.levels, groups, dtype=torch.uint8, generator=generator)
    if scheme.symmetric:
        zeros.fill_(scheme.middle)
    else:
        zeros[0, 0], zeros[-1, -1] = 1, scheme.levels - 1
    return QuantizedWeight(codes, scales.to(scale_dtype), zeros, scheme)


def assert_same(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Equal bit for bit, dtypes and memory layout included."""
    assert actual.scheme == expected.scheme
    for name in ("codes", "scales", "zeros"):
        left, right = getattr(actual, name), getattr(expected, name)
        assert left.dtype == right.dtype, name
        assert left.is_contiguous(), name
        assert torch.equal(left, right), name
