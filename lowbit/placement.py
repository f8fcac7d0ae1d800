"""Where the packed layers of a checkpoint belong in the model that transformers has built.

What is packed is read from the headers of the files. A packed layer then has one of three places: a linear
layer; a stack of experts, into which transformers would merge it with its like and which `QuantExperts` can
stand in for; or another merged parameter, which can only be dense. All names go through transformers' own
renaming.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from lowbit.errors import LowbitError
from lowbit.experts import DOWN, GATED, UP
from lowbit.formats import Format, is_part
from lowbit.shard import dtype_of


@dataclass
class Stack:
    """The packed layers that are experts of one module.

    Attributes:
        parts: Names of the matrices of an expert by the parameter that they are merged into, in order.
        names: Name on disk of each matrix, by expert and name (`"0.w1"`).
    """

    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass
class Places:
    """What becomes of every packed layer.

    Attributes:
        linear: Name on disk to the path of a linear layer.
        experts: Path of an experts module to what it is made of.
        merged: Name on disk to the parameter that it is merged into, dense.
        patterns: transformers' names for the sources of those merges.
    """

    linear: dict[str, str] = field(default_factory=dict)
    experts: dict[str, Stack] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    patterns: set[str] = field(default_factory=set)


def packed_layers(files: Sequence[str], fmt: Format) -> dict[str, dict[str, Tensor]]:
    """Tensors on the meta device, by suffix, of every packed layer, by its name on disk.

    Raises:
        LowbitError: a file, or the dtype of a tensor, is of another kind.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise LowbitError(f"{file} is no safetensors file: convert the checkpoint")
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a mapping)
                name, _, suffix = key.rpartition(".")
                piece = opened.get_slice(key)
                if is_part(fmt, suffix, piece.get_dtype()):
                    dtype = dtype_of(piece.get_dtype(), f"{file}: {key}")
                    found[name][suffix] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    return found


def find_places(model: PreTrainedModel, names: Collection[str]) -> Places:
    """The place of every packed layer.

    Raises:
        LowbitError: the model has none for one of them, or a stack lacks an expert.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    places, stacks = Places(), defaultdict[str, Stack](Stack)
    sources: dict[str, str] = {}
    for name in names:
        key = f"{name}.weight"
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target not in known and key in known:
            target, pattern = key, None
        if target not in known:
            raise LowbitError(f"{name} is packed, and the model has no such linear layer")
        if pattern is None:
            places.linear[name] = target.removesuffix(".weight")
            continue
        places.merged[name], sources[name] = target, pattern
        module, _, parameter = target.rpartition(".")
        merge = next(entry for entry in converters if pattern in entry.source_patterns)
        own = re.search(r"\.(\d+\.\w+)\.weight$", rename_source_key(key, renamings, [])[0])
        if own and _stacks(merge):
            parts = (source.removesuffix(".weight").rpartition(".")[2] for source in merge.source_patterns)
            stacks[module].parts[parameter] = tuple(parts)
            stacks[module].names[own[1]] = name
    # All or none: the names by which one module's experts are merged would catch another's packed ones.
    if all(_can_stand_in(model.get_submodule(path), stack.parts) for path, stack in stacks.items()):
        places.experts = dict(stacks)
    for path, stack in places.experts.items():
        _require_all_experts(model.get_submodule(path), path, stack)
        for name in stack.names.values():
            del places.merged[name]
    places.patterns = {sources[name] for name in places.merged}
    return places


def _stacks(merge: WeightConverter) -> bool:
    """Does it put the matrices of all experts on a stack, each expert's on top of one another?"""
    return all(
        (isinstance(step, MergeModulelist) and step.dim == 0)
        or (isinstance(step, Concatenate) and step.dim == 1)
        for step in merge.operations
    ) and isinstance(merge.operations[0], MergeModulelist)


def _can_stand_in(module: nn.Module, parts: Mapping[str, tuple[str, ...]]) -> bool:
    """Are these all the parameters of an experts module whose forward `QuantExperts` knows?

    transformers marks its experts by what `use_experts_implementation` sets on them.
    """
    gated = getattr(module, "has_gate", None)
    more = ("has_bias", "is_transposed", "has_post_expert_norm")
    plain = not any(getattr(module, name, False) for name in more)
    expected = {GATED if gated else UP, DOWN}
    own = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return gated is not None and plain and own == expected == parts.keys()


def _require_all_experts(module: nn.Module, path: str, stack: Stack) -> None:
    for parameter, names in stack.parts.items():
        for expert in range(len(getattr(module, parameter))):
            for name in names:
                if f"{expert}.{name}" not in stack.names:
                    raise LowbitError(
                        f"{path}.{expert}.{name} is not packed, others are: copy the checkpoint again"
                    )
