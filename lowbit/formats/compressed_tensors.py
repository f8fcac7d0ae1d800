"""The layouts of compressed-tensors: `pack-quantized`, which vLLM prefers, and `int-quantized`.

    weight_packed      int32    [out, ceil(in * bits / 32)]      dense stream of bits along the row
    weight_scale       bfloat16 [out, groups]                float16 where scales came from elsewhere
    weight_shape       int64    [2] = [out, in]
    weight_zero_point  int32    [ceil(out * bits / 32), groups]  asymmetric only; packed along `out`

Where activations are rounded too, the layout is `int-quantized` (`int_quantized.py`) instead.

The library thinks in signed integers, `codes - 2 ** (bits - 1)`, and adds the offset back when it
packs, so what is on disk are our unsigned codes and zeros.

`config_groups` name their modules by `targets`: a class name, a module name, or `re:` and a regular
expression. Where the decoder blocks have one scheme, its group targets `Linear`. Where they have
several, `Linear` must not appear: vLLM and SGLang look a fused layer (q/k/v, gate/up) up by its
class before they look at its parts, so `Linear` would take the parts away from the group that names
them. Every group then lists anchored expressions that overlap with no other group's. The group of
the experts comes first and names them: transformers takes the first expression with "experts" in
it, or else the first group with a class or a name, for the experts of the whole model.

The members of a fused layer must share a scheme, or all be ignored; that the caller sees to.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit import packing
from lowbit.errors import LowbitError
from lowbit.formats import int_quantized, limits
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import WHOLE_ROW, QuantScheme

QUANT_METHOD = "compressed-tensors"
SCALE_DTYPE = torch.bfloat16
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
TENSORS: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")

_LAYOUT = "pack-quantized"
LAYOUTS = (_LAYOUT, int_quantized.LAYOUT)
_EXPERT = re.compile(r".*\.experts\.\d+\..*")  # on disk
_STACKED = re.compile(r".*\.experts\.\w+\.\d+")  # in memory


def check(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> None:
    """Any scheme per module, but asymmetric ones alone, and one for all experts.

    transformers 5.23 reads asymmetric weights only with `dequantize`, which applies a single
    group's scheme to all modules; it also picks one group for all experts, and none may be dense.

    Raises:
        LowbitError: a rule is broken.
    """
    limits.require_some(schemes)
    dense = next((name for name in ignore if _EXPERT.match(name) or _STACKED.match(name)), None)
    if dense:
        raise LowbitError(
            f"{dense}: transformers cannot load dense experts: quantize them, or use --format gptq"
        )
    distinct = sorted({str(scheme) for scheme in schemes.values()})
    if len(distinct) > 1 and not all(scheme.symmetric for scheme in schemes.values()):
        raise LowbitError(
            f"transformers cannot load asymmetric weights in mixed schemes, got {', '.join(distinct)}: "
            "use symmetric schemes, or a single one"
        )
    if len(distinct) > 1 and any(scheme.activation_bits for scheme in schemes.values()):
        raise LowbitError(
            f"compressed-tensors holds {int_quantized.LAYOUT} weights alone, got {', '.join(distinct)}: "
            "leave out --head-bits"
        )
    experts = sorted({str(s) for name, s in schemes.items() if _EXPERT.match(name) or _STACKED.match(name)})
    if len(experts) > 1:
        raise LowbitError(f"experts must share a scheme, got {', '.join(experts)}: use one for all experts")


def check_layer(name: str, out_features: int, in_features: int, scheme: QuantScheme, kind: str) -> None:
    """Any size; an `nn.Linear`, or a symmetric expert (transformers loads experts without zeros).

    Raises:
        LowbitError: another kind, or the group size does not divide `in_features`.
    """
    del out_features
    if scheme.activation_bits and kind != "Linear":
        raise LowbitError(f"{name}: activations of a {kind} can't be rounded: leave out --activation-bits")
    if kind == "Conv1D":
        raise LowbitError(f"{name}: compressed-tensors knows no Conv1D layers: use --format gptq")
    if kind == "Expert" and not scheme.symmetric:
        raise LowbitError(f"{name}: transformers cannot load experts in {scheme}: use a symmetric scheme")
    limits.require_groups(name, in_features, scheme)


def warnings(schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Engines that will not load this choice, one line each; `shapes` are `(out, in)` by module name."""
    if any(scheme.activation_bits for scheme in schemes.values()):
        return []
    bits = {scheme.bits for scheme in schemes.values()}
    low, other = sorted(bits - {4, 8}), sorted(bits - {4})
    asymmetric = not all(scheme.symmetric for scheme in schemes.values())
    lines = []
    if 3 in bits:
        lines.append("transformers will not load bits=3 with compressed-tensors older than 0.18")
    if other:
        lines.append(f"vLLM on CPU will not load this: bits={other[0]} is not 4")
    if low:
        kernels = "at all where asymmetric" if asymmetric else "without its optional humming kernels"
        lines.append(f"vLLM on GPU will not load bits={low[0]} {kernels}")
        lines.append(f"SGLang will not load this: bits={low[0]} is not 4 or 8")
    else:
        lines += limits.marlin_warnings(schemes, shapes)
    return lines


