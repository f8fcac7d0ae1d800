"""What a matrix has to make up for: the quantized model beside the original, matrix by matrix.

Two streams of activations run side by side, the quantized model's and the original's. Before a matrix is
rounded, both run on the same tokens, and the difference is what the matrix lacks:

- A matrix that *reads* (q/k/v, gate/up, an expert) lacks `W (X - x)`, X and x being its inputs.
- A matrix that *writes*, whose output is added to what the block carries on, can mend that too. With
  everything behind it silent, the block's output is the sum of what was carried and what the matrix
  gives; the difference of the two sums is `W (X - x) + (R - r)`, R and r being what was carried. Without
  the second term an error, once it is carried on, stays to the end of the model.

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
    """While active, products with `later` give zeros, and what `matrix` reads is kept.

    Attributes:
        x: The last input of `matrix`, `[..., in]`; None if it had none.
        replace: Puts another output in place of the one of `matrix`.
    """

    def __init__(
        self, matrix: Matrix, later: Sequence[Matrix], replace: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.x: Tensor | None = None
        self.replace = replace
        self._address = matrix.stored.data_ptr()
        self._silent = {other.stored.data_ptr() for other in later}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, out = args[0], args[1], 0
        elif func is torch.addmm:
            x, weight, out = args[1], args[2], 1
        else:
            return func(*args, **(kwargs or {}))
        address = weight.data_ptr()
        if address in self._silent:
            return x.new_zeros(*x.shape[:-1], weight.shape[out])
        result = func(*args, **(kwargs or {}))
        if address == self._address:
            self.x = x.detach()
            if self.replace is not None:
                result = self.replace(result)
        return result


def stages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in order of use; experts of one stack are used side by side and form one stage."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.matrices[0].name, []).append(group)
    return list(found.values())


def added_factor(
    stream: Stream, block: int, batch: int, stage: Sequence[Group], later: Sequence[Matrix]
) -> float | None:
    """By what factor the block adds the output of a stage to what it carries on; None if it doesn't.

    Args:
        stream: Drives the block.
        block: Its number.
        batch: A short batch to try on.
        stage: Only a stage of a single matrix can write.
        later: The matrices of all stages after it.
    """
    if len(stage) != 1 or len(stage[0].matrices) != 1:
        return None
    matrix = stage[0].matrices[0]
    with Silence(matrix, later, torch.zeros_like):
        carried = stream.run(block, batch).float().flatten(0, -2)
    if matrix.shape[0] != carried.shape[1]:
        return None
    noise = torch.randn(carried.shape, generator=torch.Generator().manual_seed(0)).to(carried.device)
    noise *= carried.square().mean(1, keepdim=True).sqrt()

    def put(output: Tensor) -> Tensor:
        nonlocal noise
        replaced = noise.to(output.dtype)
        noise = replaced.float()
        return replaced.view_as(output)

    with Silence(matrix, later, put):
        moved = stream.run(block, batch).float().flatten(0, -2) - carried
    factor = float((moved * noise).sum() / noise.square().sum().clamp(min=1e-30))
    left = float((moved - factor * noise).square().sum())
    return factor if left < TOLERANCE * float(moved.square().sum()) else None


def sum_behind(
    stream: Stream, block: int, batch: int, matrix: Matrix, later: Sequence[Matrix]
) -> tuple[Tensor, Tensor]:
    """What a writing matrix reads, `[..., in]`, and what is carried on behind it, `[..., hidden]`."""
    with Silence(matrix, later) as silence:
        carried = stream.run(block, batch)
    assert silence.x is not None, "a matrix that writes was seen in use"
    return silence.x, carried
