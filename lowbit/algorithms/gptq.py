"""GPTQ: round one column at a time, let the columns still to come make up for the error.

The algorithm is that of Frantar et al. 2022 (arXiv:2210.17323, Algorithm 1), computed in the form
that Chee et al. 2023 (QuIP, arXiv:2307.13304, section 3 and theorem 6) showed to give the same
numbers: with the columns in the order of rounding and `H = U D U^T`, U unit upper triangular,

    q_k = round(w_k + sum_{i<k} (w_i - q_i) U_ik)

One Cholesky factorisation replaces Cholesky, inverse and Cholesky again: a third of the work, one
matrix less in memory, and no inverse of a matrix that is nearly singular by nature.

Memory runs along a column: everything is held transposed, `[in, out]`, so that the sum over the
earlier columns is one matrix-vector product over contiguous rows inside a block and one matrix
product per block for all that came before it. The block size moves work between the two and
changes nothing else. Rows never meet: weights that share an input may be stacked and split after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import grid
from lowbit.algorithms import rtn
from lowbit.errors import LowbitError
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

NEEDS_HESSIAN = True


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
    static_groups: bool = True,
) -> tuple[QuantizedWeight, str]:
    """Round `weight` so that the error of its output, not its own, is small.

    Args:
        weight: float `[out, in]`.
        hessian: float32 `[in, in]`, mean of `x x^T`.
        scheme: The grid.
        scale_dtype: dtype in which the format stores scales.
        damp: Added to the diagonal, relative to its mean; ten times more while Cholesky fails, up to 1.
        block_size: Columns per matrix product; speed only.
        act_order: Round the columns of the largest inputs first. Costs nothing at run time: groups
            stay runs of neighbouring columns.
        static_groups: Find every scale from the original weight. Otherwise groups are rounded one
            after the other and each finds its scales when its turn comes, from weights that already
            carry the corrections of the groups before it.

    Returns:
        The quantized weight, and a note if the damping was raised or the weight was rounded to
        nearest because its Hessian is of no use.

    Raises:
        LowbitError: no Hessian, a group size that does not divide `in`, a scale that overflows.
    """
    if hessian is None:
        raise LowbitError("gptq needs calibration data: give it a hessian, or use rtn")
    group = scheme.columns_per_group(weight.shape[1])
    order = _rounding_order(hessian.diagonal(), act_order, None if static_groups else group)
    feedback, note = _feedback(hessian, order, damp)
    if feedback is None:
        return rtn.quantize_weight(weight, None, scheme, scale_dtype)[0], note

    scales, zeros = (p.T.contiguous() for p in grid.find_params(weight, scheme, scale_dtype))
    columns = weight.T.float()[order]
    errors = torch.zeros_like(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    span = len(order) if static_groups else group
    for first in range(0, len(order), span):
        if not static_groups:
            current = torch.addmm(
                columns[first : first + span], feedback[first : first + span, :first], errors[:first]
            )
            at = order[first] // group
            for found, where in zip(grid.find_params(current.T, scheme, scale_dtype), (scales, zeros), strict=True):
                where[at] = found[:, 0]
        for start in range(first, first + span, block_size):
            stop = min(start + block_size, first + span)
            block = torch.addmm(columns[start:stop], feedback[start:stop, :start], errors[:start])
            for k, g in zip(range(start, stop), (order[start:stop] // group).tolist(), strict=True):
                column = block[k - start].addmv_(errors[start:k].T, feedback[k, start:k])
                rounded = grid.nearest_codes(column, scales[g], zeros[g], scheme)
                codes[k] = rounded
                torch.sub(columns[k], rounded.sub_(zeros[g]).mul_(scales[g]), out=errors[k])
    codes = torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()
    return QuantizedWeight(
        codes, scales.T.contiguous().to(scale_dtype), zeros.T.contiguous().to(torch.uint8), scheme
    ), note


def _rounding_order(importance: Tensor, act_order: bool, group: int | None) -> Tensor:
    """Columns in the order of rounding, `[in]`; `group` keeps the columns of a group together."""
    if not act_order:
        return torch.arange(len(importance), device=importance.device)
    if group is None:
        return importance.argsort(descending=True, stable=True)
    grouped = importance.unflatten(0, (-1, group))
    groups = grouped.mean(1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=importance.device)[:, None] * group)[groups].flatten()


def _feedback(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor | None, str]:
    """How much of the error of column i is taken over by column k: `[in, in]`, row k, in `order`.

    None where no damping makes the Hessian positive definite; the note says so.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        return None, "the Hessian is not finite: rounded to nearest"
    alive = diagonal > 0
    if not alive.any():
        return None, "no calibration token reached this weight: rounded to nearest"
    mean = diagonal[alive].mean()

    backwards = order.flip(0)
    ordered = hessian.float().index_select(0, backwards).index_select(1, backwards)
    # An input that is always zero has a row of zeros: its weight is rounded as it stands.
    clean = torch.where(alive, diagonal, mean)[backwards]
    strength = damp
    while strength <= max(damp, 1.0):
        ordered.diagonal().copy_(clean + strength * mean)
        lower, info = torch.linalg.cholesky_ex(ordered)
        if not info.any() and torch.isfinite(lower.diagonal()).all():
            # Forwards again: H = R R^T with R upper triangular, and U = R / diag(R).
            feedback = lower.T.flip(0, 1)
            feedback /= feedback.diagonal().clone()[:, None]
            return feedback, "" if strength == damp else f"damping raised from {damp:g} to {strength:g}"
        strength = 10 * strength
    return None, "the Hessian is not positive definite: rounded to nearest"
