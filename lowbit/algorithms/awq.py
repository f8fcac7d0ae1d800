"""AWQ: make the weights of large inputs finer, and clip what is not worth its range.

The two parts of Lin et al. 2023 (arXiv:2306.00978, section 3.2) as pure functions, both judged by the
expected error of the output, `tr(D H D^T)` with D the error of the weight. The second moment H of
the inputs is all that it takes: no activations are kept.

`find_channel_scales` looks for a factor per input channel. Multiplying the weight by it and
dividing the input by it changes nothing before rounding; folding the division into the layer
before is the caller's part. `quantize_weight` looks for a clipping factor per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import grid
from lowbit.algorithms import rtn
from lowbit.errors import LowbitError
from lowbit.hardware import bfloat16_products
from lowbit.moments import is_finite, output_errors
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

NEEDS_HESSIAN = True
WEIGHTS_AT_ONCE = 2**21  # weights whose error is worked out at a time: bounds the memory of the search


def find_channel_scales(
    weights: Sequence[Tensor],
    hessian: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    points: int = 20,
) -> Tensor | None:
    """Factors of the input channels that make the summed output error of `weights` smallest.

    The candidates are `rms(x) ** alpha / magnitude(w) ** (1 - alpha)`, alpha in 0 ... 1: a channel
    becomes finer the larger its input, and coarser the larger its weights already are in their
    groups. They are normalised so that the largest and the smallest factor are reciprocal.

    Args:
        weights: The float matrices `[out_i, in]` that read this input.
        hessian: float32 `[in, in]`, mean of `x x^T`.
        scheme: The grid.
        scale_dtype: dtype in which the format stores scales.
        points: Candidates tried, besides no scaling at all.

    Returns:
        float32 `[in]`, to multiply the weights' columns and divide the input by; None where no
        candidate beats no scaling, or the Hessian is of no use.

    Raises:
        LowbitError: a group size that does not divide `in`, a scale that overflows.
    """
    if not is_finite(hessian) or not hessian.diagonal().any():
        return None
    rms = _away_from_zero(hessian.diagonal().clamp(min=0).sqrt())
    magnitude = _away_from_zero(_mean_magnitude(weights, scheme))
    best, least = None, _scaled_error(weights, None, hessian, scheme, scale_dtype)
    for alpha in torch.linspace(0, 1, points).tolist():
        factors = rms**alpha / magnitude ** (1 - alpha)
        factors /= (factors.max() * factors.min()).sqrt()
        error = _scaled_error(weights, factors, hessian, scheme, scale_dtype)
        if error < least:
            best, least = factors, error
    return best


def _mean_magnitude(weights: Sequence[Tensor], scheme: QuantScheme) -> Tensor:
    """Mean over all rows of `|w|` relative to the largest of its group, `[in]`."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        groups = grid.to_groups(weight.float().abs(), scheme)
        total += (groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)).flatten(-2).sum(0)
    return total / sum(len(weight) for weight in weights)


def _away_from_zero(values: Tensor) -> Tensor:
    """Bounded below by a ten-thousandth of the largest: an input that never fires stays an input."""
    return values.clamp(min=max(float(values.max()) * 1e-4, 1e-30))


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    *,
    shrinks: tuple[float, ...] = grid.SHRINKS,
) -> tuple[QuantizedWeight, str]:
    """Nearest codes, every group clipped where that makes the error of its output smaller.

    A group is judged by its own block of the Hessian, `(w - q) H_gg (w - q)^T`: the expected
    squared error of its share of the output.

    Args:
        weight: float `[out, in]`.
        hessian: float32 `[in, in]`, mean of `x x^T`.
        scheme: The grid.
        scale_dtype: dtype in which the format stores scales.
        shrinks: Factors on a group's range, tried besides 1.

    Returns:
        The quantized weight, and a note if the Hessian was of no use.

    Raises:
        LowbitError: no Hessian, a group size that does not divide `in`, a scale that overflows.
    """
    if hessian is None:
        raise LowbitError("awq needs calibration data: pass a hessian, or use rtn")
    if not is_finite(hessian):
        note = "the Hessian is not finite: rounded to nearest, not clipped"
        return rtn.quantize_weight(weight, None, scheme, scale_dtype)[0], note
    group = scheme.columns_per_group(weight.shape[1])
    blocks = torch.stack([hessian[i : i + group, i : i + group] for i in range(0, len(hessian), group)])

    def output_errors(errors: Tensor) -> Tensor:
        errors = errors.transpose(0, 1)
        return (torch.bmm(errors, blocks) * errors).sum(-1).T

    scales, zeros = grid.search_params(weight, scheme, scale_dtype, output_errors, shrinks)
    codes = grid.quantize(weight, scales, zeros, scheme)
    note = "" if hessian.diagonal().any() else "no calibration token reached this weight: rounded to nearest"
    return QuantizedWeight(codes, scales.to(scale_dtype), zeros.to(torch.uint8), scheme), note


def _scaled_error(
    weights: Sequence[Tensor],
    factors: Tensor | None,
    hessian: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
) -> float:
    """Sum of `tr(D H D^T)` over `weights`, rounded to nearest after their columns took `factors`."""
    total = 0.0
    rows = max(1, WEIGHTS_AT_ONCE // len(hessian))
    for part in (part for weight in weights for part in weight.split(rows)):
        scaled = part.float() if factors is None else part.float() * factors
        scales, zeros = grid.find_params(scaled, scheme, scale_dtype)
        codes = grid.quantize(scaled, scales, zeros, scheme)
        errors = grid.dequantize(codes, scales, zeros, scheme).sub_(scaled)
        if factors is not None:
            errors /= factors
        with bfloat16_products():  # candidates differ by percents, products by a thousandth
            total += float(output_errors(errors, hessian).sum())
    return total
