"""Scales, zeros, rounding: the only file that rounds and clamps weights.

One equation everywhere: `w ~ (codes - zeros) * scales`, `codes` unsigned in `0 ... 2**bits - 1`.

Symmetric grids use the full signed range: the entry of largest magnitude in a group lies exactly
on the outermost code (-8 at 4 bits), which makes the scale *negative* where that entry is
positive. Every loader and kernel multiplies by the scale, so its sign costs nothing, and the step
is `max|w| / 8` instead of the `max|w| / 7.5` or `/ 7` of the usual formulas.

Asymmetric zeros are kept in `1 ... 2**bits - 1`. A zero of 0 needs a group without a negative
weight, and the GPTQ layout (which stores `zeros - 1`) cannot hold it: giving up that one corner
lets every format hold every weight.

Scales are rounded to the dtype in which they will be stored *before* any code is chosen, so what
was optimised is what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.scheme import QuantScheme

SHRINKS = tuple(step / 40 for step in range(44, 19, -1) if step != 40)
"""Factors on the range that a search tries, 1.1 down to 0.5. Above 1, a signed grid gives up a little
of its step to reach a weight opposite to the outermost, whose side ends one code earlier."""

SEARCHED_AT_ONCE = 2**19
"""Weights for which every shrink is tried before the next: bounds the memory and suits the cache."""


def to_groups(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """View `weight [out, in]` as `[out, groups, columns_per_group]`."""
    groups: Tensor = weight.unflatten(-1, (-1, scheme.columns_per_group(weight.shape[-1])))
    return groups


def round_scales(scales: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round to the stored dtype and back to float32; a scale that vanishes becomes the smallest normal.

    Raises:
        LowbitError: a scale is not finite in `scale_dtype`.
    """
    rounded = scales.to(scale_dtype).float()
    if not torch.isfinite(rounded).all():
        worst = scales.abs().max().item()
        raise LowbitError(f"a scale of {worst:.3g} does not fit {scale_dtype}: use bfloat16 scales")
    tiny = torch.finfo(scale_dtype).tiny
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)


def find_params(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, shrink: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Min-max scales and zeros of every group.

    Args:
        weight: float `[out, in]`.
        scheme: The grid.
        scale_dtype: dtype in which the format stores scales.
        shrink: Factor on the range before the scale is taken (clipping); a scalar or `[out, groups]`.

    Returns:
        `scales [out, groups]` float32, already representable in `scale_dtype`, never 0, and
        `zeros [out, groups]` float32 holding integers.

    Raises:
        LowbitError: the group size does not divide `in`, or a scale overflows `scale_dtype`.
    """
    groups = to_groups(weight.float(), scheme)
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.symmetric:
        outermost = torch.where(high > -low, -high, -low)  # signed: lands on code 0
        scales = round_scales(outermost * shrink / scheme.middle, scale_dtype)
        return scales, torch.full_like(scales, scheme.middle)
    top = scheme.levels - 1
    low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    # A zero of at least 1 leaves top - 1 steps for the positive side.
    scales = round_scales(torch.maximum((high - low) / top, high / (top - 1)), scale_dtype)
    return scales, torch.round(-low / scales).clamp(1, top)


def search_params(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    group_errors: Callable[[Tensor], Tensor],
    shrinks: tuple[float, ...] = SHRINKS,
    beside: int = 0,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of the shrink that serves each group best; never worse than `find_params`.

    Args:
        weight: float `[out, in]`.
        scheme: The grid.
        scale_dtype: dtype in which the format stores scales.
        group_errors: What to make small: takes the rounding error of some rows, float32
            `[rows, groups, columns_per_group]`, and may overwrite it; returns `[rows, groups]`.
        shrinks: Factors on the min-max range, tried besides 1.
        beside: Zeros of an asymmetric grid are tried up to so many codes from a range's own.

    Returns:
        As `find_params`, which also says what is raised.
    """
    rows = max(1, SEARCHED_AT_ONCE // weight.shape[1])
    found = [_search_rows(part, scheme, scale_dtype, group_errors, shrinks, beside)
             for part in weight.split(rows)]  # fmt: skip
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _search_rows(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    group_errors: Callable[[Tensor], Tensor],
    shrinks: tuple[float, ...],
    beside: int,
) -> tuple[Tensor, Tensor]:
    groups = to_groups(weight.float(), scheme)
    scales, zeros = find_params(weight, scheme, scale_dtype)
    least = group_errors(_rounding_errors(groups, scales, zeros, scheme))
    steps = (0,) if scheme.symmetric else range(-beside, beside + 1)
    for shrink in (1.0, *shrinks) if len(steps) > 1 else shrinks:
        trial_scales, own_zeros = find_params(weight, scheme, scale_dtype, shrink)
        for step in steps:
            trial_zeros = (own_zeros + step).clamp(1, scheme.levels - 1)
            errors = group_errors(_rounding_errors(groups, trial_scales, trial_zeros, scheme))
            better = errors < least
            least = torch.where(better, errors, least)
            scales = torch.where(better, trial_scales, scales)
            zeros = torch.where(better, trial_zeros, zeros)
    return scales, zeros


def _rounding_errors(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """Rounded minus exact, in the shape of `groups [out, groups, columns_per_group]`."""
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    return nearest_codes(groups, scales, zeros, scheme).sub_(zeros).mul_(scales).sub_(groups)


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest codes of float32 `values`, in their shape and dtype; `scales`, `zeros` broadcast to it."""
    return (values / scales).round_().add_(zeros).clamp_(0, scheme.levels - 1)


def quantize(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest codes, uint8 `[out, in]`, of `weight [out, in]` on the grid `scales, zeros [out, groups]`."""
    groups = to_groups(weight.float(), scheme)
    codes = nearest_codes(groups, scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1), scheme)
    return codes.to(torch.uint8).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> Tensor:
    """`(codes - zeros) * scales`, float32 `[out, in]`; exact for scales of up to 16 stored bits."""
    groups = to_groups(codes.float(), scheme)
    return ((groups - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(-2)
