"""Bits where they matter: the schemes of all groups that lose least within a target.

Each group of matrices takes one scheme; every scheme has a size and an estimated loss
(`sensitivity.py`); sizes add up exactly and losses nearly. That is a multiple-choice knapsack problem,
solved to the optimum (`knapsack.py`).

What may be chosen: symmetric grids of 4 and 8 bits, groups of 32, 64 and 128 columns where they divide,
and whole rows: all that vLLM, SGLang and transformers load. Fewer bits come into play only where a
target can't be met without them, or where the user names them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lowbit import knapsack, shard, untrusted
from lowbit.checkpoint import check_room, stored_dtype
from lowbit.errors import LowbitError
from lowbit.formats.compressed_tensors import stored_bytes
from lowbit.formats.limits import split_block_name
from lowbit.plan import Plan, head_name
from lowbit.scheme import SUPPORTED_BITS, WHOLE_ROW, QuantScheme
from lowbit.sensitivity import Sensitivity
from lowbit.source import Source

GROUP_SIZES = (32, 64, 128, WHOLE_ROW)
FEWEST_BITS = 4
HEADER_BYTES = 110
"""Of one tensor in the header of a safetensors file, besides its name; rounded up."""
TENSORS = 3
"""Of one symmetric matrix in compressed-tensors."""


@dataclass(frozen=True)
class Target:
    """How small the checkpoint must be; one of the two.

    Attributes:
        bits_per_weight: Of the quantized matrices, scales counted: what `lowbit inspect` shows.
        size: Bytes of all weight files together.
        bits: The fewest bits of a code; None: 4, or less where the target can't be met with 4.
        group_size: The only group size; None: what divides of 32, 64, 128, and the whole row.

    Raises:
        LowbitError: not exactly one of the two is given, or it is not positive.

    >>> str(Target(bits_per_weight=4.25)), str(Target(size=3_900_000_000))
    ('4.25 bits per weight', '3.90 GB')
    """

    bits_per_weight: float | None = None
    size: int | None = None
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bits_per_weight, self.size) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise LowbitError(
                "a target is either --target-bpw or --target-size, more than 0: give one of them"
            )
        if given[0] == math.inf:
            raise LowbitError(f"{self.option} is no target: give a number such as 4.25")
        QuantScheme(
            FEWEST_BITS if self.bits is None else self.bits,
            WHOLE_ROW if self.group_size is None else self.group_size,
        )

    def __str__(self) -> str:
        return f"{self.bits_per_weight:g} bits per weight" if self.size is None else megabytes(self.size)

    @property
    def option(self) -> str:
        """As the command line spells it."""
        if self.size is None:
            return f"--target-bpw {self.bits_per_weight:g}"
        return f"--target-size {megabytes(self.size)}"

    def check(self, format: str) -> None:
        """Raise `LowbitError` where loaders of a format know no mixed schemes."""
        if format != "compressed-tensors":
            raise LowbitError(
                f"transformers loads one scheme per {format} checkpoint, and {self.option} mixes them: "
                "use --format compressed-tensors"
            )


@dataclass(frozen=True)
class Room:
    """A target, applied to one model.

    Attributes:
        target: The target.
        bits: The fewest bits of a code.
        bytes: What the tensors of the blocks' quantized matrices may take.
        weights: How many weights those are.
        rest: Bytes of everything else in the files.
        fixed: Bytes and weights of the part of it that counts as quantized: the output head.
    """

    target: Target
    bits: int
    bytes: int
    weights: int
    rest: int
    fixed: tuple[int, int] = (0, 0)

    def schemes(self, in_features: int) -> list[QuantScheme]:
        """What may become of a matrix of so many input columns."""
        return _schemes(in_features, self.bits, self.target.group_size)


@dataclass
class Choice:
    """What was chosen.

    Attributes:
        groups: The groups of matrices, in order of the model.
        schemes: The scheme of each.
        room: What there was to spend.
        notes: What the user should know.
        warnings: Engines that will not load this.
    """

    groups: list[Sensitivity]
    schemes: list[QuantScheme]
    room: Room
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of the blocks' quantized matrices."""
        return sum(_bytes(group, scheme) for group, scheme in zip(self.groups, self.schemes, strict=True))

    @property
    def bits_per_weight(self) -> float:
        """Of all quantized matrices, the head included."""
        fixed_bytes, fixed_weights = self.room.fixed
        return 8 * (self.bytes + fixed_bytes) / (self.room.weights + fixed_weights)

    @property
    def size(self) -> int:
        """Bytes of the files, to within the length of their headers and never more."""
        return self.bytes + self.room.rest

    @property
    def kl(self) -> float:
        """Estimated divergence of the whole model from the original, nats per token."""
        return sum(group.kl[scheme] for group, scheme in zip(self.groups, self.schemes, strict=True))

    def by_module(self) -> dict[str, QuantScheme]:
        """The scheme of every module, by name."""
        pairs = zip(self.groups, self.schemes, strict=True)
        return {name: scheme for group, scheme in pairs for name in group.names}

    def labels(self) -> list[tuple[int | None, str]]:
        """Block and matrices of every group: `(7, "self_attn.q+k+v_proj")`; no block for all experts."""
        return [_label(group.names) for group in self.groups]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `results.Report.plan` holds."""
        rows = []
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            coarsest = min(group.kl, key=lambda scheme: scheme.fineness)
            block, label = _label(group.names)
            parent = group.names[0].partition(f".{block}.")[0]
            rows.append(
                {
                    "name": label if block is None else f"{parent}.{block}.{label}",
                    "scheme": str(scheme),
                    "bits": 8 * _bytes(group, scheme) / sum(out * width for out, width in group.shapes),
                    "sensitivity": group.kl[coarsest],
                    "kl": {str(scheme): kl for scheme, kl in group.kl.items()},
                }
            )
        smallest = min((scheme for group in self.groups for scheme in group.kl), key=lambda s: s.fineness)
        return {
            "budget": str(self.room.target),
            "achieved": f"{self.bits_per_weight:.3f} bits per weight, {megabytes(self.size)}",
            "unit": f"estimated nats per token that rounding this group alone to {smallest} adds",
            "bits_per_weight": self.bits_per_weight,
            "size": self.size,
            "estimated_kl": self.kl,
            "rows": rows,
        }

    def uniform(self) -> tuple[QuantScheme, float] | None:
        """The best single scheme within the same bytes, and its estimate; None where none fits."""
        shared = set.intersection(*(set(group.kl) for group in self.groups))
        fitting = [s for s in shared if sum(_bytes(group, s) for group in self.groups) <= self.room.bytes]
        losses = {s: sum(group.kl[s] for group in self.groups) for s in fitting}
        best = min(losses, key=lambda scheme: (losses[scheme], scheme.fineness), default=None)
        return None if best is None else (best, losses[best])


def _schemes(in_features: int, fewest: int, group_size: int | None) -> list[QuantScheme]:
    sizes = GROUP_SIZES if group_size is None else (group_size,)
    fitting = [size for size in sizes if size == WHOLE_ROW or in_features % size == 0]
    return [QuantScheme(bits, size) for bits in SUPPORTED_BITS if bits >= fewest for size in fitting]


def _bytes(group: Sensitivity, scheme: QuantScheme) -> int:
    return sum(stored_bytes(shape, scheme) for shape in group.shapes)


def require_room(source: Source, plan: Plan, target: Target | None, folder: Path) -> None:
    """Raise `LowbitError` where a target can't be met, or the disk of `folder` does not hold the result."""
    if target:
        find_room(source, plan, target)
    check_room(folder, _estimated_bytes(source, plan) + source.held)


