"""What is remembered of a matrix's input: its second moment, once per shared input.

While a block runs, every product with one of its weights is seen by a `TorchFunctionMode`, so
linear layers, `Conv1D` and experts sliced from a stacked parameter are observed by the same five
lines and no hook is left behind. Matrices that read the very same tensor (q/k/v, gate/up) are one
group with one Hessian.

The Hessian of the layer-wise problem is `2 X X^T` (Frantar et al. 2022, arXiv:2210.17323, section
3); here it is the mean of `x x^T` over tokens, which has the same minimiser and a scale that does
not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit.activations import round_rows
from lowbit.hardware import bfloat16_products
from lowbit.stream import Stop
from lowbit.topology import Matrix

STARVED = "experts that saw fewer calibration tokens than they have inputs: take more --samples"
TILE = 1024  # columns per product: only tiles on and right of the diagonal are computed


class Moment:
    """Running mean of `x x^T` in float32.

    Only the upper triangle of tiles is accumulated (the rest is its mirror), which halves the work
    for wide inputs. Where activations are bfloat16, their float32 products are left to bfloat16
    matrix units: inputs and products are exact and the sum stays float32, so nothing is lost.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0
        self._is_mean = False

    def add(self, x: Tensor) -> None:
        """Take in activations `[..., in]` of any float dtype; not after `mean`."""
        assert not self._is_mean
        rows = x.detach().reshape(-1, x.shape[-1])
        self.tokens += len(rows)
        exact = rows.dtype == torch.bfloat16
        with bfloat16_products() if exact else nullcontext():
            rows = rows.float()
            for start in range(0, rows.shape[1], TILE):
                tile = rows[:, start : start + TILE]
                self.total[start : start + TILE, start:].addmm_(tile.T, rows[:, start:])

    def mean(self) -> Tensor:
        """The Hessian, float32 `[in, in]`, symmetric; zeros if no token was seen. Made in place."""
        if not self._is_mean:
            self._is_mean = True
            self.total.div_(max(self.tokens, 1))
            for start in range(0, len(self.total), TILE):
                stop = start + TILE
                square = self.total[start:stop, start:stop]
                square.copy_(square.triu() + square.triu(1).T)
                self.total[stop:, start:stop] = self.total[start:stop, stop:].T
        return self.total

    def rescale(self, scales: Tensor) -> None:
        """Follow a fold that divides the input by `scales [in]`."""
        self.total /= scales
        self.total /= scales.unsqueeze(-1)

    def release(self) -> None:
        """Let the memory go; the moment can't be used any more."""
        self.total = self.total.new_empty(0)


class Sample:
    """Some rows of an input, and how large each of its channels ever was."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.rows = torch.empty(0, in_features, device=device)
        self.peaks = torch.zeros(in_features, device=device)

    def add(self, x: Tensor, count: int) -> None:
        """Take in activations `[..., in]`, and keep about `count` of their rows, the first one included."""
        rows = x.detach().reshape(-1, x.shape[-1])
        torch.maximum(self.peaks, rows.abs().amax(0).float(), out=self.peaks)
        kept = rows[:: max(1, len(rows) // count)][:count]
        self.rows = torch.cat([self.rows.to(kept.dtype), kept])

    def release(self) -> None:
        """Let the memory go."""
        self.rows = self.rows.new_empty(0, self.rows.shape[1])


class Drift:
    """Running mean of `g x^T` in float32: how far the quantized model is from the original, against x.

    The gap g is either that of the inputs, `X - x`, or what the outputs lack.

    Args:
        rows: Length of a gap.
        in_features: Length of an input.
        device: Where to keep it.

    Attributes:
        held_out: `x` and g of tokens that were set aside, `[tokens, in]` and `[tokens, rows]`.
        of_outputs: Is g a gap of outputs?
    """

    def __init__(self, rows: int, in_features: int, device: torch.device, of_outputs: bool = False) -> None:
        self.total = torch.zeros(rows, in_features, device=device)
        self.tokens = 0
        self.of_outputs = of_outputs
        self.held_out: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, gap: Tensor, held_out: bool) -> None:
        """Take in inputs `[..., in]` of some tokens and their gaps `[..., rows]`, or keep them to judge by.

        The gap is small against what it is a difference of: it may be multiplied in bfloat16.
        """
        inputs, gap = x.detach().flatten(0, -2), gap.detach().flatten(0, -2)
        if held_out:
            self.held_out = inputs, gap.to(inputs.dtype)
            return
        self.tokens += len(inputs)
        with bfloat16_products() if inputs.dtype == torch.bfloat16 else nullcontext():
            self.total.addmm_(gap.float().T, inputs.float())

    def lacking(self, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the output of `weight [out, in]` lacks, as `Correction` takes it: mean and held-out tokens."""
        assert self.held_out is not None, "no tokens were set aside"
        mean, (x, gap) = self.total / max(self.tokens, 1), self.held_out
        if self.of_outputs:
            return mean, (x, gap.float())
        return weight @ mean, (x, gap.float() @ weight.T)


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


class Group:
    """Matrices that read one and the same tensor, and what is known of it.

    Attributes:
        matrices: The readers that can be quantized, in order of use.
        others: Weights of further readers.
        moment: The input's second moment.
        sample: Rows of it, where activations are rounded.
        drift: How far the two models are apart here; None where they were not compared.
    """

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor | None = x
        self.matrices: list[Matrix] = []
        self.others: list[Tensor] = []
        self.moment = Moment(x.shape[-1], x.device)
        self.sample = Sample(x.shape[-1], x.device)
        self.drift: Drift | None = None

    def compare(self, x: Tensor, original: Tensor | None, held_out: bool) -> None:
        """Take in what the quantized model reads here, and the original for the same tokens.

        Experts of the two models may be given different tokens: then there is nothing to compare.
        """
        self.moment.add(x)
        if original is None or original.shape != x.shape or self.matrices[0].kind == "Expert":
            return
        if self.drift is None:
            self.drift = Drift(x.shape[-1], x.shape[-1], x.device)
        self.drift.add(x, original.float() - x.float(), held_out)

    def lacks(self, x: Tensor, gap: Tensor, held_out: bool) -> None:
        """Take in what is read here, and what the output of the only matrix lacks for the same tokens."""
        self.moment.add(x)
        if self.drift is None:
            self.drift = Drift(gap.shape[-1], x.shape[-1], x.device, of_outputs=True)
        self.drift.add(x, gap, held_out)

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


@contextmanager
def observe(groups: Sequence[Group], sampled_rows: int = 0) -> Iterator[None]:
    """While active, every group's moment takes in what the group's first matrix reads.

    So does its sample, which keeps `sampled_rows` rows of every call.
    """
    group_of = {group.matrices[0]: group for group in groups}

    def seen(matrix: Matrix | None, weight: Tensor, x: Tensor) -> None:
        if matrix in group_of and x.numel():
            group_of[matrix].moment.add(x)
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
