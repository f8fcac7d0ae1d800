"""Who reads what in a block, and what is seen of it on the way.

While a block runs, every product with one of its weights is seen by a `TorchFunctionMode`, so
linear layers, `Conv1D` and experts sliced from a stacked parameter are observed by the same five
lines and no hook is left behind. Matrices that read the very same tensor (q/k/v, gate/up) are one
group with one Hessian. With several ranks every one sees its own batches, and `pool` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit import ranks
from lowbit.activations import round_rows
from lowbit.moments import Drift, Moment, Sample
from lowbit.stream import Stop
from lowbit.topology import Matrix

STARVED = "experts that saw fewer calibration tokens than they have inputs: take more --samples"


def operands(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Input and stored weight, where a call is the product of the two (linear layers and `Conv1D`)."""
    if func is torch.nn.functional.linear:
        return args[0], args[1]
    return (args[1], args[2]) if func is torch.addmm else None


class Products(TorchFunctionMode):
    """Calls `seen(matrix, weight, x)` for every product of an input with a weight.

    `matrix` is None where the weight is none of `matrices` (a router, for example).
    """

    def __init__(
        self, matrices: Sequence[Matrix], seen: Callable[[Matrix | None, Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self._matrix_at = {matrix.stored.data_ptr(): matrix for matrix in matrices}
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = operands(func, args)
        if product:
            x, weight = product
            self._seen(self._matrix_at.get(weight.data_ptr()), weight, x)
        return func(*args, **(kwargs or {}))


class Seen(NamedTuple):
    """Sizes of what one rank has seen of a group's input.

    Attributes:
        tokens: Of the moment.
        sampled: Rows of the sample.
        drift: Shape of the drift, where there is one.
        compared: Its tokens.
        of_outputs: Is it one of outputs?
        held_out: Were its tokens to judge by set aside on this rank?
    """

    tokens: int
    sampled: int
    drift: tuple[int, int] | None = None
    compared: int = 0
    of_outputs: bool = False
    held_out: bool = False


class Group:
    """Matrices that read one and the same tensor, and what is known of it.

    Attributes:
        matrices: The readers that can be quantized, in order of use.
        others: Weights of further readers.
        moment: The input's second moment.
        sample: Rows of it, where activations are rounded.
        drift: How far the two models are apart here; None where they were not compared.
        weights: What the tokens of a row count for, float32 `[length]`; None: all for one.
        pooled: Is it known what the other ranks have seen?
    """

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor | None = x
        self.matrices: list[Matrix] = []
        self.others: list[Tensor] = []
        self.moment = Moment(x.shape[-1], x.device)
        self.sample = Sample(x.shape[-1], x.device)
        self.drift: Drift | None = None
        self.weights: Tensor | None = None
        self.pooled = False

    def add(self, x: Tensor) -> None:
        """Take in what is read, `[rows, length, in]` or the same flat; an expert's tokens have no weights."""
        self.moment.add(self._weighed(x))

    def _weighed(self, x: Tensor) -> Tensor:
        """`x` times the root of what each token counts for, in its own precision: damping is coarser."""
        if self.weights is None:
            return x
        roots = self.weights.sqrt().to(x.dtype).unsqueeze(-1)
        return (x.reshape(-1, len(roots), x.shape[-1]) * roots).view_as(x)

    def release(self) -> None:
        """Let everything go but the number of tokens."""
        self.moment.release()
        self.drift = None

    def compare(self, x: Tensor, original: Tensor | None, held_out: bool) -> None:
        """Take in what the quantized model reads here, and the original for the same tokens.

        Experts of the two models may be given different tokens: then there is nothing to compare.
        """
        weighed = self._weighed(x)
        self.moment.add(weighed)
        if original is None or original.shape != x.shape or self.matrices[0].kind == "Expert":
            return
        if self.drift is None:
            self.drift = Drift(x.shape[-1], x.shape[-1], x.device)
        self.drift.add(weighed, self._weighed(original.float() - x.float()), held_out)

    def lacks(self, x: Tensor, gap: Tensor, held_out: bool) -> None:
        """Take in what is read here, and what the output of the only matrix lacks for the same tokens."""
        weighed = self._weighed(x)
        self.moment.add(weighed)
        if self.drift is None:
            self.drift = Drift(gap.shape[-1], x.shape[-1], x.device, of_outputs=True)
        self.drift.add(weighed, self._weighed(gap), held_out)

    def seen(self) -> Seen:
        """What the other ranks must know before they `pool`."""
        drift = self.drift
        if drift is None:
            return Seen(self.moment.tokens, len(self.sample.rows))
        shape = drift.total.shape[0], drift.total.shape[1]
        held_out = drift.held_out is not None
        return Seen(
            self.moment.tokens, len(self.sample.rows), shape, drift.tokens, drift.of_outputs, held_out
        )

    def pool(self, seen: Sequence[Seen], team: Sequence[int]) -> None:
        """Know what all ranks have seen, on those of a team that will round; `seen` is by rank."""
        self.pooled = True
        self.moment.pool(sum(one.tokens for one in seen), team)
        if any(one.sampled for one in seen):
            self.sample.pool()
        found = next((one for one in seen if one.drift), None)
        if found is None or found.drift is None:
            return
        if self.drift is None:  # no batch was this rank's
            self.drift = Drift(*found.drift, self.moment.total.device, found.of_outputs)
        holder = next((number for number, one in enumerate(seen) if one.held_out), None)
        self.drift.pool(sum(one.compared for one in seen), holder, team)

    def is_starved(self) -> bool:
        """Were there some tokens, but too few to tell an expert's inputs apart?"""
        first = self.matrices[0]
        return first.kind == "Expert" and 0 < self.moment.tokens < first.shape[1]

    def reads(self, x: Tensor) -> bool:
        """Is `x` the tensor of this group? Holding it until `release` keeps its address its own."""
        mine = self.x
        return mine is not None and (
            mine is x or (mine.data_ptr(), mine.shape, mine.stride()) == (x.data_ptr(), x.shape, x.stride())
        )


def find_groups(matrices: Sequence[Matrix], run: Callable[[], object]) -> list[Group]:
    """Run a block once and see which of its `matrices` share an input. Moments stay empty."""
    groups: list[Group] = []

    def seen(matrix: Matrix | None, weight: Tensor, x: Tensor) -> None:
        group = next((g for g in groups if g.reads(x)), None)
        if group is None:
            groups.append(group := Group(x))
        if matrix is None:
            group.others.append(weight.data)
        elif matrix not in group.matrices:
            group.matrices.append(matrix)

    with Products(matrices, seen):
        run()
    for group in groups:
        group.x = None
    found = [group for group in groups if group.matrices]
    # An expert that no token of this run reached is a group of its own.
    reached = {matrix for group in found for matrix in group.matrices}
    for matrix in matrices:
        if matrix not in reached and matrix.kind == "Expert":
            found.append(Group(torch.empty(0, matrix.shape[1], device=matrix.stored.device)))
            found[-1].x, found[-1].matrices = None, [matrix]
    return found


def pool(groups: Sequence[Group], teams: Sequence[Sequence[int]]) -> None:
    """Sum what the ranks have seen of each group's input, for the ranks of its team; once for each group."""
    waiting = [(group, team) for group, team in zip(groups, teams, strict=True) if not group.pooled]
    seen = ranks.gathered([group.seen() for group, _ in waiting])
    for number, (group, team) in enumerate(waiting):
        group.pool([one[number] for one in seen], team)
        if ranks.rank() not in team:
            group.release()


@contextmanager
def observe(groups: Sequence[Group], sampled_rows: int = 0) -> Iterator[None]:
    """While active, every group's moment takes in what the group's first matrix reads.

    So does its sample, which keeps `sampled_rows` rows of every call.
    """
    group_of = {group.matrices[0]: group for group in groups}

    def seen(matrix: Matrix | None, weight: Tensor, x: Tensor) -> None:
        if matrix in group_of and x.numel():
            group_of[matrix].add(x)
            if sampled_rows:
                group_of[matrix].sample.add(x, sampled_rows)

    with Products(list(group_of), seen):
        yield


class RoundedInputs(TorchFunctionMode):
    """While active, the inputs of `matrices` (all linear layers) are rounded as a packed layer does."""

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        super().__init__()
        self._addresses = {matrix.stored.data_ptr() for matrix in matrices}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and args[1].data_ptr() in self._addresses:
            args = (round_rows(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def watch(groups: Sequence[Group]) -> Iterator[dict[Matrix, Tensor]]:
    """While active, collects what the first matrix of every group reads; stops the block when all have.

    A matrix that reads more than once in a pass is told by its last input; one whose tokens never come
    (an expert) is left out, and the block runs to its end.
    """
    waiting = {group.matrices[0] for group in groups}
    found: dict[Matrix, Tensor] = {}

    def seen(matrix: Matrix | None, weight: Tensor, x: Tensor) -> None:
        if matrix in waiting:
            found[matrix] = x.detach()
            if len(found) == len(waiting):
                raise Stop

    with Products(list(waiting), seen):
        yield found
