"""What a matrix has to make up for: the quantized model beside the original, matrix by matrix.

Two streams of activations run side by side, the quantized model's and the original's. Before a matrix is
rounded, both run on the same tokens, and the difference is what the matrix lacks:

- A matrix that *writes*, whose output is added to what the block carries on, can mend all that is wrong
  there. With everything behind it silent, the block's output is the sum of what was carried and what the
  matrix gives; the difference of the two sums is `W (X - x) + (R - r)`, X and x being its inputs and R
  and r what was carried.
- A matrix that *reads* (q/k/v, gate/up, an expert) lacks `W (X - x)`. Where the block has matrices that
  write, correcting those that read as well gains nothing (docs/LOG.md), so they are only observed, and
  the ones behind a writer in the same pass as the writer.

Whether a matrix writes is found by trying: its output is replaced by random numbers, and it writes if
the block's output moves by a multiple of exactly those. So residual multipliers need no special case,
and a block that normalizes the output first (Gemma 2) is told apart: its matrices only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit.calibration import Group
from lowbit.stream import Stream
from lowbit.topology import Matrix

TOLERANCE = 1e-3  # of the squared norm: far above bfloat16's rounding, far below a norm's effect


class Originals:
    """The weights of a block as they were; while active, they are back in it."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        places = {(matrix.owner, matrix.attribute) for matrix in matrices}
        self._kept = {place: getattr(*place).data.clone() for place in places}

    def _swap(self) -> None:
        for place, kept in self._kept.items():
            parameter = getattr(*place)
            self._kept[place], parameter.data = parameter.data, kept

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *reason: object) -> None:
        self._swap()


class Silence(TorchFunctionMode):
    """While active, products with `silent` matrices give zeros, and what any of `matrices` reads is kept.

    Attributes:
        seen: The last input of each matrix, `[..., in]`; those that had none are left out.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        silent: Sequence[Matrix],
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Where `replace` is given, it puts another output in place of that of the first matrix."""
        super().__init__()
        self.seen: dict[Matrix, Tensor] = {}
        self._matrix_at = {matrix.stored.data_ptr(): matrix for matrix in (*matrices, *silent)}
        self._first, self._silent, self._replace = matrices[0], set(silent), replace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, out = args[0], args[1], 0
        elif func is torch.addmm:
            x, weight, out = args[1], args[2], 1
        else:
            return func(*args, **(kwargs or {}))
        matrix = self._matrix_at.get(weight.data_ptr())
        if matrix is not None:
            self.seen[matrix] = x.detach()
        if matrix in self._silent:
            return x.new_zeros(*x.shape[:-1], weight.shape[out])
        result = func(*args, **(kwargs or {}))
        return self._replace(result) if self._replace and matrix is self._first else result


def stages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in order of use; experts of one stack are used side by side and form one stage."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.matrices[0].name, []).append(group)
    return list(found.values())


def find_writers(
    stream: Stream, block: int, batch: int, stages: Sequence[Sequence[Group]]
) -> dict[int, float]:
    """Stages whose output the block adds to what it carries on, by number, and the factor that it uses.

    Args:
        stream: Drives the block.
        block: Its number.
        batch: A short batch to try on.
        stages: In order of use; only a stage of a single matrix can write.
    """
    found = {}
    for number, stage in enumerate(stages):
        if len(stage) == 1 and len(stage[0].matrices) == 1:
            factor = _added_factor(
                stream, block, batch, stage[0].matrices[0], matrices_of(stages[number + 1 :])
            )
            if factor is not None:
                found[number] = factor
    return found


def sum_behind(
    stream: Stream, block: int, batch: int, stages: Sequence[Sequence[Group]], read: Tensor | None = None
) -> tuple[dict[Matrix, Tensor], Tensor]:
    """Run a block with all but the first of `stages`, and those before it, silent; `read` as in `Stream.run`.

    Returns:
        What each of their matrices reads, `[..., in]`, and the block's output, `[..., hidden]`.
    """
    with Silence(matrices_of(stages[:1]), matrices_of(stages[1:])) as silence:
        carried = stream.run(block, batch, read=read)
    return silence.seen, carried


def matrices_of(stages: Sequence[Sequence[Group]]) -> list[Matrix]:
    """All of them, in order."""
    return [matrix for stage in stages for group in stage for matrix in group.matrices]


def _added_factor(
    stream: Stream, block: int, batch: int, matrix: Matrix, later: Sequence[Matrix]
) -> float | None:
    with Silence([matrix], later, torch.zeros_like):
        silent = stream.run(block, batch).flatten(0, -2)
    carried = silent.float()
    if matrix.shape[0] != carried.shape[1]:
        return None
    noise = torch.randn(carried.shape, generator=torch.Generator().manual_seed(0)).to(carried.device)
    noise = (noise * carried.square().mean(1, keepdim=True).sqrt()).to(silent.dtype)
    with Silence([matrix], later, noise.view_as):
        moved = stream.run(block, batch).float().flatten(0, -2) - carried
    put = noise.float()
    factor = float((moved * put).sum() / put.square().sum().clamp(min=1e-30))
    left = float((moved - factor * put).square().sum())
    return factor if left < TOLERANCE * float(moved.square().sum()) else None
