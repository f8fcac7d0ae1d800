"""The GPTQ layout in GPTQModel's second convention (`checkpoint_format: gptq_v2`): zeros as they are.

All else is as in `gptq.py`. It holds a zero of 0, which the first convention can't store; engines that
read asymmetric GPTQ at all (gptqmodel, SGLang) know it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lowbit.formats import gptq
from lowbit.formats.gptq import (
    QUANT_METHOD,
    SCALE_DTYPE,
    SCALE_DTYPES,
    TENSORS,
    check,
    check_layer,
    column_order,
    read_config,
    unpack,
    warnings,
)
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

__all__ = [
    "QUANT_METHOD",
    "SCALE_DTYPE",
    "SCALE_DTYPES",
    "TENSORS",
    "check",
    "check_layer",
    "column_order",
    "pack",
    "quantization_config",
    "read_config",
    "unpack",
    "warnings",
]

_LAYOUT = "gptq_v2"


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The four tensors of one layer; shapes as in `gptq.py`.

    Raises:
        ValueError: scales are not float16.
    """
    return gptq.pack_as(_LAYOUT, weight)


def quantization_config(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """As the first convention's, but for its name.

    Raises:
        LowbitError: as `check`.
    """
    return gptq.quantization_config(schemes, ignore) | {"checkpoint_format": _LAYOUT}
