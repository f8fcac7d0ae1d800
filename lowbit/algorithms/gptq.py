"""GPTQ: round one column at a time, let the columns still to come make up for the error.

The algorithm is that of Frantar et al. 2022 (arXiv:2210.17323, Algorithm 1), computed in the form
that Chee et al. 2023 (QuIP, arXiv:2307.13304) call LDLQ and showed to give the same
numbers. With the columns in the order of rounding and `H = U D U^T`, U unit upper triangular and D
diagonal,

    q_k = round(w_k + sum_{i<k} (w_i - q_i) U_ik)
    error of the output = sum_k D_k (q_k - what was rounded)^2

The first line takes one Cholesky factorisation where the usual form takes Cholesky, inverse and
Cholesky again: a fraction of the work, a matrix less in memory, and no inverse of a matrix that is
nearly singular by nature. The second says what a good scale is: errors in different columns do not
interact any more, so every group can look for the scale that makes its own sum of D_k e_k^2 small.

Memory runs along a column: everything is held transposed, `[in, out]`, so that the sum over the
earlier columns is one matrix-vector product over contiguous rows inside a block and one matrix
product per block for all that came before it. The block size moves work between the two and
changes nothing else. Rows never meet: weights that share an input may be stacked and split after.

Text of another kind than the calibration's has other Hessians. How large a channel is changes less than
which channels go together, and an error that is moved to where the calibration text has no activations is
paid for where other text has some. So H is taken for what other text may have: its off-diagonal entries are
scaled down, as Ledoit and Wolf (2004, J. Multivariate Analysis 88) shrink a covariance for the sake of few
samples, and a tenth of the mean is added to its diagonal. On the calibration's own kind of text that costs
next to nothing.

A range serves what will be rounded in it, which is not the weight: earlier columns have moved it. So ranges
are chosen, coarsely, for the weight, and once more, with the zeros beside, for what a first pass made of it.

What comes out is gone over again by coordinate descent (`descent.py`), which GPTQ's one pass leaves room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import grid
from lowbit.algorithms import columns, descent, rtn
from lowbit.errors import LowbitError
from lowbit.moments import is_finite
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

NEEDS_HESSIAN = True
DAMP = 0.1
TRUST = 0.8
"""Of how two channels go together in the calibration text so much is believed of other text."""
COARSE = 4
"""One in so many ranges is tried where they will be chosen again."""
LEAST_LEFT = 0.1
"""Residuals are corrected by no more than ten times, however few the tokens."""


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    *,
    damp: float = DAMP,
    trust: float = TRUST,
    act_order: bool = True,
    shrinks: tuple[float, ...] = grid.SHRINKS,
    again: bool = True,
    rounds: int = 2,
    block_size: int = 128,
) -> tuple[QuantizedWeight, str]:
    """Round `weight` so that the error of its output, not its own, is small.

    Args:
        weight: float `[out, in]`.
        hessian: float32 `[in, in]`, mean of `x x^T`.
        scheme: The grid.
        scale_dtype: dtype in which the format stores scales.
        damp: Added to the diagonal, relative to its mean; up to 1 where Cholesky fails with less.
        trust: Factor on what lies off the Hessian's diagonal.
        act_order: Round the columns with the largest inputs first. Groups stay runs of neighbouring
            columns whatever the order, so that nothing is paid at run time.
        shrinks: Factors on a group's range, tried besides 1 when its scale is searched.
        again: Choose ranges a second time, for the weight as the first pass over the columns moved it.
        rounds: How often scales are fitted to the codes, and codes chosen again (`descent.py`); 0: never.
        block_size: Columns per matrix product; speed only.

    Returns:
        The quantized weight, and a note if the damping was raised or the weight was rounded to
        nearest because its Hessian is of no use.

    Raises:
        LowbitError: no Hessian, a group size that does not divide `in`, a scale that overflows.
    """
    if hessian is None:
        raise LowbitError("gptq needs calibration data: pass a hessian, or use rtn")
    importance = hessian.diagonal()
    if act_order:
        order = importance.argsort(descending=True, stable=True)
    else:
        order = torch.arange(len(importance), device=importance.device)
    factors, note = _factor(hessian, order, damp, trust)
    if factors is None:
        return rtn.quantize_weight(weight, None, scheme, scale_dtype)[0], note

    residual = _in_place(factors)
    by_group = residual.unflatten(0, (-1, scheme.columns_per_group(len(order))))

    def cost(errors: Tensor) -> Tensor:
        return errors.square_().mul_(by_group).sum(-1)

    first = shrinks[::COARSE] if again else shrinks
    scales, zeros = grid.search_params(weight, scheme, scale_dtype, cost, first)
    codes, errors = _round_columns(weight, factors, scales, zeros, scheme, block_size)
    if again:
        del codes
        moved = _taken_over(weight, factors, errors)
        del errors  # as all of these, a matrix of the weight's size
        scales, zeros = grid.search_params(moved, scheme, scale_dtype, cost, shrinks, beside=1)
        del moved
        codes, errors = _round_columns(weight, factors, scales, zeros, scheme, block_size)
    del errors
    rounded = QuantizedWeight(codes, scales.to(scale_dtype), zeros.to(torch.uint8), scheme)
    ridge = factors.ridge
    del factors  # a matrix of the Hessian's size
    if rounds:
        rounded = descent.descend(
            weight, hessian, rounded, ridge=ridge, trust=trust, rounds=rounds, block_size=block_size
        )
    return rounded, note


@dataclass(frozen=True)
class _Factors:
    """`H = U D U^T` of the damped Hessian, its columns in `order`.

    Attributes:
        order: int64 `[in]`, columns in the order of rounding.
        feedback: float32 `[in, in]`, `U^T`: row k holds how much of each earlier column's error
            column k takes over.
        residual: float32 `[in]`, `D`: what the error of a column costs once the columns after it
            have taken over what they can.
        ridge: What the damping has added to the diagonal.
    """

    order: Tensor
    feedback: Tensor
    residual: Tensor
    ridge: float


def residuals(hessian: Tensor, tokens: int, damp: float = DAMP, trust: float = TRUST) -> Tensor | None:
    """What a unit of error in each column costs once later columns make up for it, float32 `[in]`.

    Few tokens make a column look more predictable than it is: least squares on m columns leaves `1 - m / T`
    of the variance that it would leave on as many tokens as one likes, and is corrected by as much.

    Args:
        hessian: float32 `[in, in]`, mean of `x x^T`.
        tokens: T, of which it is the mean.
        damp: As in `quantize_weight`.
        trust: As in `quantize_weight`.

    Returns:
        None where the Hessian is of no use.
    """
    factors, _ = _factor(hessian, hessian.diagonal().argsort(descending=True, stable=True), damp, trust)
    if factors is None:
        return None
    later = torch.arange(len(hessian) - 1, -1, -1, device=hessian.device)
    factors.residual.div_((1 - later / tokens).clamp_(min=LEAST_LEFT))
    return _in_place(factors)


def _in_place(factors: _Factors) -> Tensor:
    """The residuals, back in the weight's own order of columns."""
    return torch.empty_like(factors.residual).index_copy_(0, factors.order, factors.residual)


