"""The GPTQ layout of AutoGPTQ and GPTQModel, in its first convention (`checkpoint_format: gptq`).

Everything is transposed, `[in, out]`, and packed as a dense stream of bits:

    qweight  int32   [in * bits / 32, out]      packed along `in`
    qzeros   int32   [groups, out * bits / 32]  packed along `out`
    scales   float16 [groups, out]
    g_idx    int32   [in]                       group of every input column

The first convention stores `zeros - 1`; the second (`gptq_v2.py`) stores `zeros`. lowbit quantizes
into the first, which every reader knows. A zero of 0 cannot be written in it: readers add one to the packed
word, so the stored -1 carries into the neighbour. The two conventions cannot be told apart from
the tensors, hence the `config` argument of `unpack`.

Columns are written in their natural order (`desc_act: false`): vLLM refuses anything else, and the
ordering that GPTQ uses while it quantizes leaves no trace in these tensors. Other tools write groups
of scattered columns (`desc_act: true`), which only `g_idx` tells; `column_order` reads it.

The config has no `meta` key: transformers' auto-round loader, another way to read these files,
raises on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit import packing
from lowbit.errors import LowbitError
from lowbit.formats import limits
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme

QUANT_METHOD = "gptq"
SCALE_DTYPE = torch.float16
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16,)
TENSORS: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format` -> what was subtracted from the zeros."""


