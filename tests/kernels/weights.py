"""Random weights in the canonical layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Canonical(NamedTuple):
    packed: Tensor
    scales: Tensor
    zeros: Tensor


def make_weight(
    *shape: int,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = False,
) -> Canonical:
    """A weight `[..., out, in]` with scales of both signs; bits beyond the last code are 0."""
    *stack, in_features = shape
    groups = 1 if group_size == -1 else in_features // group_size
    packed = torch.randint(-(2**31), 2**31, (*stack, -(-in_features * bits // 32)), dtype=torch.int32)
    if spare := -in_features * bits % 32:
        packed[..., -1] &= (1 << 32 - spare) - 1
    sign = torch.randint(0, 2, (*stack, groups)) * 2 - 1
    scales = ((torch.rand(*stack, groups) * 0.02 + 0.005) * sign).to(scale_dtype)
    zeros = torch.randint(0, 2**bits, (*stack, groups), dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return Canonical(packed, scales, zeros)