def _factor(hessian: Tensor, order: Tensor, damp: float, trust: float) -> tuple[_Factors | None, str]:
    """Factor the damped Hessian; None, with the reason, where no damping makes that possible."""
    diagonal = hessian.diagonal().float()
    if not is_finite(hessian):
        return None, "the Hessian is not finite: rounded to nearest"
    alive = diagonal > 0
    if not alive.any():
        return None, "no calibration token reached this weight: rounded to nearest"
    mean = diagonal[alive].mean()
    # Cholesky eliminates from the first column on, U from the last: factor the reversed matrix.
    backwards = order.flip(0)
    matrix = hessian.float().index_select(0, backwards).index_select(1, backwards).mul_(trust)
    # A dead column, whose input was always zero, has a zero row in H: the damping alone makes it
    # independent of the others, and it is rounded as it stands.
    for strength in (damp, *(more for more in (0.01, 0.1, 1.0) if more > damp)):
        matrix.diagonal().copy_((diagonal + strength * mean)[backwards])
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and is_finite(lower):
            break
    else:
        return None, "the Hessian is not positive definite: rounded to nearest"
    del matrix
    feedback = lower.T.flip(0, 1)
    pivots = feedback.diagonal().clone()
    feedback /= pivots[:, None]
    residual = pivots.square().masked_fill_(~alive[order], 0)  # dead columns have no say in a scale
    note = "" if strength == damp else f"damping raised from {damp:g} to {strength:g}"
    return _Factors(order, feedback, residual, strength * float(mean)), note


def _round_columns(
    weight: Tensor, factors: _Factors, scales: Tensor, zeros: Tensor, scheme: QuantScheme, block_size: int
) -> tuple[Tensor, Tensor]:
    """Codes, uint8 `[out, in]`, of `weight` on the grid `scales, zeros [out, groups]`.

    And what they leave of it, float32 `[in, out]`, columns in the order of rounding.
    """
    feedback, order = factors.feedback, factors.order
    groups = order // scheme.columns_per_group(len(order))
    group_of, sweep = groups.tolist(), columns.sweep(weight.device, min(block_size, len(order)))
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    wanted_at_first = weight.T.float()[order]
    errors = torch.zeros_like(wanted_at_first)
    codes = torch.empty(errors.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(order), block_size):
        stop = min(start + block_size, len(order))
        block = torch.addmm(wanted_at_first[start:stop], feedback[start:stop, :start], errors[:start])
        if sweep is not None:
            part, mixing = groups[start:stop], feedback[start:stop, start:stop]
            levels, errors[start:stop] = sweep(
                block, mixing, scales, zeros, part, scheme.levels - 1, wanted_at_first[start:stop]
            )
            codes[start:stop] = levels.add_(zeros[part])
            continue
        for k in range(start, stop):
            wanted = block[k - start].addmv_(errors[start:k].T, feedback[k, start:k])
            scale, zero = scales[group_of[k]], zeros[group_of[k]]
            rounded = grid.nearest_codes(wanted, scale, zero, scheme)
            codes[k] = rounded
            torch.sub(wanted_at_first[k], rounded.sub_(zero).mul_(scale), out=errors[k])
    return codes[order.argsort()].T.contiguous(), errors


def _taken_over(weight: Tensor, factors: _Factors, errors: Tensor) -> Tensor:
    """What was rounded, float32 `[out, in]`: the weight and what columns took over from those before."""
    moved = torch.addmm(errors, factors.feedback, errors, beta=-1)  # a column takes over nothing of its own
    moved += weight.T.float()[factors.order]
    return moved[factors.order.argsort()].T.contiguous()
