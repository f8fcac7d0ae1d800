"""On-disk formats by name.

A format is one module of pure functions between a `QuantizedWeight` and the named tensors of one
linear layer, and between a checkpoint's schemes and its `quantization_config`. It never opens a
file. Every convention that is not lowbit's own (GPTQ's zeros minus one, AWQ's column order) stays
inside its module. A new one is a file here, a line in `FORMATS`, and a row in the round-trip test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.formats import awq, compressed_tensors, gptq, gptq_v2
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme


class Format(Protocol):
    """What a module in this folder provides."""

    QUANT_METHOD: str
    """The `quant_method` that transformers and the engines look up."""

    SCALE_DTYPE: torch.dtype
    """dtype to which quantizing rounds scales."""

    SCALE_DTYPES: tuple[torch.dtype, ...]
    """Every dtype in which scales can be stored, `SCALE_DTYPE` first."""

    TENSORS: tuple[str, ...]
    """Names of the tensors that may stand for one `weight`."""

    def check(self, schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> None:
        """Raise `LowbitError` if a checkpoint with these schemes (module name -> scheme) can't be held.

        `ignore` names the linear modules left in full precision.
        """
        ...

    def check_layer(
        self, name: str, out_features: int, in_features: int, scheme: QuantScheme, kind: str
    ) -> None:
        """Raise `LowbitError` if one layer can't be held. `kind` is "Linear", "Conv1D" or "Expert"."""
        ...

    def warnings(
        self, schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]
    ) -> list[str]:
        """One line for every engine that will not load this choice, named.

        `shapes` maps the same module names to `(out_features, in_features)`.
        """
        ...

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors of one layer, by suffix (`weight_packed`, `qweight`, ...)."""
        ...

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantScheme, config: Mapping[str, Any]
    ) -> QuantizedWeight:
        """The inverse of `pack`; also reads what other tools wrote.

        `config` is the checkpoint's `quantization_config`: a layout may have variants that only it
        tells apart (the two GPTQ conventions for zeros).
        """
        ...

    def column_order(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor | None:
        """Permutation, int64 `[in]`, that gathers the columns of every group; None if they lie together.

        A layer that needs one is read by `read`, not by `unpack`.
        """
        ...

    def quantization_config(
        self, schemes: Mapping[str, QuantScheme], ignore: Sequence[str]
    ) -> dict[str, Any]:
        """The `quantization_config` of `config.json`.

        Raises `LowbitError` as `check` does.
        """
        ...

    def read_config(self, config: Mapping[str, Any], name: str) -> QuantScheme:
        """The scheme of the quantized module `name` according to a `quantization_config`."""
        ...


def read(
    fmt: Format, tensors: Mapping[str, Tensor], scheme: QuantScheme, config: Mapping[str, Any]
) -> tuple[QuantizedWeight, Tensor | None]:
    """One layer, and the order of its columns where its groups are scattered over them (act-order).

    Returns:
        The weight and None; or the weight with its columns permuted so that groups lie together, and
        the permutation, int64 `[in]`: `x @ dense.T == x[:, order] @ weight.T`.

    Raises:
        LowbitError: as `Format.unpack`, or groups are uneven.
    """
    order = fmt.column_order(tensors, scheme)
    if order is None:
        return fmt.unpack(tensors, scheme, config), None
    rest = {name: tensor for name, tensor in tensors.items() if name != "g_idx"}
    weight = fmt.unpack(rest, scheme, {**config, "desc_act": False})
    return replace(weight, codes=weight.codes[:, order]), order


def is_part(fmt: Format, suffix: str, dtype: str) -> bool:
    """Is a tensor of a checkpoint part of a packed weight? `dtype` as safetensors spells it.

    A tensor called `weight` is one where it holds codes, and a dense weight, or a norm, elsewhere.
    """
    return suffix in fmt.TENSORS and (suffix != "weight" or dtype == "I8")


def write(fmt: Format, weight: QuantizedWeight, order: Tensor | None) -> dict[str, Tensor]:
    """The inverse of `read`: tensors of one layer, its columns back in their own order.

    Raises:
        LowbitError: as `Format.pack`, or the format has no place for an order of columns.
    """
    if order is None:
        return fmt.pack(weight)
    if "g_idx" not in fmt.TENSORS:
        raise LowbitError(
            f"groups are scattered over the columns (act-order), which {fmt.QUANT_METHOD} can't hold: "
            "use --format gptq, or --lossy to quantize again"
        )
    inverse = torch.argsort(order)
    tensors = fmt.pack(replace(weight, codes=weight.codes[:, inverse]))
    return tensors | {"g_idx": tensors["g_idx"][inverse]}


FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "gptq-v2": gptq_v2,
    "awq": awq,
}
