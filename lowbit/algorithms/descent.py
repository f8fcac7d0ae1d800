"""Coordinate descent: what GPTQ has rounded, gone over again, code by code and scale by scale.

GPTQ decides on every column once, when only the columns before it are known, so what it leaves is no
minimum of the error `tr(E H E^T)`, E being weight minus rounded weight: with all other columns as they
are, another code is often better. The best code of column k in that case is the one nearest to

    q_k + (E H)_k / H_kk

and the best scale of a group, its codes C (less the zero) given, changes by `(E H C^T) / (C H C^T)`, both
summed over the columns of the group only. Neither step can make the error larger, but for the rounding of
the scale to its stored dtype; rows never meet. Behind a whole pass over the columns scales fit other codes,
and codes other scales, so passes alternate. Coordinate descent on codes is known from QuantEase (Behdin et
al. 2023, arXiv:2309.01885) and CDQuant (Nair and Suggala 2024, arXiv:2406.17542).

Memory runs along a column, as in `gptq`, and the products with H are made for a block of columns at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import grid
from lowbit.algorithms import columns
from lowbit.hardware import bfloat16_products
from lowbit.quantized import QuantizedWeight


def descend(
    weight: Tensor,
    hessian: Tensor,
    rounded: QuantizedWeight,
    *,
    ridge: float,
    trust: float = 1.0,
    rounds: int = 2,
    block_size: int = 128,
) -> QuantizedWeight:
    """Better codes and scales for `weight`, starting from `rounded`; zeros stay.

    Args:
        weight: float `[out, in]`.
        hessian: float32 `[in, in]`, mean of `x x^T`.
        rounded: The weight as it was rounded. Its scales' dtype is that of the result.
        ridge: Added to the diagonal of the Hessian.
        trust: Factor on what lies off its diagonal.
        rounds: How often the scales are fitted; a pass over the codes stands before and after each.
        block_size: Columns per matrix product; speed only.
    """
    state = _State(weight, hessian, rounded, ridge, trust, block_size)
    state.choose_codes()
    for _ in range(rounds):
        state.fit_scales()
        state.choose_codes()
    codes = (state.levels.unflatten(0, (-1, state.width)) + state.zeros[:, None]).flatten(0, 1)
    scales = state.scales.T.contiguous().to(rounded.scales.dtype)
    return QuantizedWeight(codes.to(torch.uint8).T.contiguous(), scales, rounded.zeros, rounded.scheme)


class _State:
    """The rounded weight and what it lacks, transposed.

    Attributes:
        levels: Codes less their zeros, float32 `[in, out]`.
        scales: float32 `[groups, out]`, representable in their stored dtype.
        zeros: float32 `[groups, out]`.
        lacking: Weight minus rounded weight, float32 `[in, out]`.
        width: Columns per group.
        hessian: As it was measured; `trust` is the factor on what lies off its diagonal.
    """

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        rounded: QuantizedWeight,
        ridge: float,
        trust: float,
        block_size: int,
    ) -> None:
        self.hessian, self.trust, self.scheme = hessian, trust, rounded.scheme
        self.width = rounded.scheme.columns_per_group(len(hessian))
        self._own = (hessian.diagonal().float() * (1 - trust) + ridge)[:, None]
        curvature = hessian.diagonal().float() + ridge
        self._curvature, self._inverse = curvature.tolist(), 1 / curvature
        self._groups = torch.arange(len(hessian), device=hessian.device) // self.width
        self._alive = (hessian.diagonal() > 0).float()[:, None]  # other columns have no say in a scale
        self._block_size = block_size
        self._dtype = rounded.scales.dtype
        self.scales, self.zeros = rounded.scales.T.float().contiguous(), rounded.zeros.T.float().contiguous()
        groups = rounded.codes.T.contiguous().float().unflatten(0, (-1, self.width))
        self.levels = groups.sub_(self.zeros[:, None]).flatten(0, 1)
        self.lacking = (groups * self.scales[:, None]).flatten(0, 1)
        torch.sub(weight.T, self.lacking, out=self.lacking)

    def _pull(self, start: int, stop: int) -> Tensor:
        """`H E^T` in some rows, `[stop - start, out]`: half the error's slope, which needs few digits."""
        with bfloat16_products():
            pull: Tensor = self.hessian[start:stop] @ self.lacking
        return pull.mul_(self.trust).addcmul_(self.lacking[start:stop], self._own[start:stop])

    def choose_codes(self) -> None:
        """One pass over the columns: for each the code that is best beside the others as they are now."""
        count = len(self.hessian)
        sweep = columns.sweep(self.levels.device, min(self._block_size, count))
        for start in range(0, count, self._block_size):
            stop = min(start + self._block_size, count)
            if sweep is not None:
                self.levels[start:stop], changes = sweep(
                    self._pull(start, stop), self.trust * self.hessian[start:stop, start:stop], self.scales,
                    self.zeros, self._groups[start:stop], self.scheme.levels - 1, self.levels[start:stop],
                    self._inverse[start:stop],
                )  # fmt: skip
                self.lacking[start:stop] += changes
                continue
            pull, changes = self._pull(start, stop), torch.zeros_like(self.lacking[start:stop])
            for k in range(start, stop):
                here, scale, zero = k - start, self.scales[k // self.width], self.zeros[k // self.width]
                slope = pull[here].addmv_(changes[:here].T, self.hessian[k, start:k], alpha=self.trust)
                wanted = slope.div_(self._curvature[k]).addcmul_(self.levels[k], scale)
                level = grid.nearest_codes(wanted, scale, zero, self.scheme).sub_(zero)
                torch.mul(self.levels[k] - level, scale, out=changes[here])
                self.levels[k] = level
            self.lacking[start:stop] += changes

    def fit_scales(self) -> None:
        """One pass over the groups: for each the scale that is best beside the others as they are now."""
        for group, scale in enumerate(self.scales):
            start, stop = group * self.width, (group + 1) * self.width
            levels = self.levels[start:stop]
            heard = levels * self._alive[start:stop]
            slope = (self._pull(start, stop) * heard).sum(0)
            curved = self.hessian[start:stop, start:stop] @ heard
            curvature = curved.mul_(self.trust).addcmul_(heard, self._own[start:stop]).mul_(heard).sum(0)
            step = torch.where(curvature > 0, slope / curvature, 0.0)
            fitted = grid.round_scales(scale + step, self._dtype)
            self.lacking[start:stop].addcmul_(levels, scale - fitted)
            scale.copy_(fitted)