def _estimated_bytes(source: Source, plan: Plan) -> int:
    """Generous size of the result, with room for the copy that a rename replaces."""
    bits = 0.0
    for block in range(len(plan.blocks)):
        for matrix in plan.matrices(block):
            out, width = matrix.shape
            dense = matrix.module_name in plan.skipped
            per_weight = plan.scheme_of(matrix.module_name).bits_per_weight(width)
            bits += out * width * (16 if dense else per_weight)
    blocks = sum(p.numel() for p in plan.blocks.parameters())
    rest = sum(p.numel() for p in source.model.parameters()) - blocks
    return int(1.1 * (bits / 8 + 2 * rest + _extra_bytes(source))) + 50_000_000


def find_room(source: Source, plan: Plan, target: Target) -> Room:
    """What a target leaves for the matrices of `plan`; reads nothing but headers.

    Raises:
        LowbitError: the target is below the smallest checkpoint there can be, or above the original.
    """
    every = [m for block in range(len(plan.blocks)) for m in plan.matrices(block)]
    wanted = [m for m in every if m.module_name not in plan.skipped]
    weights = sum(m.shape[0] * m.shape[1] for m in wanted)
    fixed = _head(source, plan)
    planned = {m.name for m in wanted}
    keys = source.keys_under(planned)
    headers = TENSORS * sum(len(key) + HEADER_BYTES for key in keys)
    split = 16 * max(0, len(keys) - len(wanted))  # a `weight_shape` for each part of what the model merges
    fixed = (fixed[0] + split, fixed[1])
    rest = fixed[0] + headers + _dense_bytes(source, plan, planned)
    if target.size is None:
        assert target.bits_per_weight is not None
        limit = int(min(target.bits_per_weight, 16.0) * (weights + fixed[1]) / 8) - fixed[0]
        whole = 2 * (weights + fixed[1]) - fixed[0]
    else:
        limit, whole = target.size - rest, source.bytes - rest
    if limit >= whole:
        raise LowbitError(f"{target.option} is no less than the original: give less")
    for bits in [4, 3, 2] if target.bits is None else [target.bits]:
        least = sum(
            min(stored_bytes(m.shape, scheme) for scheme in _schemes(m.shape[1], bits, target.group_size))
            for m in wanted
        )
        if least <= limit:
            return Room(target, bits, limit, weights, rest, fixed)
    if target.size is None:
        smallest = f"{math.ceil(8000 * (least + fixed[0]) / (weights + fixed[1])) / 1000:g}"
    else:
        smallest = f"{math.ceil((least + rest) / 1e4) / 100:.2f}MB"
    hint = f", or --bits {target.bits - 1}" if target.bits in (3, 4) else ""
    raise LowbitError(f"{target.option} is below the smallest possible: use at least {smallest}{hint}")


