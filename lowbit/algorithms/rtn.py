"""Round to nearest on the min-max grid: no data, seconds, the floor every algorithm must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import grid
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

NEEDS_HESSIAN = False


def quantize_weight(
    weight: Tensor, hessian: Tensor | None, scheme: QuantScheme, scale_dtype: torch.dtype
) -> tuple[QuantizedWeight, str]:
    """Nearest codes on the min-max grid. `hessian` is ignored; shapes as in `Algorithm`."""
    scales, zeros = grid.find_params(weight, scheme, scale_dtype)
    codes = grid.quantize(weight, scales, zeros, scheme)
    return QuantizedWeight(codes, scales.to(scale_dtype), zeros.to(torch.uint8), scheme), ""
