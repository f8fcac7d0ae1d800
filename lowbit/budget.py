"""A promise about memory, planned before the first block and refused where it can't be kept.

What a run holds at its worst moments is known from the shapes: the embeddings while they are copied; a
block with the second moments of its inputs while it is observed; one input's moment with its factors and
the rows that are rounded; the output head on the probe. The shapes are given, three things are not: how
many tokens run at once, how many rows of a matrix are rounded at once, and how much of the activations is
kept in memory. The largest of each that fits is taken, in that order of regret. The factors below count
copies that were measured (scripts/scale_report.py), and round up.

Matrices that read one input share a moment; which do is seen only when a block runs, so each is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowbit import pages, ranks
from lowbit.algorithms import ALGORITHMS, CORRECTIONS
from lowbit.checkpoint import parse_size
from lowbit.effort import Effort
from lowbit.errors import LowbitError
from lowbit.hardware import used_memory
from lowbit.plan import Plan
from lowbit.source import Source

TOKENS = (4096, 2048, 1024, 512, 256, 128)
ROWS = (None, 8192, 4096, 1024, 256)
SLACK = 150_000_000  # data sets, their libraries, and what the allocator can't give back
USUAL = 500_000_000  # what a run has resident before it begins; less is taken for it, so that runs plan alike
PROBE_TOKENS = 64
FACTORS = 4  # copies of a Hessian while it is factored
ROUNDING = 5  # float32 copies of the rows that are rounded at once


@dataclass(frozen=True)
class Budget:
    """What was chosen.

    Attributes:
        tokens: Tokens that run through a block at once; None: no limit was set.
        rows: Rows of a matrix that are rounded at once; None: all.
        carried: Bytes of activations kept in memory, the rest in files; None: all.
    """

    tokens: int | None = None
    rows: int | None = None
    carried: int | None = None


def keep_to(
    max_memory: str | None,
    source: Source,
    plan: Plan,
    method: str,
    seq_len: int,
    dial: Effort,
    kept: Mapping[str, int | None] | None = None,
) -> Budget:
    """The choice that keeps to `max_memory` (`8GB`); what holds a whole model in memory is refused.

    `kept` is what an earlier part of the run had chosen: other steps would make other bytes.
    """
    if max_memory is None:
        return Budget()
    if ranks.size() > 1:
        raise LowbitError(f"--max-memory {max_memory} is planned for one process: drop it, or torchrun")
    limit = parse_size(max_memory)
    if dial.training:
        mend = "leave out --method qat" if dial.weights else "use --effort balanced"
        raise LowbitError(f"--max-memory: training holds the whole model in memory: {mend}")
    if dial.dataset == "self" and ALGORITHMS[method].NEEDS_HESSIAN:
        raise LowbitError("--max-memory: writing text takes the whole model in memory: give --dataset")
    pages.return_large()
    if kept:
        return Budget(**kept)
    return find_budget(source, plan, method, dial.samples, seq_len, limit, used_memory())


def find_budget(
    source: Source, plan: Plan, method: str, samples: int, seq_len: int, limit: int, used: int
) -> Budget:
    """The most generous choice that stays below `limit` bytes.

    Args:
        source: The opened model.
        plan: What is quantized.
        method: Key of `ALGORITHMS`.
        samples: Calibration sequences.
        seq_len: Tokens of each.
        limit: Bytes that the process may have resident.
        used: Bytes that it has now.

    Raises:
        LowbitError: nothing fits; the message has the smallest limit that would do.
    """
    need = _Need(source, plan, method, samples * seq_len)
    used = max(used, USUAL) + SLACK
    for rows in ROWS:
        for tokens in sorted(
            {min(max(count, seq_len), need.tokens or seq_len) for count in TOKENS}, reverse=True
        ):
            left = limit - used - need.peak(tokens, rows)
            if left >= need.activations(2 * tokens):
                return Budget(tokens, rows, left)
    smallest = used + need.peak(seq_len, ROWS[-1]) + need.activations(2 * seq_len)
    raise LowbitError(
        f"--max-memory {limit / 1e9:.2f}GB is too little for this model with {method} and "
        f"--seq-len {seq_len}: use {smallest / 1e9 + 0.005:.2f}GB or more"
    )


class _Need:
    """Bytes at the worst moments, beyond what the process had at the start."""

    def __init__(self, source: Source, plan: Plan, method: str, tokens: int) -> None:
        model = source.model
        self.width = torch.finfo(source.dtype).bits // 8
        self.calibrated, self.corrected = ALGORITHMS[method].NEEDS_HESSIAN, method in CORRECTIONS
        self.tokens = tokens if self.calibrated else 0
        inside = {id(p) for p in plan.blocks.parameters()}
        outside = [p.numel() for p in model.parameters() if id(p) not in inside]
        self.largest = max(outside, default=0) * self.width
        mapped = source.dtype == source.stored_dtype
        self.embedding = 0 if mapped else sum(outside) * self.width
        head = model.get_output_embeddings()
        self.vocabulary = head.weight.shape[0] if head is not None else 0
        self.hidden = head.weight.shape[1] if head is not None else 0
        self.head = self.vocabulary * self.hidden * (self.width + (12 if plan.head else self.width))
        self.block = max(sum(p.numel() for p in block.parameters()) for block in plan.blocks) * self.width
        found = [plan.matrices(number) for number in range(len(plan.blocks))]
        self.shapes = {tuple(m.shape for m in block if m.module_name not in plan.skipped) for block in found}

    def activations(self, tokens: int) -> int:
        """Of so many tokens, and of their twins where the method compares."""
        return tokens * self.hidden * self.width * (2 if self.corrected else 1) * self.calibrated

    def peak(self, tokens: int, rows: int | None) -> int:
        """The worst moment."""
        rare = min(self.largest, self.tokens * self.hidden * self.width)  # rows of a mapped embedding
        block = max(self._block(shapes, tokens, rows) for shapes in self.shapes)
        return self.embedding + max(2 * self.largest, rare + block, self._end())

    def _block(self, shapes: tuple[tuple[int, int], ...], tokens: int, rows: int | None) -> int:
        widest = max((n for _, n in shapes), default=0)
        tallest = max((m for m, _ in shapes), default=0)
        run = (
            (tokens if self.calibrated else PROBE_TOKENS) * (12 * self.hidden + 4 * tallest + 2 * widest) * 2
        )
        weights = self.block * (2 if self.corrected else 1)
        if not self.calibrated:
            return weights + run + max((5 * 4 * m * n for m, n in shapes), default=0)
        moments = sum(4 * n * n for _, n in shapes)
        if self.corrected:  # one stage at a time, moment and drift
            moments = 2 * max(4 * n * n for _, n in shapes)
            run += tokens * widest * 16
        together = 0
        for m, n in shapes:
            stacked = m * min(3, sum(1 for _, other in shapes if other == n))  # q/k/v at most read one input
            parts = ROUNDING * min(stacked, rows or stacked) + 3 * stacked
            together = max(together, 4 * n * (FACTORS * n + parts))
        return weights + moments + max(run, together)

    def _end(self) -> int:
        return self.head + self.block + PROBE_TOKENS * self.vocabulary * (self.width + 12)