def _label(names: Sequence[str]) -> tuple[int | None, str]:
    places = [split_block_name(name) for name in names]
    first = places[0]
    if first is None or len({place and place[:2] for place in places}) > 1:
        return None, "all experts"
    parts = [place[2].rpartition(".")[2] for place in places if place]
    stem = first[2].rpartition(".")[0]
    return first[1], f"{stem}.{'+'.join(parts)}" if stem else "+".join(parts)


def megabytes(count: int) -> str:
    """Bytes, readable.

    >>> megabytes(3_900_000_000), megabytes(98_360_000)
    ('3.90 GB', '98.36 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _head(source: Source, plan: Plan) -> tuple[int, int]:
    """Bytes and weights of the head where it is quantized."""
    if plan.head is None:
        return 0, 0
    out_features, in_features = source.model.get_output_embeddings().weight.shape
    return stored_bytes((out_features, in_features), plan.head), out_features * in_features


def _dense_bytes(source: Source, plan: Plan, planned: set[str]) -> int:
    """Bytes of what is written as it is, with its headers."""
    if plan.head is not None:
        planned = planned | {f"{head_name(source.model)}.weight"}
    extra, total = set(source.extra_keys), 0
    for key, dtype, count in _in_headers(source, {*source.keys_outside(planned), *extra}):
        kept = dtype if key in extra else stored_dtype(dtype, source.stored_dtype)
        total += count * kept.itemsize + len(key) + HEADER_BYTES
    return total


def _extra_bytes(source: Source) -> int:
    """Bytes of what the architecture does not use, which is copied as it is."""
    shards, extra = getattr(source, "shards", None), set(source.extra_keys)
    if shards is None:
        return sum(count * dtype.itemsize for _, dtype, count in _in_headers(source, extra))
    where = dict(chain.from_iterable(header.items() for header in shards.headers.values()))
    return sum(where[key][1] - where[key][0] for key in extra)  # the files themselves are not here


def _in_headers(source: Source, keys: Iterable[str]) -> Iterator[tuple[str, torch.dtype, int]]:
    """Of each tensor on disk its key, dtype and number of values."""
    left = set(keys)
    for file in reversed(untrusted.weight_files(source.folder)):  # what several hold is read from the last
        with safe_open(file, framework="pt") as opened:
            for key in left.intersection(opened.keys()):
                left.remove(key)
                piece = opened.get_slice(key)
                dtype = shard.dtype_of(piece.get_dtype(), f"{file}: {key}")
                yield key, dtype, math.prod(piece.get_shape())


def choose(groups: Sequence[Sensitivity], room: Room) -> Choice:
    """The schemes that lose least in what room there is.

    Raises:
        LowbitError: none fit (`find_room` would have said so).
    """
    options = [sorted(group.kl, key=lambda scheme: scheme.fineness) for group in groups]
    sizes = [[_bytes(g, scheme) for scheme in schemes] for g, schemes in zip(groups, options, strict=True)]
    losses = [[g.kl[scheme] for scheme in schemes] for g, schemes in zip(groups, options, strict=True)]
    taken = knapsack.solve(losses, sizes, room.bytes)
    if taken is None:
        raise LowbitError(f"{room.target} can't be met: give more")
    return Choice(
        list(groups), [schemes[number] for schemes, number in zip(options, taken, strict=True)], room
    )
