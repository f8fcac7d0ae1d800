"""Limits that several formats share: what their loaders and the engines demand.

Names of engines and numbers come from reading and running vLLM 0.32/0.33, SGLang 0.5.23,
transformers 5.23 with optimum 2.3 and gptqmodel 7.7, and compressed-tensors 0.20.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.scheme import WHOLE_ROW, QuantScheme

_BLOCK_NAME = re.compile(r"(.+?)\.(\d+)\.(.+)")
MARLIN_GROUPS = (WHOLE_ROW, 32, 64, 128)


def split_block_name(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up_proj` -> `("model.layers", 3, "mlp.up_proj")`; None outside the blocks."""
    match = _BLOCK_NAME.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def require_uniform(format_name: str, schemes: Mapping[str, QuantScheme]) -> QuantScheme:
    """The one scheme of a checkpoint whose format has a single one, for decoder-block linears only.

    Raises:
        LowbitError: nothing is quantized, schemes differ, activations are to be rounded, or a module
            lies outside the blocks (stock transformers never converts `lm_head` in these formats, and
            would fill it with random numbers).
    """
    require_some(schemes)
    distinct = sorted({str(scheme) for scheme in schemes.values()})
    if len(distinct) > 1:
        raise LowbitError(
            f"{format_name} holds one scheme per checkpoint, got {', '.join(distinct)}: "
            "use one scheme, or --format compressed-tensors"
        )
    if next(iter(schemes.values())).activation_bits is not None:
        raise LowbitError(
            f"{format_name} knows no rounded activations, got {distinct[0]}: use --format compressed-tensors"
        )
    for name in schemes:
        if split_block_name(name) is None:
            raise LowbitError(
                f"{name}: {format_name} loaders quantize only decoder blocks: "
                f"--skip {name}, or use --format compressed-tensors"
            )
    return next(iter(schemes.values()))


def require_some(schemes: Mapping[str, QuantScheme]) -> None:
    """Raise `LowbitError` if no module is quantized."""
    if not schemes:
        raise LowbitError("no linear layer is left to quantize: see --skip")


def require_groups(name: str, in_features: int, scheme: QuantScheme) -> None:
    """Raise `LowbitError`, naming the layer, if the group size does not divide `in_features`."""
    try:
        scheme.columns_per_group(in_features)
    except LowbitError as error:
        raise LowbitError(f"{name}: {error}") from None


def require_whole_words(format_name: str, name: str, feature: str, size: int, bits: int) -> None:
    """Raise `LowbitError` if `size` codes of `bits` bits do not fill whole int32 words."""
    multiple = 32 // math.gcd(32, bits)
    if size % multiple:
        raise LowbitError(
            f"{name}: {feature}={size} is no multiple of {multiple}, as {format_name} needs at {bits} bits: "
            f"--skip {name}, or use --format compressed-tensors"
        )


def require_tensors(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise `LowbitError` if one of `names` is missing."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise LowbitError(
            f"tensors {missing} are missing beside {sorted(tensors)}: copy the checkpoint again"
        )


def require_keys(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise `LowbitError` if a `quantization_config` lacks one of `keys`."""
    missing = [key for key in keys if key not in config]
    if missing:
        raise LowbitError(f"quantization_config lacks {missing}: add them to config.json")


def require_scale_dtype(scales: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise `ValueError` if scales were rounded for another format: a cast would round them twice."""
    if scales.dtype not in dtypes:
        raise ValueError(f"scales must be {' or '.join(map(str, dtypes))}, got {scales.dtype}")


def marlin_warnings(schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """One line per reason why SGLang's only kernel for these weights, Marlin, refuses them.

    vLLM's Marlin pads such shapes and has other kernels for other groups.
    """
    lines = []
    groups = sorted({s.group_size for s in schemes.values()} - set(MARLIN_GROUPS))
    if groups:
        lines.append(f"SGLang will not load this: group_size={groups[0]} is not one of {MARLIN_GROUPS}")
    uneven = [name for name in schemes if name in shapes and (shapes[name][0] % 64 or shapes[name][1] % 128)]
    if uneven:
        out_features, in_features = shapes[uneven[0]]
        lines.append(
            "SGLang will not load this: it needs out_features % 64 == 0 and in_features % 128 == 0, "
            f"and {uneven[0]} is [{out_features}, {in_features}]"
            + (f" (as are {len(uneven) - 1} other layers)" if len(uneven) > 1 else "")
        )
    return lines
