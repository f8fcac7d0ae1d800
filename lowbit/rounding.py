"""Rounding the matrices of a block: those that read one input together, shared out among the ranks.

Rows never meet while they are rounded, so what reads one input is stacked and cut again as it suits. With
several ranks each takes some of the inputs with all that reads them (experts, above all); an input that is
more than a rank's share of the work is everyone's, some rows each. A Hessian goes only where it is needed;
the result goes everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lowbit import ranks
from lowbit.algorithms import ALGORITHMS, CORRECTIONS
from lowbit.calibration import STARVED, Group, pool
from lowbit.hardware import bfloat16_products
from lowbit.moments import is_finite, output_errors
from lowbit.quantized import QuantizedWeight
from lowbit.results import Layer
from lowbit.scheme import QuantScheme
from lowbit.topology import Matrix

T = TypeVar("T")


class Task(NamedTuple):
    """Matrices to round that read the input of one group, and their grid."""

    group: Group
    members: list[Matrix]
    scheme: QuantScheme

    @property
    def shape(self) -> tuple[int, int]:
        """Of all of them, stacked."""
        return sum(matrix.shape[0] for matrix in self.members), self.members[0].shape[1]


class Part(NamedTuple):
    """Some rows of a task, rounded, and what that costs row by row (float32 `[rows]`)."""

    weight: QuantizedWeight
    lost: Tensor
    whole: Tensor
    note: str
    corrected: float | None = None


@dataclass(frozen=True)
class Rounder:
    """How matrices are rounded.

    Attributes:
        method: Key of `ALGORITHMS`.
        scale_dtype: dtype in which the format stores scales.
        device: Where the matrices are.
        rows: How many rows are rounded at once; None: all.
    """

    method: str
    scale_dtype: torch.dtype
    device: torch.device
    rows: int | None = None

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[tuple[QuantizedWeight, Layer]]]]:
        """Round task after task; what comes of each of its matrices. Moments are pooled, and let go."""
        shapes = [task.shape for task in tasks]
        teams = deal([float(width) ** 2 * (rows + width) for rows, width in shapes])
        teams = [team[:rows] for team, (rows, _) in zip(teams, shapes, strict=True)]
        pool([task.group for task in tasks], teams)

        def make(task: int, part: int) -> Part:
            return self._part(tasks[task], part, len(teams[task]))

        for task, team, own in zip(tasks, teams, each(teams, make), strict=True):
            yield task, self._whole(task, [self._from(task, p, team, own.get(p)) for p in range(len(team))])

    def _part(self, task: Task, number: int, parts: int) -> Part:
        """Round the rows that are one rank's own."""
        group, members, scheme = task
        hessian = group.moment.mean() if ALGORITHMS[self.method].NEEDS_HESSIAN else None
        stacked = torch.cat([matrix.weight for matrix in members]).float()
        drift, corrected = group.drift, None
        group.release()
        if drift is not None and drift.held_out is not None and drift.tokens and hessian is not None:
            stacked, corrected = CORRECTIONS[self.method](stacked, hessian, *drift.lacking(stacked))
        stacked = stacked.tensor_split(parts)[number]
        quantize = ALGORITHMS[self.method].quantize_weight
        at_once = stacked.split(self.rows or len(stacked))
        done, notes = zip(
            *(quantize(part, hessian, scheme, self.scale_dtype) for part in at_once), strict=True
        )
        weight = QuantizedWeight.stack_rows(done)
        return Part(weight, *row_errors(stacked, weight, hessian, self.rows), notes[0], corrected)

    def _from(self, task: Task, number: int, team: Sequence[int], own: Part | None) -> Part:
        """A part, on whatever rank it was made."""
        (total, width), scheme, by = task.shape, task.scheme, team[number]
        rows, groups = len(range(total)[number :: len(team)]), scheme.num_groups(width)
        shapes = [
            ((rows, width), torch.uint8), ((rows, groups), self.scale_dtype), ((rows, groups), torch.uint8),
            ((rows,), torch.float32), ((rows,), torch.float32),
        ]  # fmt: skip
        mine = own and [own.weight.codes, own.weight.scales, own.weight.zeros, own.lost, own.whole]
        codes, scales, zeros, lost, whole = ranks.handed(mine, by, self.device, shapes)
        note, corrected = ranks.told((own.note, own.corrected) if own else ("", None), by)
        return Part(QuantizedWeight(codes, scales, zeros, scheme), lost, whole, note, corrected)

    def _whole(self, task: Task, parts: Sequence[Part]) -> list[tuple[QuantizedWeight, Layer]]:
        """The parts put together, and cut into matrices again."""
        task.group.release()
        sizes = [matrix.shape[0] for matrix in task.members]
        weight = QuantizedWeight.stack_rows([part.weight for part in parts])
        note = parts[0].note or (STARVED if task.group.is_starved() else "")
        lost, whole = (torch.cat([getattr(part, name) for part in parts]).split(sizes)
                       for name in ("lost", "whole"))  # fmt: skip
        found = []
        for matrix, own, a, b in zip(task.members, weight.split_rows(sizes), lost, whole, strict=True):
            error = float(a.sum() / b.sum().clamp(min=1e-30))
            name, scheme, corrected = matrix.module_name, str(task.scheme), parts[0].corrected
            found.append((own, Layer(name, matrix.shape, scheme, error, note, corrected)))
        return found


def deal(costs: Sequence[float]) -> list[list[int]]:
    """Who works on each of some tasks: one rank, or all where a task is dearer than a rank's fair share.

    The dearest is dealt first, each to whoever has least to do.
    """
    everyone, fair = list(range(ranks.size())), sum(costs) / ranks.size()
    load, found = [0.0] * ranks.size(), [everyone for _ in costs]
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        if costs[task] <= fair:
            least = min(everyone, key=lambda number: load[number])
            load[least] += costs[task]
            found[task] = [least]
    return found


def each(teams: Sequence[Sequence[int]], make: Callable[[int, int], T]) -> Iterator[dict[int, T]]:
    """Task after task, what this rank made of it, by part; `make(task, part)` makes one part.

    With several ranks all of one's own are made before the first is asked for: nobody waits for another.
    """
    if ranks.size() == 1:
        yield from ({0: make(task, 0)} for task in range(len(teams)))
        return
    own = [{p: make(task, p) for p, whose in enumerate(team) if whose == ranks.rank()}
           for task, team in enumerate(teams)]  # fmt: skip
    for number in range(len(own)):
        yield own[number]
        own[number] = {}


def row_errors(
    original: Tensor, weight: QuantizedWeight, hessian: Tensor | None, at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """The diagonals of `D H D^T` and `W H W^T`, D the error of the weight W; H = I without data.

    Args:
        original: W, float32 `[rows, in]`.
        weight: W rounded.
        hessian: float32 `[in, in]`, or None.
        at_once: Rows that are dequantized at a time; None: all.
    """
    parts = original.split(at_once or len(original))
    blind = hessian is None or not is_finite(hessian) or not bool(hessian.any())
    lost: list[Tensor] = []
    whole: list[Tensor] = []
    for part, rounded in zip(parts, weight.split_rows([len(part) for part in parts]), strict=True):
        for found, value in ((lost, part - rounded.dequantize()), (whole, part)):
            with bfloat16_products():  # a report needs three digits, not seven
                found.append(
                    value.square().sum(1) if hessian is None or blind else output_errors(value, hessian)
                )
    return torch.cat(lost), torch.cat(whole)