def stored_bytes(shape: tuple[int, int], scheme: QuantScheme) -> int:
    """Bytes of the tensors of one layer `(out, in)` with weights only."""
    (out_features, in_features), groups = shape, scheme.num_groups(shape[1])
    zeros = 0 if scheme.symmetric else 4 * packing.num_words(out_features, scheme.bits) * groups
    codes = 4 * packing.num_words(in_features, scheme.bits) * out_features
    return codes + SCALE_DTYPE.itemsize * out_features * groups + zeros + 2 * torch.int64.itemsize


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer; see the module docstring for shapes.

    Raises:
        ValueError: scales are neither bfloat16 nor float16.
    """
    limits.require_scale_dtype(weight.scales, SCALE_DTYPES)
    if weight.scheme.activation_bits:
        return int_quantized.pack(weight)
    bits = weight.scheme.bits
    tensors = {
        "weight_packed": packing.pack(weight.codes, bits),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        tensors["weight_zero_point"] = packing.pack(weight.zeros.t(), bits).t().contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: QuantScheme, config: Mapping[str, Any]) -> QuantizedWeight:
    """The inverse of `pack`; scales keep the dtype they have. `config` is not needed.

    Raises:
        LowbitError: a tensor is missing, or packed otherwise (before 0.18 the library put ten 3-bit
            codes in a word).
    """
    del config
    if scheme.activation_bits:
        return int_quantized.unpack(tensors, scheme)
    needed = TENSORS[:3] if scheme.symmetric else TENSORS[:4]
    limits.require_tensors(tensors, needed)
    out_features, in_features = (int(size) for size in tensors["weight_shape"])
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    words = packing.num_words(in_features, scheme.bits)
    if packed.shape != (out_features, words):
        raise LowbitError(
            f"weight_packed is {tuple(packed.shape)}, {scheme.bits}-bit codes fill {(out_features, words)}: "
            "quantize again, with compressed-tensors >= 0.18"
        )
    if scheme.symmetric:
        zeros = torch.full(scales.shape, scheme.middle, dtype=torch.uint8, device=scales.device)
    else:
        zeros = packing.unpack(tensors["weight_zero_point"].t(), scheme.bits, out_features).t().contiguous()
    return QuantizedWeight(packing.unpack(packed, scheme.bits, in_features), scales, zeros, scheme)


def column_order(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor | None:
    """None: the columns of a group lie together."""
    del tensors, scheme
    return None


def quantization_config(schemes: Mapping[str, QuantScheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The smallest config that compressed-tensors 0.15 ... 0.20, vLLM and SGLang parse.

    Raises:
        LowbitError: as `check`.
    """
    check(schemes, ignore)
    groups = [_group(scheme, targets) for scheme, targets in _targets(schemes).items()]
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format": groups[0]["format"],
        # Without it stock transformers fills the model with random numbers and says nothing.
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
    if not all(scheme.symmetric for scheme in schemes.values()):
        config["dequantize"] = True  # the only road by which transformers 5.23 reads packed zeros
    return config


def reads(config: Mapping[str, Any]) -> bool:
    """Is this one of the layouts here? Of `int-quantized` only the variety with dynamic activations is."""
    layout = config.get("format", _LAYOUT)
    if layout != int_quantized.LAYOUT:
        return bool(layout == _LAYOUT)
    groups = (config.get("config_groups") or {}).values()
    return all(isinstance(group, Mapping) and int_quantized.reads(group) for group in groups)


