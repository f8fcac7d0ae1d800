"""Rounding algorithms by name.

An algorithm is one module with `quantize_weight`: a pure function of one weight matrix and what
calibration remembered of its input. It never sees a model. A new one is a file here, a line in
`ALGORITHMS`, and a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowbit.algorithms import awq, gptq, qronos, quick, rtn
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme


class Algorithm(Protocol):
    """What a module in this folder provides."""

    NEEDS_HESSIAN: bool
    """True if `quantize_weight` wants the second moment of the inputs (that is, calibration)."""

    def quantize_weight(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
    ) -> tuple[QuantizedWeight, str]:
        """Round one matrix.

        Args:
            weight: float `[out, in]`; not mutated.
            hessian: float32 `[in, in]`, the mean of `x x^T` over calibration tokens; not mutated.
            scheme: The grid.
            scale_dtype: dtype in which the format stores scales.

        Returns:
            The quantized weight and a note, empty unless something fell back.
        """
        ...


class Rewrite(Protocol):
    """Finds the factors of a function-preserving rewrite that comes before rounding."""

    def __call__(
        self, weights: Sequence[Tensor], hessian: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype
    ) -> Tensor | None:
        """Positive factors `[in]` for the columns of `weights [out_i, in]`, or None to leave them."""
        ...


class Correction(Protocol):
    """Makes up, before rounding, for the errors of the layers before."""

    def __call__(
        self, weight: Tensor, hessian: Tensor, lacking: Tensor, held_out: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, float]:
        """The weight to round in place of `weight [out, in]`, and how much of the correction was used.

        `lacking` is float32 `[out, in]`, the mean of `g x^T`, x what the layer reads and g what its output
        lacks beside the original's; `held_out` is x and g of other tokens.
        """
        ...


ALGORITHMS: dict[str, Algorithm] = {"rtn": rtn, "quick": quick, "gptq": gptq, "awq": awq, "qronos": qronos}
ONE_PASS = {"quick"}
"""For these a block runs once: they are observed on what the original carries on, not the rounded model."""
BY_COLUMN = {"quick", "gptq", "qronos"}
"""These round one column after the other (`columns.py`), and later columns make up for an error."""
REWRITES: dict[str, Rewrite] = {"awq": awq.find_channel_scales}
CORRECTIONS: dict[str, Correction] = {"qronos": qronos.correct}
