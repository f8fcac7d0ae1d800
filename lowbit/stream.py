"""The model run one block at a time, on activations that are carried from block to block.

The model's own forward drives every block: it makes masks and position embeddings and passes each
block whatever that architecture passes. Blocks before the current one are stand-ins that hand their
input on; the current one receives the carried activations in place of its input; after it the
forward is stopped. So there is no copy of any model's calling convention here, and only the
activations (one tensor per batch, in the working precision) are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.carried import Carried
from lowbit.judge import head_input


class Stop(Exception):
    """Raised inside the model's forward once everything of interest has run."""


class Stream:
    """Carried activations of some batches of token ids.

    Attributes:
        batches: Token ids, int64 `[rows, length]` each; no padding.
        hidden: What the next block reads, `[rows, length, hidden]` each; None before the first block.
        extra_outputs: How many values a block returns beside its activations; -1: a bare tensor.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        batches: Sequence[Tensor],
        carried: Carried | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.batches = list(batches)
        self.hidden = carried or Carried(len(self.batches))
        self.extra_outputs = 0

    def run(self, block: int, batch: int, read: Tensor | None = None) -> Tensor:
        """Output of block number `block` for one batch; the carried activations stay as they are.

        `read`, where it is given, is what the block reads in place of them.
        """
        return self._drive(block, batch, read=read)[0]

    def visit(self, block: int, batch: int) -> None:
        """Run a block for whoever watches it, and may `Stop` it when he has seen enough."""
        self._drive(block, batch)

    def backward(self, block: int, batch: int, upstream: Tensor) -> Tensor:
        """Gradient at a block's input, from `upstream`, that at its output `[rows, length, hidden]`."""
        inputs: list[Tensor] = []
        with torch.enable_grad():
            (output,) = self._drive(block, batch, inputs)
        output.backward(upstream.to(output.dtype))
        grad = inputs[0].grad
        assert grad is not None
        return grad

    def _drive(
        self, block: int, batch: int, leaves: list[Tensor] | None = None, read: Tensor | None = None
    ) -> list[Tensor]:
        """Run one block and stop; `leaves` takes its input, cut off from what came before, for a gradient."""
        output: list[Tensor] = []
        forward = self.blocks[block].forward

        def run_and_stop(*args: Any, **kwargs: Any) -> Any:
            hidden = self.hidden[batch] if read is None else read
            args = self._substitute(args, kwargs, hidden, leaves)
            result = forward(*args, **kwargs)
            if isinstance(result, tuple):
                self.extra_outputs = len(result) - 1
                result = result[0]
            else:
                self.extra_outputs = -1
            output.append(result)
            raise Stop

        graph = torch.no_grad() if leaves is None else nullcontext()
        with self._stand_ins(block), replaced(self.blocks[block], run_and_stop), graph:
            try:
                self.model(input_ids=self.batches[batch], use_cache=False)
            except Stop:
                return output
        raise RuntimeError(f"{type(self.model).__name__} did not call its block {block}")

    def advance(self, block: int, batches: Iterable[int] | None = None) -> Iterator[int]:
        """Carry batches (all by default) over `block`, yielding each batch's number when it is through."""
        for batch in range(len(self.batches)) if batches is None else batches:
            self.hidden[batch] = self.run(block, batch)
            yield batch

    def logits(self, batch: int, leaf: Tensor | None = None) -> Tensor:
        """Logits of one batch after the last block (norm and head must be loaded).

        They are those of the carried activations; or, with a graph, of `leaf` in place of them.
        """
        graph = torch.no_grad() if leaf is None else torch.enable_grad()
        with self._behind_all(batch, leaf), graph:
            logits: Tensor = self.model(input_ids=self.batches[batch], use_cache=False).logits
        return logits

    def head_input(self, batch: int) -> Tensor:
        """What the output head reads of one batch after the last block (the norm must be loaded).

        Returns:
            `[rows, length, hidden]`.
        """
        with self._behind_all(batch), torch.no_grad():
            return head_input(self.model, self.batches[batch])

    @contextmanager
    def _behind_all(self, batch: int, leaf: Tensor | None = None) -> Iterator[None]:
        """While active, all blocks together give what is carried of a batch, or `leaf`."""

        def last_hidden(*args: Any, **kwargs: Any) -> Any:
            return self._as_output(self.hidden[batch] if leaf is None else leaf)

        last = len(self.blocks) - 1
        with self._stand_ins(last), replaced(self.blocks[last], last_hidden):
            yield

    def _substitute(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: Tensor | None,
        leaves: list[Tensor] | None,
    ) -> tuple[Any, ...]:
        if leaves is not None:
            given: Tensor = args[0] if args else kwargs["hidden_states"]
            hidden = (given if hidden is None else hidden).detach().requires_grad_()
            leaves.append(hidden)
        if hidden is None:
            return args
        if args:
            return (hidden, *args[1:])
        kwargs["hidden_states"] = hidden
        return args

    def _as_output(self, hidden: Any) -> Any:
        return hidden if self.extra_outputs < 0 else (hidden, *[None] * self.extra_outputs)

    @contextmanager
    def _stand_ins(self, until: int) -> Iterator[None]:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            return self._as_output(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for block in self.blocks[:until]:
                stack.enter_context(replaced(block, hand_on))
            yield


@contextmanager
def replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """While active, a module runs that in place of its own forward."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own method shows again
