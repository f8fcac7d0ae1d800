"""What will be quantized and what will not, decided on the skeleton before any weight is read.

Everything that can be refused is refused here: a group size that does not divide, a layer that the
format can't hold, a pattern that matches nothing. What stays in full precision gets a reason, and
the summary shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from lowbit import topology
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.scheme import WHOLE_ROW, QuantScheme
from lowbit.topology import Matrix

AUTO_GROUP_SIZES = (128, 64, 32)
FEWEST_OUTPUTS = 16  # below this a linear layer is a gate or a router: nothing to save, much to break
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Plan:
    """The decision for one model.

    Attributes:
        path: Path of the list of decoder blocks.
        blocks: The list itself.
        scheme: Grid of the blocks' matrices.
        schemes: By module name, the grid of those that have another one.
        head: Grid of the output head; None leaves it in full precision.
        skipped: Reason, by module name, of everything that stays in full precision.
    """

    path: str
    blocks: nn.ModuleList
    scheme: QuantScheme
    head: QuantScheme | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    schemes: dict[str, QuantScheme] = field(default_factory=dict)

    def scheme_of(self, name: str) -> QuantScheme:
        """Grid of the module `name` of a block."""
        return self.schemes.get(name, self.scheme)

    def matrices(self, block: int) -> list[Matrix]:
        """All matrices of block number `block`."""
        return topology.matrices(self.blocks[block], f"{self.path}.{block}")


def make_plan(
    model: PreTrainedModel,
    scheme: QuantScheme,
    fmt: Format,
    *,
    skip: Sequence[str] = (),
    head_bits: int | None = None,
    auto_group: bool = False,
    schemes: Mapping[str, QuantScheme] | None = None,
) -> Plan:
    """Decide what is quantized.

    Args:
        model: Skeleton of the model.
        scheme: Grid wanted for the matrices of the decoder blocks.
        fmt: The format that will hold them.
        skip: Patterns of module names to leave alone: `*` and `?` as in a shell, matched against
            the whole name and against its end (`down_proj`, `layers.0.*`).
        head_bits: Quantize the output head to this many bits.
        auto_group: Replace the group size by the largest of 128, 64, 32 that divides every matrix.
        schemes: Other grids, by pattern as in `skip`; the last pattern that matches a module counts.

    Raises:
        LowbitError: see the module's docstring.
    """
    path, blocks = topology.decoder_blocks(model)
    plan = Plan(path, blocks, scheme)
    everything = [matrix for block in range(len(blocks)) for matrix in plan.matrices(block)]
    _skip_by_pattern(plan, everything, skip)
    _skip_routers(plan, everything, model)
    wanted = [matrix for matrix in everything if matrix.module_name not in plan.skipped]
    if not wanted:
        raise LowbitError(f"{type(model).__name__} has no linear layer left to quantize: see --skip")
    for pattern, special in (schemes or {}).items():
        plan.schemes |= dict.fromkeys(_matched(everything, pattern, "scheme for"), special)
    usual = [matrix for matrix in wanted if matrix.module_name not in plan.schemes] or wanted
    if auto_group:
        plan.scheme = replace(scheme, group_size=_largest_group(usual))
    _check_groups(usual, plan.scheme)
    for matrix in wanted:
        fmt.check_layer(matrix.module_name, *matrix.shape, plan.scheme_of(matrix.module_name), matrix.kind)
    if head_bits is not None and any(matches(head_name(model), pattern) for pattern in skip):
        raise LowbitError(f"--skip {head_name(model)} and --head-bits {head_bits} contradict: drop one")
    _plan_head(plan, model, fmt, head_bits)
    planned = {matrix.module_name: plan.scheme_of(matrix.module_name) for matrix in wanted}
    dense = [matrix.module_name for matrix in everything if matrix.module_name in plan.skipped]
    fmt.check(planned | ({head_name(model): plan.head} if plan.head else {}), dense)
    known = {matrix.name for matrix in everything}
    for name in topology.other_matrices(model, known):
        module = name.removesuffix(".weight")
        if not (plan.head and module == head_name(model)):
            plan.skipped.setdefault(module, "not a linear layer of a decoder block")
    return plan


def _skip_by_pattern(plan: Plan, everything: Sequence[Matrix], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        usual = pattern in ("lm_head", "embed_tokens")  # skipped anyway
        hits = [] if usual else _matched(everything, pattern, "--skip")
        plan.skipped.update(dict.fromkeys(hits, f"--skip {pattern}"))
    stacked = {m.name for m in everything if m.index is not None and m.module_name in plan.skipped}
    for matrix in everything:
        if matrix.name in stacked and matrix.module_name not in plan.skipped:
            raise LowbitError(f"--skip takes all experts of {matrix.name} or none: use '{matrix.name}.*'")


def _matched(everything: Sequence[Matrix], pattern: str, what: str) -> list[str]:
    hits = [matrix.module_name for matrix in everything if matches(matrix.module_name, pattern)]
    if not hits:
        raise LowbitError(
            f"{what} {pattern!r} matches no linear layer: names look like {everything[0].module_name}"
        )
    return hits


def matches(name: str, pattern: str) -> bool:
    """Does a shell pattern match a module name, or the end of it from a dot on?"""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _skip_routers(plan: Plan, everything: Sequence[Matrix], model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    experts = {getattr(config, name, None) for name in EXPERT_COUNTS} - {None}
    for matrix in everything:
        outputs = matrix.shape[0]
        # Qwen3-Next has 512 experts, and keys and values of 512 channels.
        one_for_each = outputs in experts and not matrix.module_name.endswith("_proj")
        if matrix.kind == "Linear" and (outputs < FEWEST_OUTPUTS or one_for_each):
            plan.skipped.setdefault(matrix.module_name, f"a router or gate ({outputs} outputs)")


def _largest_group(wanted: Sequence[Matrix]) -> int:
    widths = sorted({matrix.shape[1] for matrix in wanted})
    for group_size in AUTO_GROUP_SIZES:
        if all(width % group_size == 0 for width in widths):
            return group_size
    raise LowbitError(f"none of {AUTO_GROUP_SIZES} divides all of in_features={widths}: use --group-size -1")


def _check_groups(wanted: Sequence[Matrix], scheme: QuantScheme) -> None:
    widths = sorted({matrix.shape[1] for matrix in wanted})
    if scheme.group_size == WHOLE_ROW or all(width % scheme.group_size == 0 for width in widths):
        return
    fitting = [g for g in (256, 128, 64, 32, 16) if all(width % g == 0 for width in widths)]
    raise LowbitError(
        f"--group-size {scheme.group_size} does not divide all of in_features={widths}: "
        f"use one of {[*fitting, WHOLE_ROW]} or auto"
    )


def align(plan: Plan, readers: Sequence[Sequence[str]]) -> list[str]:
    """Modules that share an input are fused by engines (q/k/v, gate/up): make them alike in `plan`.

    Args:
        plan: Where one is skipped, all are; where schemes differ, all take the one with the most bits.
        readers: Names of the modules of each shared input.

    Returns:
        A note for every module whose fate changed.
    """
    notes = []
    for names in readers:
        skipped = [name for name in names if plan.skipped.get(name, "").startswith("--skip")]
        others = [name for name in names if name not in plan.skipped]
        if skipped and others:
            plan.skipped |= dict.fromkeys(others, f"shares its input with {skipped[0]}, which is skipped")
            notes += [f"{name} is skipped too: engines fuse it with {skipped[0]}" for name in others]
            continue
        widest = max(others, key=lambda name: plan.scheme_of(name).fineness, default="")
        for name in others:
            if plan.scheme_of(name) != plan.scheme_of(widest):
                plan.schemes[name] = plan.scheme_of(widest)
                notes.append(f"{name} is {plan.schemes[name]} too: engines fuse it with {widest}")
    return notes


def head_name(model: PreTrainedModel) -> str:
    """Path of the output head's module."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def _plan_head(plan: Plan, model: PreTrainedModel, fmt: Format, head_bits: int | None) -> None:
    name = head_name(model)
    if head_bits is None:
        plan.skipped[name] = "the output head (see --head-bits)"
        return
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise LowbitError(f"--head-bits {head_bits}: {type(model).__name__} has no linear output head")
    plan.head = replace(plan.scheme, bits=head_bits, activation_bits=None)
    plan.head.num_groups(head.in_features)
    fmt.check_layer(name, head.out_features, head.in_features, plan.head, "Linear")
