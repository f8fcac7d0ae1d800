"""Qronos: make up for what went wrong before a layer, then round it as GPTQ does.

A layer of the quantized model does not read what the original's layer read: the layers before it have
been rounded. Holding on to the original weight hands their error on; there is a better weight for the
inputs that the layer really gets. With X the original's inputs, x the quantized model's, and W the
weight, the least-squares problem

    min_V  E |W X - V x|^2 + damp * |V - W|^2

has the solution

    V = W + D,    D = L (H + damp)^-1,    H = E[x x^T],    L = E[W (X - x) x^T],

and V is rounded in place of W. This is the correction that Qronos (Zhang et al. 2025,
arXiv:2505.11695, section 3) interleaves with its rounding, written for all columns at once: rounding V
by GPTQ with the same H minimises the same error.

Where the output of the layer is added to a sum that is carried on, R in the original and r here, the
layer can mend the sum as well: `W X + R` is wanted of `V x + r`, and only L changes, to
`E[(W (X - x) + R - r) x^T]`. Qronos knows no such term; with it, an error need not be carried to the
end of the model.

D is fitted to the calibration tokens, and through many layers it fits them better than any others:
the further down a model, the smaller the part of D that other tokens confirm. So some tokens are kept
out of C, and D is scaled by the factor in 0 ... 1 that serves those tokens best.

All this holds only if x is what the layer will get, so every layer is rounded before the next one is
observed. Two layers that both repair one and the same error make it worse than it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms import gptq

NEEDS_HESSIAN = True
DAMP = 0.5
"""Much of it: what the calibration text alone asks for is not asked for by text of another kind."""

quantize_weight = gptq.quantize_weight


def correct(
    weight: Tensor, hessian: Tensor, lacking: Tensor, held_out: tuple[Tensor, Tensor], damp: float = DAMP
) -> tuple[Tensor, float]:
    """The weight to round in place of `weight`.

    Args:
        weight: float `[out, in]`; not mutated.
        hessian: float32 `[in, in]`, the mean of `x x^T`.
        lacking: float32 `[out, in]`, the mean of `g x^T`, g being what the output lacks.
        held_out: `x [tokens, in]` and `g [tokens, out]` of tokens that are not in `lacking`.
        damp: How dear it is to leave `weight`, relative to the mean of the Hessian's diagonal.

    Returns:
        The weight, float32 `[out, in]`, and the factor on its correction; `weight` itself and 0 where
        no correction can be computed.
    """
    weight = weight.float()
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return weight, 0.0
    correction = torch.cholesky_solve(lacking.T, lower).T
    del lower, damped
    factor = _confirmed(correction, held_out)
    return (weight.add(correction, alpha=factor), factor) if factor > 0 else (weight, 0.0)


def _confirmed(correction: Tensor, held_out: tuple[Tensor, Tensor]) -> float:
    """`f` in 0 ... 1 for which `f D x` comes closest to `g`."""
    x, wanted = held_out
    given = x.float() @ correction.T
    size = float(given.square().sum())
    factor = float((wanted.float() * given).sum()) / size if size > 0 else 0.0
    return min(factor, 1.0) if factor > 0 else 0.0  # not a number is not above 0
