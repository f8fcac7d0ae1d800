"""The AWQ layout of AutoAWQ, version GEMM: four bits, asymmetric, transposed.

    qweight  int32   [in, out / 8]      eight columns of `out` per word
    qzeros   int32   [groups, out / 8]  likewise; zeros as they are
    scales   float16 [groups, out]

Nibble `i` of a word holds column `_ORDER[i]` of its eight: the order in which the original CUDA
kernel unpacked pairs of halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit import packing
from lowbit.errors import LowbitError
from lowbit.formats import limits
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

QUANT_METHOD = "awq"
SCALE_DTYPE = torch.float16
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16,)
TENSORS: tuple[str, ...] = ("qweight", "qzeros", "scales")

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(_ORDER.index(column) for column in range(8))


def check(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> None:
    """One four-bit asymmetric scheme, decoder blocks only.

    Raises:
        LowbitError: another scheme, or an ignored name is part of a quantized one (engines look
            ignored names up as substrings, and would leave both dense).
    """
    _require_scheme(limits.require_uniform("awq", schemes))
    for dense in ignore:
        shadowed = next((name for name in schemes if dense in name), None)
        if shadowed:
            raise LowbitError(
                f"{dense}: awq loaders would leave {shadowed} in full precision too: "
                "quantize both or none, or use --format compressed-tensors"
            )


def check_layer(name: str, out_features: int, in_features: int, scheme: QuantScheme, kind: str) -> None:
    """`out_features` must fill whole words, and the layer must be an `nn.Linear` (or an expert).

    Raises:
        LowbitError: a rule is broken, or the group size does not divide `in_features`.
    """
    _require_scheme(scheme)
    if kind == "Conv1D":
        raise LowbitError(f"{name}: awq loaders know no Conv1D layers: use --format gptq")
    limits.require_groups(name, in_features, scheme)
    limits.require_whole_words("awq", name, "out_features", out_features, scheme.bits)


def warnings(schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Engines that will not load this choice, one line each; `shapes` are `(out, in)` by module name."""
    return [
        "transformers will not load this without `pip install gptqmodel`",
        *limits.marlin_warnings(schemes, shapes),
    ]


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The three tensors of one layer; see the module docstring for shapes.

    Raises:
        LowbitError: the scheme is not four-bit asymmetric.
        ValueError: scales are not float16.
    """
    _require_scheme(weight.scheme)
    limits.require_scale_dtype(weight.scales, SCALE_DTYPES)
    return {
        "qweight": packing.pack(_reorder(weight.codes, _ORDER).t(), _BITS),
        "qzeros": packing.pack(_reorder(weight.zeros, _ORDER).t(), _BITS),
        "scales": weight.scales.t().contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: QuantScheme, config: Mapping[str, Any]) -> QuantizedWeight:
    """The inverse of `pack`. `config` is not needed: the layout has no variants.

    Raises:
        LowbitError: a tensor is missing or the scheme is not four-bit asymmetric.
    """
    del config
    _require_scheme(scheme)
    limits.require_tensors(tensors, TENSORS)
    scales = tensors["scales"].t().contiguous()
    codes = packing.unpack(tensors["qweight"], _BITS, scales.shape[0]).t()
    zeros = packing.unpack(tensors["qzeros"], _BITS, scales.shape[0]).t()
    return QuantizedWeight(_reorder(codes, _INVERSE), scales, _reorder(zeros, _INVERSE), scheme)


def column_order(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor | None:
    """None: the columns of a group lie together."""
    del tensors, scheme
    return None


def quantization_config(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config`; `modules_to_not_convert` lists `ignore`.

    Raises:
        LowbitError: as `check`.
    """
    check(schemes, ignore)
    return {
        "quant_method": QUANT_METHOD,
        "bits": _BITS,
        "group_size": limits.require_uniform("awq", schemes).group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(ignore) or None,
    }


def read_config(config: Mapping[str, Any], name: str) -> QuantScheme:
    """The scheme of every quantized module, `name` being one of them.

    Raises:
        LowbitError: a key is missing, or the layout is not the four-bit asymmetric GEMM one.
    """
    del name
    limits.require_keys(config, ("bits", "group_size"))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise LowbitError(f"awq version={version!r} is not supported: use a checkpoint of version 'gemm'")
    scheme = QuantScheme(config["bits"], config["group_size"], symmetric=not config.get("zero_point", True))
    _require_scheme(scheme)
    return scheme


def _require_scheme(scheme: QuantScheme) -> None:
    if scheme.bits != _BITS:
        raise LowbitError(f"awq holds 4 bits only, got bits={scheme.bits}: use --format compressed-tensors")
    if scheme.symmetric:
        raise LowbitError(f"awq holds no symmetric scheme, got {scheme}: use --asymmetric, or another format")


def _reorder(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Permute `rows [out, n]` within every eight of them."""
    eights = rows.reshape(-1, 8, rows.shape[1])
    return eights[:, list(order)].flatten(0, 1)
