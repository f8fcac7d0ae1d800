"""Block after block: load, observe, rewrite, round, write back, carry on, free.

The inputs of a block are the outputs of the quantized blocks before it, so an error made early is
seen, and made up for, by everything after it (but for methods of `ONE_PASS`, which are in a hurry). One block
is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import pages, ranks, reach, topology
from lowbit.algorithms import ALGORITHMS, CORRECTIONS, ONE_PASS, REWRITES, smooth
from lowbit.calibration import Group, RoundedInputs, find_groups, observe, pool
from lowbit.pair import Pair
from lowbit.plan import Plan, align
from lowbit.progress import Progress
from lowbit.quantized import QuantizedWeight
from lowbit.results import Layer
from lowbit.rounding import Rounder, Task
from lowbit.scheme import QuantScheme
from lowbit.source import Source, free
from lowbit.stream import Stream
from lowbit.topology import Matrix

SAMPLED_ROWS = 512
"""Rows of each input that are kept where activations are rounded, over all batches."""

UNCUT = "a block could not be cut behind attention: it ran whole in every pass, which takes longer"
"""A note; see `halves.py`."""


@dataclass(frozen=True)
class QuantizedBlock:
    """One block on its way to disk.

    Attributes:
        weights: Quantized weights by module name on disk.
        tensors: Everything else of the block, by name on disk; None means "as in the source".
        layers: One report per matrix.
        fingerprints: `fingerprint` of each dequantized weight, by module name in the model.
        notes: What the summary must say.
    """

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, Tensor | None]
    layers: list[Layer]
    fingerprints: dict[str, bytes]
    notes: list[str]


class BlockQuantizer:
    """Quantizes the blocks of one model in order.

    Args:
        source: The opened model; everything outside the blocks that a forward needs is loaded.
        plan: What to quantize. Reasons for what could not be are added to it.
        stream: The batches: calibration data, the probe (carried along, it serves to verify what was
            written) and, where the method corrects, the calibration data again: these twins carry
            what the original model computes.
        method: Key of `ALGORITHMS`.
        scale_dtype: dtype in which the format stores scales.
        device: Where blocks are loaded.
        progress: Told about every batch and matrix.
        start: Number of the first block; those before it are done, and the stream is beyond them.
        rows: How many rows of a matrix are rounded at once; None: all.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        stream: Stream,
        method: str,
        scale_dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
        start: int = 0,
        rows: int | None = None,
    ) -> None:
        self.source, self.plan, self.stream, self.method = source, plan, stream, method
        self.device, self._progress = device, progress
        self._rounder = Rounder(method, scale_dtype, device, rows)
        self._rounds_inputs = plan.scheme.activation_bits is not None
        self._calibrated, self._corrected = ALGORITHMS[method].NEEDS_HESSIAN, method in CORRECTIONS
        self._probe = len(stream.batches) // 2 if self._corrected else len(stream.batches) - 1
        self._mine = ranks.share(self._probe)
        self._once = method in ONE_PASS
        passes = len(self._mine) * (self._calibrated + 1 + self._corrected - self._once) + 1
        self._steps, self._step = passes * len(plan.blocks), passes * start
        self._start = start

    def __iter__(self) -> Iterator[QuantizedBlock]:
        """Quantize block after block; each is freed when the next one is asked for."""
        for number in range(self._start, len(self.plan.blocks)):
            self.source.load(self.source.keys_under([self._path(number)]), self.device)
            yield self._quantize(number)
            free(self.plan.blocks[number])
            self.source.rest()

    def _path(self, number: int) -> str:
        return f"{self.plan.path}.{number}"

    def _tell(self, number: int, what: str, steps: int = 0) -> None:
        self._step += steps
        where = f"block {number + 1}/{len(self.plan.blocks)}: {what}"
        self._progress("quantize", self._step, self._steps, where)

    def _quantize(self, number: int) -> QuantizedBlock:
        matrices = self.plan.matrices(number)
        groups = find_groups(matrices, lambda: self.stream.run(number, self._probe))
        ranks.alike(
            "order of layers", [[matrix.module_name for matrix in group.matrices] for group in groups]
        )
        notes = align(self.plan, [[matrix.module_name for matrix in group.matrices] for group in groups])
        idle = not any(self._members(group) for group in groups)  # all of the block is skipped
        if self._calibrated and not idle:
            reach.weigh(self.stream, number, self._probe, groups)
        rewritten = self._calibrated and (self._rounds_inputs or self.method in REWRITES) and not idle
        quantized: dict[Matrix, QuantizedWeight] = {}
        layers: list[Layer] = []
        if idle:
            self._carry_all(number)
        elif self._corrected:
            quantized, layers, uncut = self._correct_and_round(number, matrices, groups)
            notes += [UNCUT] if uncut else []
            if number == 0 and self._probe < 2:
                notes.append(
                    f"{self.method} needs 2 calibration sequences to correct anything: none corrected"
                )
        else:
            if self._calibrated:
                self._observe(number, groups)
            if rewritten:
                notes += self._rewrite(number, groups)
            quantized, layers = self._round(number, groups)
        for matrix in matrices:
            if matrix not in quantized:
                self.plan.skipped.setdefault(matrix.module_name, "the block's forward never multiplies by it")
        with RoundedInputs(quantized) if self._rounds_inputs else nullcontext():
            done = idle or self._corrected or self._once
            self._advance(number, [self._probe] if done else [*self._mine, self._probe])
        if not ranks.is_first():  # who writes nothing needs no more
            return QuantizedBlock({}, {}, [], {}, [])
        return QuantizedBlock(
            weights=_on_disk(self.source, quantized),
            tensors=self._rest(number, {matrix.name for matrix in quantized}, rewritten),
            layers=layers,
            fingerprints={m.module_name: fingerprint(w.dequantize()) for m, w in quantized.items()},
            notes=notes,
        )

    def _advance(self, number: int, batches: Sequence[int]) -> None:
        for _ in self.stream.advance(number, batches):
            self._tell(number, "carrying on", 1)

    def _carry_all(self, number: int) -> None:
        """Carry every batch over a block in which nothing is rounded, so that nothing is looked at."""
        self._tell(number, "nothing to round", len(self._mine) * (self._calibrated - self._once))
        self._advance(number, self._mine)
        if self._corrected:
            self._advance(number, [self._probe + 1 + batch for batch in self._mine])

    def _correct_and_round(
        self, number: int, matrices: Sequence[Matrix], groups: Sequence[Group]
    ) -> tuple[dict[Matrix, QuantizedWeight], list[Layer], bool]:
        """Stage by stage: see what a layer lacks beside the original, correct, round. Then carry on.

        The last value says whether all of the block ran every time; see `Pair.uncut`.
        """
        quantized: dict[Matrix, QuantizedWeight] = {}
        layers: list[Layer] = []
        with Pair(self.stream, number, self._probe, self._mine, matrices, groups) as pair:
            count, batches = len(pair.stages), len(self._mine)
            for done, stage in enumerate(pair.stages):
                pair.look(done)
                self._tell(number, "observing", batches * (done + 1) // count - batches * done // count)
                weights, reports = self._round(number, stage)
                quantized |= weights
                layers += reports
                pair.rounded(done)
            pair.carry_twins()
            self._tell(number, "carrying on", batches)
            for _ in pair.carry():
                self._tell(number, "carrying on", 1)
        return quantized, layers, pair.uncut

    def _observe(self, number: int, groups: Sequence[Group]) -> None:
        rows = max(1, SAMPLED_ROWS // self._probe) if self._rounds_inputs else 0
        with observe([group for group in groups if self._members(group)], rows):
            for batch in self._mine:
                if self._once:
                    self.stream.hidden[batch] = self.stream.run(number, batch)
                else:
                    self.stream.run(number, batch)
                self._tell(number, "observing", 1)

    def _rewrite(self, number: int, groups: Sequence[Group]) -> list[str]:
        """Fold channel scales into the block where that pays; the Hessians follow. Notes what can't be."""
        pool(groups, [range(ranks.size())] * len(groups))
        wanted = {g.matrices[0]: g for g in groups if self._members(g)}
        readers = [(g.matrices, g.others) for g in wanted.values()]
        folds = topology.find_folds(
            self.plan.blocks[number], readers, lambda: self.stream.run(number, self._probe)
        )
        ranks.alike("set of folds", [[matrix.module_name for matrix in fold.consumers] for fold in folds])
        for fold in folds:
            group = wanted[fold.consumers[0]]
            scales = self._agreed(self._find_scales(group))
            self._tell(number, f"scaled the input of {group.matrices[0].module_name}")
            if scales is not None:
                fold.apply(scales)
                group.moment.rescale(scales)
            pages.trim()
        folded = {fold.consumers[0] for fold in folds}
        return [
            f"{matrix.module_name}: nothing before it can take channel scales; clipped and rounded only"
            for matrix in wanted
            if matrix not in folded
        ]

    def _agreed(self, scales: Tensor | None) -> Tensor | None:
        """Those of the first rank: a weight must be scaled alike everywhere."""
        if not ranks.told(scales is not None):
            return None
        return ranks.handed(None if scales is None else [scales], 0, self.device)[0]

    def _find_scales(self, group: Group) -> Tensor | None:
        members = self._members(group)
        weights = [matrix.weight for matrix in members]
        scheme, dtype = self.plan.scheme_of(members[0].module_name), self._rounder.scale_dtype
        if not self._rounds_inputs:
            return REWRITES[self.method](weights, group.moment.mean(), scheme, dtype)
        scales = smooth.find_channel_scales(weights, group.sample.rows, group.sample.peaks, scheme, dtype)
        group.sample.release()
        return scales

    def _members(self, group: Group) -> list[Matrix]:
        return [matrix for matrix in group.matrices if matrix.module_name not in self.plan.skipped]

    def _round(
        self, number: int, groups: Sequence[Group]
    ) -> tuple[dict[Matrix, QuantizedWeight], list[Layer]]:
        """Round every matrix and write it back, dequantized as a loader in bfloat16 does it."""
        quantized: dict[Matrix, QuantizedWeight] = {}
        layers: list[Layer] = []
        wanted = ((group, self._members(group)) for group in groups)
        tasks = [Task(group, members, self.plan.scheme_of(members[0].module_name))
                 for group, members in wanted if members]  # fmt: skip
        for task, done in self._rounder.each(tasks):
            for matrix, (weight, layer) in zip(task.members, done, strict=True):
                quantized[matrix] = weight
                layers.append(layer)
                matrix.weight.copy_(weight.dequantize(torch.bfloat16))
                where = layer.name.removeprefix(f"{self._path(number)}.")
                self._tell(number, f"{where} error {layer.error:.2e}")
            pages.trim()
        return quantized, layers

    def _rest(self, number: int, done: Collection[str], rewritten: bool) -> dict[str, Tensor | None]:
        """Norms, biases, routers, skipped weights: as in the source, unless a rewrite touched the block."""
        path = self._path(number)
        if not rewritten:
            keys = self.source.keys_under([path])
            return {key: None for key in keys if self.source.parameter_of(key) not in done}
        tensors = self.plan.blocks[number].state_dict(prefix=f"{path}.")  # with what is saved of its buffers
        return dict(self.source.names_on_disk({n: t for n, t in tensors.items() if n not in done}))


def _on_disk(source: Source, quantized: Mapping[Matrix, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """Quantized weights under the names of the source's files; stacked experts are taken apart there."""
    alike: dict[QuantScheme, dict[str, list[QuantizedWeight]]] = {}
    # Experts in order: those that no token of the probe reached were quantized last.
    for matrix, weight in sorted(quantized.items(), key=lambda item: item[0].index or 0):
        alike.setdefault(weight.scheme, {}).setdefault(matrix.name, []).append(weight)

    def renamed(by_parameter: Mapping[str, list[QuantizedWeight]], field: str) -> dict[str, Tensor]:
        tensors = {}
        for name, weights in by_parameter.items():
            parts = [getattr(weight, field) for weight in weights]
            tensors[name] = parts[0] if len(parts) == 1 else torch.stack(parts)
        return source.names_on_disk(tensors)

    found = {}
    for scheme, by_parameter in alike.items():
        codes, scales, zeros = (renamed(by_parameter, field) for field in ("codes", "scales", "zeros"))
        for key in codes:
            name = key.removesuffix(".weight")
            found[name] = QuantizedWeight(codes[key], scales[key], zeros[key], scheme)
    return found


def fingerprint(weight: Tensor) -> bytes:
    """Digest of a weight's bfloat16 bits, to prove that what was read is what was written."""
    bits = weight.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
    return hashlib.blake2b(bits.tobytes(), digest_size=16).digest()
