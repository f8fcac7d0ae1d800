"""The `int-quantized` layout of compressed-tensors: int8 weights whose inputs are rounded to int8 too.

    weight        int8     [out, in]   codes - 128
    weight_scale  bfloat16 [out, 1]

The scale of the inputs is found per token while the model runs; nothing of it is on disk. vLLM and
SGLang multiply the integers, stock transformers rounds the activations and multiplies dense weights.
`compressed_tensors.py` is the format; this is what differs from its other layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import limits
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

LAYOUT = "int-quantized"
ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
"""The `input_activations` of a config group."""


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The two tensors of one layer."""
    codes = (weight.codes.to(torch.int16) - weight.scheme.middle).to(torch.int8)
    return {"weight": codes, "weight_scale": weight.scales.contiguous()}


def unpack(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """The inverse of `pack`; scales keep the dtype they have.

    Raises:
        LowbitError: a tensor is missing, or the weight is not int8, or its scales are not one per row.
    """
    limits.require_tensors(tensors, ("weight", "weight_scale"))
    weight, scales = tensors["weight"], tensors["weight_scale"]
    if weight.dtype != torch.int8 or weight.ndim != 2:
        raise LowbitError(
            f"weight is {weight.dtype} {tuple(weight.shape)}, {LAYOUT} needs int8 [out, in]: quantize again"
        )
    if scales.shape != (len(weight), 1):
        raise LowbitError(
            f"weight_scale is {tuple(scales.shape)}, one scale per row is {(len(weight), 1)}: quantize again"
        )
    codes = (weight.to(torch.int16) + scheme.middle).to(torch.uint8)
    zeros = torch.full(scales.shape, scheme.middle, dtype=torch.uint8, device=scales.device)
    return QuantizedWeight(codes, scales, zeros, scheme)


def reads(group: Mapping[str, Any]) -> bool:
    """Are the activations of a config group rounded as here?"""
    found = group.get("input_activations") or {}
    return all(found.get(field, field == "symmetric") == value for field, value in ACTIVATIONS.items())


def read_activations(activations: Mapping[str, Any] | None, name: str) -> int:
    """The bits of a group's `input_activations`.

    Raises:
        LowbitError: they are not rounded per token, symmetrically, to int8, while the model runs.
    """
    found = activations or {}
    for field, value in ACTIVATIONS.items():
        got = found.get(field, field == "symmetric")
        if got != value:
            raise LowbitError(f"{name}: input_activations have {field}={got!r}: lowbit reads {value!r}")
    return 8
