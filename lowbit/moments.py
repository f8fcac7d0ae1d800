"""What is remembered of a matrix's input: its second moment, a sample, how far it has drifted.

The Hessian of the layer-wise problem is `2 X X^T` (Frantar et al. 2022, arXiv:2210.17323, section
3); here it is the mean of `x x^T` over tokens, which has the same minimiser and a scale that does
not grow with the data.

All of it is sums, so ranks that saw different tokens `pool` what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lowbit import ranks
from lowbit.hardware import bfloat16_products


def is_finite(matrix: Tensor) -> bool:
    """No NaN and nothing infinite in a matrix, without a copy of it."""
    # aminmax passes NaN on, and needs no copy of an embedding of a gigabyte.
    along = matrix.T if matrix.ndim == 2 and not matrix.is_contiguous() else matrix  # as of Cholesky
    return not matrix.numel() or all(map(torch.isfinite, along.aminmax()))


def output_errors(errors: Tensor, hessian: Tensor, block_size: int = 256) -> Tensor:
    """The diagonal of `D H D^T`, float32 `[out]`: the expected squared error of each output.

    Args:
        errors: D, of a weight, float32 `[out, in]`.
        hessian: H, float32 `[in, in]`, the mean of `x x^T`.
        block_size: Columns that are multiplied at once; speed only.

    H is symmetric: the blocks above its diagonal count twice and those below are not multiplied.
    """
    found = torch.zeros(len(errors), device=errors.device)
    for start in range(0, errors.shape[1], block_size):
        stop = start + block_size
        here = errors[:, start:stop]
        seen = (errors[:, :start] @ hessian[:start, start:stop]).mul_(2)
        found += seen.addmm_(here, hessian[start:stop, start:stop]).mul_(here).sum(1)
    return found


def tile_of(width: int) -> int:
    """Columns per product, of which only tiles on and right of the diagonal are computed.

    A fifth of them: three fifths of the work are left, and no unit idles for want of columns.
    """
    return max(128, -(-width // 320) * 64)


class Moment:
    """Running mean of `x x^T` in float32.

    Only the upper triangle of tiles is accumulated (the rest is its mirror), which halves the work
    for wide inputs. Where activations are bfloat16, their float32 products are left to bfloat16
    matrix units: inputs and products are exact and the sum stays float32, so nothing is lost.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0
        self._is_mean = False

    def add(self, x: Tensor) -> None:
        """Take in activations `[..., in]` of any float dtype; not after `mean`."""
        assert not self._is_mean
        rows = x.detach().reshape(-1, x.shape[-1])
        self.tokens += len(rows)
        exact = rows.dtype == torch.bfloat16
        with bfloat16_products() if exact else nullcontext():
            rows, step = rows.float(), tile_of(rows.shape[1])
            for start in range(0, rows.shape[1], step):
                tile = rows[:, start : start + step]
                self.total[start : start + step, start:].addmm_(tile.T, rows[:, start:])

    def pool(self, tokens: int, team: Sequence[int]) -> None:
        """Add what the other ranks have seen, `tokens` in all, on those of a team that will ask for it."""
        assert not self._is_mean
        if tokens:
            ranks.add(self.total, team)
        self.tokens = tokens

    def mean(self) -> Tensor:
        """The Hessian, float32 `[in, in]`, symmetric; zeros if no token was seen. Made in place."""
        if not self._is_mean:
            self._is_mean = True
            self.total.div_(max(self.tokens, 1))
            step = tile_of(len(self.total))
            for start in range(0, len(self.total), step):
                stop = start + step
                square = self.total[start:stop, start:stop]
                square.copy_(square.triu() + square.triu(1).T)
                self.total[stop:, start:stop] = self.total[start:stop, stop:].T
        return self.total

    def rescale(self, scales: Tensor) -> None:
        """Follow a fold that divides the input by `scales [in]`."""
        self.total /= scales
        self.total /= scales.unsqueeze(-1)

    def release(self) -> None:
        """Let the memory go; the moment can't be used any more."""
        self.total = self.total.new_empty(0)


class Sample:
    """Some rows of an input, and how large each of its channels ever was."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.rows = torch.empty(0, in_features, device=device)
        self.peaks = torch.zeros(in_features, device=device)

    def add(self, x: Tensor, count: int) -> None:
        """Take in activations `[..., in]`, and keep about `count` of their rows, the first one included."""
        rows = x.detach().reshape(-1, x.shape[-1])
        torch.maximum(self.peaks, rows.abs().amax(0).float(), out=self.peaks)
        kept = rows[:: max(1, len(rows) // count)][:count]
        self.rows = torch.cat([self.rows.to(kept.dtype), kept])

    def pool(self) -> None:
        """Take in the samples of the other ranks, in their order."""
        parts = [ranks.handed([self.rows], by, self.rows.device)[0] for by in range(ranks.size())]
        self.rows = torch.cat([part for part in parts if len(part)] or parts[:1])
        ranks.highest(self.peaks)

    def release(self) -> None:
        """Let the memory go."""
        self.rows = self.rows.new_empty(0, self.rows.shape[1])


class Drift:
    """Running mean of `g x^T` in float32: how far the quantized model is from the original, against x.

    The gap g is either that of the inputs, `X - x`, or what the outputs lack.

    Args:
        rows: Length of a gap.
        in_features: Length of an input.
        device: Where to keep it.

    Attributes:
        held_out: `x` and g of tokens that were set aside, `[tokens, in]` and `[tokens, rows]`.
        of_outputs: Is g a gap of outputs?
    """

    def __init__(self, rows: int, in_features: int, device: torch.device, of_outputs: bool = False) -> None:
        self.total = torch.zeros(rows, in_features, device=device)
        self.tokens = 0
        self.of_outputs = of_outputs
        self.held_out: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, gap: Tensor, held_out: bool) -> None:
        """Take in inputs `[..., in]` of some tokens and their gaps `[..., rows]`, or keep them to judge by.

        The gap is small against what it is a difference of: it may be multiplied in bfloat16.
        """
        inputs, gap = x.detach().flatten(0, -2), gap.detach().flatten(0, -2)
        if held_out:
            self.held_out = inputs, gap.to(inputs.dtype)
            return
        self.tokens += len(inputs)
        with bfloat16_products() if inputs.dtype == torch.bfloat16 else nullcontext():
            self.total.addmm_(gap.float().T, inputs.float())

    def lacking(self, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the output of `weight [out, in]` lacks, as `Correction` takes it: mean and held-out tokens."""
        assert self.held_out is not None, "no tokens were set aside"
        mean, (x, gap) = self.total / max(self.tokens, 1), self.held_out
        if self.of_outputs:
            return mean, (x, gap.float())
        return weight @ mean, (x, gap.float() @ weight.T)

    def pool(self, tokens: int, holder: int | None, team: Sequence[int]) -> None:
        """Add what the other ranks have seen, `tokens` in all; one of them holds the tokens set aside."""
        ranks.add(self.total, team)
        self.tokens = tokens
        if holder is not None:
            x, gap = ranks.handed(self.held_out, holder, self.total.device)
            self.held_out = x, gap