def read_config(config: Mapping[str, Any], name: str) -> QuantScheme:
    """The scheme of module `name`, an `nn.Linear`: exact names first, then expressions, then `Linear`.

    Raises:
        LowbitError: no group targets it, `ignore` names it, or its group is more than packed integer
            weights.
    """
    limits.require_keys(config, ("config_groups",))
    _require_weights_only(config)
    if _rank(name, config.get("ignore") or ()) is not None:
        raise LowbitError(f"{name}: is packed, but quantization_config ignores it: remove it from ignore")
    groups = config["config_groups"].values()
    if not all(isinstance(group, Mapping) for group in groups):
        raise LowbitError("config_groups holds the name of a preset: write its fields out")
    ranked = [(rank, group) for group in groups if (rank := _rank(name, group["targets"])) is not None]
    if not ranked:
        raise LowbitError(f"{name}: is packed, but no config group targets it: add it to the targets")
    group = min(ranked, key=lambda pair: pair[0])[1]  # min keeps the first of equals: earlier groups win
    layout = group.get("format") or config.get("format")
    if layout not in LAYOUTS:
        raise LowbitError(f"{name}: format={layout!r} is not supported: use one of {LAYOUTS}")
    activation_bits = None
    if layout == int_quantized.LAYOUT:
        activation_bits = int_quantized.read_activations(group.get("input_activations"), name)
    unknown = ("output_activations",) if activation_bits else ("input_activations", "output_activations")
    for field in unknown:
        if group.get(field) is not None:
            raise LowbitError(f"{name}: quantized {field} are not supported: use a weight-only checkpoint")
    scheme = _read_weights(group.get("weights"), name)
    return scheme if activation_bits is None else replace(scheme, activation_bits=activation_bits)


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    whole_row = scheme.group_size == WHOLE_ROW
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": int_quantized.ACTIVATIONS if scheme.activation_bits else None,
        "output_activations": None,
        "format": int_quantized.LAYOUT if scheme.activation_bits else _LAYOUT,
    }


def _targets(schemes: Mapping[str, QuantScheme]) -> dict[QuantScheme, list[str]]:
    """Targets of every scheme; the experts' scheme comes first."""
    in_blocks = {name: scheme for name, scheme in schemes.items() if limits.split_block_name(name)}
    targets: dict[QuantScheme, list[str]] = {}
    if len(set(in_blocks.values())) == 1:
        targets[next(iter(in_blocks.values()))] = ["Linear"]
    else:
        targets |= _block_targets(in_blocks)
    for name, scheme in schemes.items():
        if name not in in_blocks:  # engines do not take the output head for a Linear
            targets.setdefault(scheme, []).append(name)
    return targets


def _block_targets(schemes: Mapping[str, QuantScheme]) -> dict[QuantScheme, list[str]]:
    r"""One expression per scheme and place in a block: `re:^model\.layers\.(?:0|7)\.mlp\.up_proj$`."""
    experts = {scheme for name, scheme in schemes.items() if _EXPERT.match(name)}
    targets = {scheme: [f"re:{_EXPERT.pattern}"] for scheme in experts}
    numbers: dict[tuple[str, str], dict[QuantScheme, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, scheme in schemes.items():
        split = limits.split_block_name(name)
        if split and not _EXPERT.match(name):
            numbers[split[0], split[2]][scheme].append(str(split[1]))
    for (prefix, suffix), by_scheme in numbers.items():
        for scheme, used in by_scheme.items():
            number = r"\d+" if len(by_scheme) == 1 else f"(?:{'|'.join(used)})"
            target = rf"re:^{re.escape(prefix)}\.{number}\.{re.escape(suffix)}$"
            targets.setdefault(scheme, []).append(target)
    return targets


def _rank(name: str, targets: Iterable[str]) -> int | None:
    """How well `targets` match a linear: 0 by name, 1 by expression, 2 by class; None if not at all."""
    ranks = []
    for target in targets:
        if target == name:
            ranks.append(0)
        elif target.startswith("re:") and re.match(target[3:], name):
            ranks.append(1)
        elif target == "Linear":
            ranks.append(2)
    return min(ranks, default=None)


def _require_weights_only(config: Mapping[str, Any]) -> None:
    """Refuse what would change the model and is not in the weights."""
    status = config.get("quantization_status")
    if status != "compressed":
        raise LowbitError(f"quantization_status={status!r} is not supported: save the checkpoint compressed")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise LowbitError("a sparsity_config other than dense is not supported: use a dense checkpoint")
    for field in ("kv_cache_scheme", "transform_config"):
        if config.get(field):
            raise LowbitError(f"{field} is not supported: use a checkpoint without it")


def _read_weights(weights: Mapping[str, Any] | None, name: str) -> QuantScheme:
    weights = weights or {}
    limits.require_keys(weights, ("num_bits", "strategy"))
    accepted = {
        "type": ("int",),
        "strategy": ("group", "channel"),
        "dynamic": (False,),
        "actorder": (None, False, "weight", "static"),  # these reorder while quantizing, not on disk
    }
    for field, values in accepted.items():
        if weights.get(field, values[0]) not in values:
            raise LowbitError(f"{name}: weights have {field}={weights[field]!r}: use one of {values}")
    group_size = weights["group_size"] if weights["strategy"] == "group" else WHOLE_ROW
    return QuantScheme(weights["num_bits"], group_size, weights.get("symmetric", True))
