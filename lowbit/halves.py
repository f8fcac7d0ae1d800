"""A block in two halves: up to the sum behind a matrix that writes, and from there on.

While a block is corrected its matrices are looked at one stage after the other, and much of every run is
known or not asked for: attention while the MLP is looked at, the MLP while attention is. Once a matrix
that writes is rounded, the sum behind it can be carried in place of the block's input, and the modules that
made it be left out; before, those behind it can. What is left out gives zeros, which change no sum.

No architecture is known here. A half is the smallest module that holds its matrices (`self_attn`, `mlp`),
and whether a block can be cut so is found by trying on a short batch: the numbers must be the block's own, to
the bit. They are not where attention and MLP stand side by side and read the same norm; such a block is run
whole every time, and the run's notes say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit import correction
from lowbit.calibration import Group
from lowbit.stream import Stream, replaced
from lowbit.topology import Matrix


class Half(NamedTuple):
    """A module that can be left out.

    Attributes:
        module: What gives zeros then.
        widths: Of each tensor that it returns beside its input's other dimensions; None for a value that is
            None.
        is_tuple: Does it return a tuple?
    """

    module: nn.Module
    widths: tuple[int | None, ...]
    is_tuple: bool

    @contextmanager
    def silent(self, instead: Tensor | None = None) -> Iterator[list[Tensor]]:
        """While active the module gives zeros, or `instead`; its last input stands in the list."""
        given: list[Tensor] = []

        def give(*args: Any, **kwargs: Any) -> Any:
            given[:] = [x := _first_tensor(args, kwargs)]
            found = [width and x.new_zeros(*x.shape[:-1], width) for width in self.widths]
            if instead is not None:
                found[0] = instead.view(*x.shape[:-1], -1)
            return tuple(found) if self.is_tuple else found[0]

        with replaced(self.module, give):
            yield given


class Halves(NamedTuple):
    """Where a block is cut.

    Attributes:
        writer: Number of the stage behind whose sum that is.
        head: Holds that stage and those before it.
        tail: Holds the stages behind it, the first of which is one input: the module's own. None where there
            is no such module.
        head_direct: Does the head give what the writer gives, unchanged?
        tail_direct: Does the tail give what the last matrix gives, unchanged?
    """

    writer: int
    head: Half
    tail: Half | None = None
    head_direct: bool = False
    tail_direct: bool = False

    def sum_behind(
        self,
        stream: Stream,
        block: int,
        batch: int,
        stages: Sequence[Sequence[Group]],
        known: Tensor | None = None,
    ) -> tuple[dict[Matrix, Tensor], Tensor]:
        """`correction.sum_behind` for `stages` from the writer on; what is behind it does not run.

        `known`, where the head is direct, is what the writer reads: then what is before it does not run.
        """
        with ExitStack() as stack:
            given = stack.enter_context(self.tail.silent()) if self.tail else []
            if known is not None:
                stack.enter_context(self.head.silent(_product(stages[0][0].matrices[0], known)))
            seen, carried = correction.sum_behind(stream, block, batch, stages)
        if given:
            seen[stages[1][0].matrices[0]] = given[0].detach()
        return seen, carried

    def output_behind(
        self, stream: Stream, block: int, batch: int, last: Matrix, known: Tensor, read: Tensor | None = None
    ) -> Tensor:
        """The block's output where the head is silent, the tail direct, and its last matrix reads `known`."""
        assert self.tail is not None
        with self.tail.silent(_product(last, known)):
            return stream.run(block, batch, read=read)


def _product(matrix: Matrix, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = matrix.owner(x)
    return result


def find_halves(
    stream: Stream, block: int, batch: int, stages: Sequence[Sequence[Group]], writer: int
) -> Halves | None:
    """Where a block can be cut behind the stage `writer`; None if it can't.

    Args:
        stream: Drives the block.
        block: Its number.
        batch: A short batch to try on.
        stages: In order of use.
        writer: Number of a stage that writes, and is not the last.
    """
    module = stream.blocks[block]
    early, late = (correction.matrices_of(part) for part in (stages[: writer + 1], stages[writer + 1 :]))
    head = _half(module, early, late, stream, block, batch)
    if head is None:
        return None
    whole = stream.run(block, batch)
    seen, carried = correction.sum_behind(stream, block, batch, stages[writer:])
    with head.silent():
        again = stream.run(block, batch, read=carried)
    if not torch.equal(whole, again):
        return None
    cut = Halves(writer, head)
    tail = _half(module, late, early, stream, block, batch) if len(stages[writer + 1]) == 1 else None
    if tail is not None:
        longer = cut._replace(tail=tail)
        own, alone = longer.sum_behind(stream, block, batch, stages[writer:])
        if _alike(carried, alone) and all(_alike(seen[matrix], own[matrix]) for matrix in own):
            cut = longer
    known = seen[stages[writer][0].matrices[0]]
    if head.widths[0] == carried.shape[-1]:  # else its result is none that is added
        _, alone = cut.sum_behind(stream, block, batch, stages[writer:], known)
        cut = cut._replace(head_direct=_alike(carried, alone))
    if cut.tail and _is_one_product(stages[-1]) and cut.tail.widths[0] == carried.shape[-1]:
        last = late[-1]
        with head.silent():
            seen, _ = correction.sum_behind(stream, block, batch, stages[-1:], read=carried)
            found = cut.output_behind(stream, block, batch, last, seen[last], carried)
        cut = cut._replace(tail_direct=_alike(whole, found))
    return cut


def _is_one_product(stage: Sequence[Group]) -> bool:
    """Is it one matrix, and a module of its own?"""
    return [matrix.kind == "Expert" for group in stage for matrix in group.matrices] == [False]


def _alike(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten(0, -2), b.flatten(0, -2))


def _half(
    block: nn.Module, own: Sequence[Matrix], others: Sequence[Matrix], stream: Stream, number: int, batch: int
) -> Half | None:
    """The smallest module within a block that holds all of `own` and none of `others`."""
    for module in reversed(list(block.modules())[1:]):  # what is inside comes first
        inside = set(module.modules())
        if all(matrix.owner in inside for matrix in own):
            break
    else:
        return None
    if any(matrix.owner in inside for matrix in others):
        return None
    calls: list[tuple[Tensor, Any]] = []
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        calls.append((_first_tensor(args, kwargs), result))
        return result

    with replaced(module, watched):
        stream.run(number, batch)
    if len(calls) != 1:
        return None
    x, result = calls[0]
    found = result if isinstance(result, tuple) else (result,)
    if not all(value is None or _stands_beside(value, x) for value in found):
        return None
    widths = tuple(None if value is None else value.shape[-1] for value in found)
    return Half(module, widths, isinstance(result, tuple))


def _stands_beside(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:-1] == x.shape[:-1] and value.dtype == x.dtype


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module reads: the first tensor that it is given."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
