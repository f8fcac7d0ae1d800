"""SmoothQuant: take outliers out of the activations where those are rounded as well as the weights.

A token has one scale. If a channel of it is a hundred times larger than the others, these get one code
between them. Dividing the channel by a factor that the weights' columns are multiplied by leaves the
product as it is and moves the difficulty to the weights (Xiao et al. 2022, arXiv:2211.10438, equation 4):

    factor_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)

Folding the division into the layer before is the caller's part. alpha is found for each input by trying:
the error of the output on a sample of tokens, activations and weights rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import grid
from lowbit.activations import round_rows
from lowbit.scheme import QuantScheme

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SMALLEST = 1e-4
"""Bound of peaks from below, over the largest: a channel that never fires stays a channel."""


def find_channel_scales(
    weights: Sequence[Tensor],
    rows: Tensor,
    peaks: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    alphas: Sequence[float] = ALPHAS,
) -> Tensor | None:
    """Factors of the input channels that make the output's error smallest.

    Args:
        weights: The float matrices `[out_i, in]` that read this input.
        rows: float `[tokens, in]`, a sample of the input.
        peaks: float32 `[in]`, the largest magnitude of each channel over all tokens.
        scheme: The grid of the weights.
        scale_dtype: dtype in which the format stores scales.
        alphas: Exponents tried, besides no scaling at all.

    Returns:
        float32 `[in]`, to multiply the weights' columns and divide the input by; None where no
        candidate beats no scaling, or the input was never anything but zero.
    """
    if not torch.isfinite(peaks).all() or not peaks.any() or not len(rows):
        return None
    stacked, rows = torch.cat([weight.float() for weight in weights]), rows.float()
    exact = rows @ stacked.T
    # Every token counts alike: a few have inputs a thousand times larger, and residuals to match.
    weighting = exact.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
    peaks, columns = _away_from_zero(peaks.float()), _away_from_zero(stacked.abs().amax(0))
    best, least = None, _error(stacked, rows, exact, weighting, scheme, scale_dtype)
    for alpha in alphas:
        factors = peaks**alpha / columns ** (1 - alpha)
        factors /= (factors.max() * factors.min()).sqrt()
        error = _error(stacked * factors, rows / factors, exact, weighting, scheme, scale_dtype)
        if error < least:
            best, least = factors, error
    return best


def _away_from_zero(values: Tensor) -> Tensor:
    return values.clamp(min=max(float(values.max()) * _SMALLEST, 1e-30))


def _error(
    weight: Tensor, rows: Tensor, exact: Tensor, weighting: Tensor, scheme: QuantScheme, dtype: torch.dtype
) -> float:
    scales, zeros = grid.find_params(weight, scheme, dtype)
    rounded = grid.dequantize(grid.quantize(weight, scales, zeros, scheme), scales, zeros, scheme)
    return float((round_rows(rows) @ rounded.T).sub_(exact).mul_(weighting).square_().mean())
