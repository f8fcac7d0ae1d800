"""Weights and inputs for the tests of algorithms, and the one number they are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.scheme import QuantScheme

SCHEMES = [
    QuantScheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (16, 32, -1)
    for symmetric in (True, False)
]


def correlated_inputs(columns: int, seed: int = 0, tokens: int = 2000) -> Tensor:
    """Inputs `[tokens, columns]` that share a few directions, with channels of very unequal size."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, columns // 4, generator=random) @ torch.randn(
        columns // 4, columns, generator=random
    )
    inputs = shared / (columns // 4) ** 0.5 + 0.5 * torch.randn(tokens, columns, generator=random)
    return inputs * torch.exp(torch.randn(columns, generator=random))


def second_moment(inputs: Tensor) -> Tensor:
    """The mean of `x x^T`, as calibration hands it over."""
    return inputs.T @ inputs / len(inputs)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed))


def output_error(restored: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T)` in float64."""
    errors = (restored - weight).double()
    return float(torch.einsum("oi,ij,oj->", errors, hessian.double(), errors))
