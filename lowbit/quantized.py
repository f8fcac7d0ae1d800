"""The one currency of the road: what an algorithm makes, a format packs and a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import grid
from lowbit.scheme import QuantScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix on an integer grid: `w ~ (codes - zeros) * scales`, per group of columns.

    Attributes:
        codes: uint8 `[out, in]`, in `0 ... 2**bits - 1`.
        scales: `[out, groups]` in the stored dtype (bfloat16 or float16); may be negative, never 0.
        zeros: uint8 `[out, groups]`; all `2 ** (bits - 1)` on a symmetric grid.
        scheme: The grid.

    >>> weight = QuantizedWeight(codes=torch.tensor([[9, 6]], dtype=torch.uint8),
    ...                          scales=torch.tensor([[0.5]]),
    ...                          zeros=torch.tensor([[8]], dtype=torch.uint8),
    ...                          scheme=QuantScheme(bits=4, group_size=-1))
    >>> weight.dequantize()
    tensor([[ 0.5000, -1.0000]])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme

    def __post_init__(self) -> None:
        expected = (self.codes.shape[0], self.scheme.num_groups(self.codes.shape[1]))
        if self.scales.shape != expected or self.zeros.shape != expected:
            raise ValueError(
                f"scales {tuple(self.scales.shape)} and zeros {tuple(self.zeros.shape)} "
                f"must be {expected} for codes {tuple(self.codes.shape)} on {self.scheme}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that a loader sees, `[out, in]`: the exact product, rounded once to `dtype`."""
        return grid.dequantize(self.codes, self.scales, self.zeros, self.scheme).to(dtype)

    @classmethod
    def stack_rows(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The inverse of `split_rows`: parts of one scheme, one above the other."""
        codes, scales, zeros = (
            torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scales", "zeros")
        )
        return cls(codes, scales, zeros, parts[0].scheme)

    def cpu(self) -> QuantizedWeight:
        """The same on the CPU."""
        return QuantizedWeight(self.codes.cpu(), self.scales.cpu(), self.zeros.cpu(), self.scheme)

    def split_rows(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Cut along the output dimension, as a fused gate/up matrix is cut into its two halves."""
        parts = zip(
            self.codes.split(list(sizes)),
            self.scales.split(list(sizes)),
            self.zeros.split(list(sizes)),
            strict=True,
        )
        return [QuantizedWeight(c, s, z, self.scheme) for c, s, z in parts]