def check(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> None:
    """One scheme, decoder blocks only, and the same modules in every block.

    Loaders choose modules by what follows the block number (transformers by suffix, vLLM by
    substring), so a module cannot be quantized in one block and dense in another.

    Raises:
        LowbitError: a rule is broken.
    """
    limits.require_uniform("gptq", schemes)
    suffixes = _suffixes(schemes)
    for name in ignore:
        block_name = limits.split_block_name(name)
        if block_name and any(suffix in block_name[2] for suffix in suffixes):
            raise LowbitError(
                f"{name}: gptq cannot leave it in full precision while {block_name[2]} of another block is "
                f"quantized: --skip {block_name[2]} in every block, or use --format compressed-tensors"
            )


def check_layer(name: str, out_features: int, in_features: int, scheme: QuantScheme, kind: str) -> None:
    """Both dimensions must fill whole words. Any kind of layer will do, `Conv1D` included.

    Raises:
        LowbitError: they don't, or the group size does not divide `in_features`.
    """
    del kind
    limits.require_groups(name, in_features, scheme)
    limits.require_whole_words("gptq", name, "in_features", in_features, scheme.bits)
    limits.require_whole_words("gptq", name, "out_features", out_features, scheme.bits)


def warnings(schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Engines that will not load this choice, one line each; `shapes` are `(out, in)` by module name."""
    scheme = limits.require_uniform("gptq", schemes)
    lines = ["transformers will not load this without `pip install gptqmodel optimum`"]
    if scheme.bits not in (4, 8):
        lines.append(f"vLLM and SGLang will not load this: bits={scheme.bits} is not 4 or 8 in gptq format")
    elif not scheme.symmetric:
        lines.append("vLLM and SGLang will not load this: they read asymmetric weights as awq, not as gptq")
    else:
        if scheme.bits == 8:
            lines.append("vLLM on CPU will not load this: it reads 4 bits only")
        lines += limits.marlin_warnings(schemes, shapes)
    return lines


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The four tensors of one layer; see the module docstring for shapes.

    Raises:
        LowbitError: a zero is 0.
        ValueError: scales are not float16.
    """
    return pack_as("gptq", weight)


def pack_as(layout: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """`pack` in the convention `layout`, `gptq` or `gptq_v2`; raises as `pack` does."""
    limits.require_scale_dtype(weight.scales, SCALE_DTYPES)
    offset = _ZERO_OFFSETS[layout]
    if int(weight.zeros.min()) < offset:
        raise LowbitError("gptq cannot store a zero of 0: use --format gptq-v2 or compressed-tensors")
    bits, in_features = weight.scheme.bits, weight.shape[1]
    return {
        "qweight": packing.pack(weight.codes, bits).t().contiguous(),
        "qzeros": packing.pack((weight.zeros - offset).t(), bits),
        "scales": weight.scales.t().contiguous(),
        "g_idx": _natural_order(in_features, weight.scheme).to(weight.codes.device),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: QuantScheme, config: Mapping[str, Any]) -> QuantizedWeight:
    """Read either convention, as `config` says.

    Raises:
        LowbitError: an unknown convention, columns in activation order, a zero that wrapped around,
            or a symmetric layer whose zeros are not in the middle (the mark of a wrong convention).
    """
    limits.require_tensors(tensors, ("qweight", "qzeros", "scales"))
    offset = _zero_offset(config)
    in_features = tensors["qweight"].shape[0] * 32 // scheme.bits
    _require_natural_order(tensors.get("g_idx"), in_features, scheme, bool(config.get("desc_act")))
    scales = tensors["scales"].t().contiguous()
    zeros = packing.unpack(tensors["qzeros"], scheme.bits, scales.shape[0]).t().contiguous()
    if offset and int(zeros.max()) == scheme.levels - 1:
        raise LowbitError(
            f"qzeros hold {scheme.levels - 1}, a zero point of 0 that gptq cannot store: "
            'set "checkpoint_format": "gptq_v2" if the file is of that kind, or quantize again'
        )
    zeros += offset
    if scheme.symmetric and bool((zeros != scheme.middle).any()):
        raise LowbitError(
            f"a symmetric layer has a zero point of {int(zeros.max())} instead of {scheme.middle}: "
            'correct "sym" or "checkpoint_format" in quantization_config'
        )
    codes = packing.unpack(tensors["qweight"].t(), scheme.bits, in_features)
    return QuantizedWeight(codes, scales, zeros, scheme)


def column_order(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor | None:
    """Permutation, int64 `[in]`, that gathers the columns of every group; None if they lie together.

    Raises:
        LowbitError: the groups of `g_idx` are not all of the size that `scheme` says.
    """
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        return None
    natural = _natural_order(g_idx.shape[0], scheme).to(g_idx.device)
    if torch.equal(g_idx.int(), natural):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order].int(), natural):
        raise LowbitError(
            f"g_idx does not spread {g_idx.shape[0]} columns over groups of {scheme.group_size}: "
            "correct group_size in quantization_config, or quantize again"
        )
    return order


def quantization_config(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config`; names modules only if a block keeps a dense one.

    Raises:
        LowbitError: as `check`.
    """
    check(schemes, ignore)
    scheme = limits.require_uniform("gptq", schemes)
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    if any(limits.split_block_name(name) for name in ignore):
        config["modules_in_block_to_quantize"] = [_suffixes(schemes)]
    return config


def read_config(config: Mapping[str, Any], name: str) -> QuantScheme:
    """The scheme of module `name`; follows GPTQModel's per-module `dynamic` rules.

    Raises:
        LowbitError: a key is missing, the layout is another one, or a rule says that `name` is dense.
    """
    limits.require_keys(config, ("bits", "group_size"))
    _zero_offset(config)
    values: dict[str, Any] = {key: config[key] for key in ("bits", "group_size", "sym") if key in config}
    for rule, overrides in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), name):
            if rule.startswith("-:"):
                raise LowbitError(f'{name}: is packed, but the rule "{rule}" says it is dense: remove it')
            values |= {key: value for key, value in overrides.items() if key in ("bits", "group_size", "sym")}
            break
    return QuantScheme(values["bits"], values["group_size"], values.get("sym", True))


def _suffixes(schemes: Mapping[str, QuantScheme]) -> list[str]:
    split = [limits.split_block_name(name) for name in schemes]
    return sorted({parts[2] for parts in split if parts})


def _zero_offset(config: Mapping[str, Any]) -> int:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if layout not in _ZERO_OFFSETS:
        raise LowbitError(f"checkpoint_format={layout!r} is not supported: use one of {list(_ZERO_OFFSETS)}")
    return _ZERO_OFFSETS[layout]


def _natural_order(in_features: int, scheme: QuantScheme) -> Tensor:
    return torch.arange(in_features, dtype=torch.int32) // scheme.columns_per_group(in_features)


def _require_natural_order(
    g_idx: Tensor | None, in_features: int, scheme: QuantScheme, desc_act: bool
) -> None:
    if g_idx is None:
        ordered = desc_act and scheme.num_groups(in_features) > 1
    else:
        ordered = not torch.equal(g_idx.int().cpu(), _natural_order(in_features, scheme))
    if ordered:
        raise LowbitError(
            "g_idx is not in natural order (desc_act=true), which lowbit does not read: "
            "quantize with desc_act=false"
        )
