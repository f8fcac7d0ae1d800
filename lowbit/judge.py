"""How far a model is from what it should be, from the inputs of its output head, with gradients.

The vocabulary is large, and logits of a whole batch in float32 would be the largest tensor of all. So the
head is not part of the graph: the model runs up to its head, a few tokens at a time go through the head
and the loss, and the gradients with respect to the head's inputs go back through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.errors import LowbitError

LOGIT_BYTES = 2**26  # of float32 logits made at a time
NO_TARGET = -100  # in place of a next token, where there is none


class _Stop(Exception):
    """Raised once the input of the head is known."""


def head_inputs(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the output head reads, `[rows, length, hidden]`, for each batch of token ids."""
    with torch.no_grad():
        for batch in batches:
            yield head_input(model, batch)


def head_input(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The head's input, with its graph where gradients are on; the head itself is not run."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    except _Stop:
        return seen[0]
    finally:
        hook.remove()
    raise RuntimeError(f"{type(model).__name__} did not call its output head")


def next_tokens(rows: Tensor) -> Tensor:
    """What follows each token of `rows [rows, length]`; `NO_TARGET` at the end of a row."""
    return nn.functional.pad(rows[:, 1:], (0, 1), value=NO_TARGET)


class Judge:
    """The divergence from the original, from the inputs of both heads; or from a text.

    The head is kept as it is at the start: it is not trained, and it is the original's own unless the
    user asked for fewer bits, which the loss then can't see.
    """

    def __init__(self, model: PreTrainedModel, probe: Tensor) -> None:
        self.head = model.get_output_embeddings()
        self.finish = _logit_map(model, probe)
        vocabulary = self.head.weight.shape[0]
        self.tokens_at_once = max(16, LOGIT_BYTES // (4 * vocabulary))

    def divergence(self, own: Tensor, target: Tensor) -> Tensor:
        """Sum over tokens of `KL(original || own)`, from head inputs `[tokens, hidden]`.

        Where `target` is int64 `[tokens]`, the `next_tokens` of a text, of `-log own(target)`: the same,
        with a distribution that has all its weight on one token.
        """
        q = self.finish(self.head(own)).float().log_softmax(-1)
        if not target.is_floating_point():
            return nn.functional.nll_loss(q, target, ignore_index=NO_TARGET, reduction="sum")
        with torch.no_grad():
            p = self.finish(self.head(target)).float().log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)

    def step(self, model: PreTrainedModel, ids: Tensor, target: Tensor) -> float:
        """Gradients of the mean divergence; returns it. A few tokens' logits are in memory at a time."""
        inputs = head_input(model, ids)
        flat, wanted = inputs.detach().flatten(0, -2), target.to(inputs.device).flatten(0, 1)
        gradient, total, tokens = torch.empty_like(flat), 0.0, _count(wanted)
        for start in range(0, len(flat), self.tokens_at_once):
            part = slice(start, start + self.tokens_at_once)
            leaf = flat[part].requires_grad_(True)
            loss = self.divergence(leaf, wanted[part]) / tokens
            (gradient[part],) = torch.autograd.grad(loss, leaf)
            total += float(loss.detach())
        inputs.backward(gradient.view_as(inputs))
        return total

    @torch.no_grad()
    def mean(self, model: PreTrainedModel, ids: Tensor, targets: Sequence[Tensor], rows: range) -> float:
        """Mean divergence over some rows, in nats per token."""
        total, tokens = 0.0, 0
        for row in rows:
            own, wanted = head_input(model, ids[row : row + 1])[0], targets[row]
            for start in range(0, len(own), self.tokens_at_once):
                part = slice(start, start + self.tokens_at_once)
                total += float(self.divergence(own[part], wanted[part].to(own.device)))
            tokens += _count(wanted)
        return total / tokens


def _count(target: Tensor) -> int:
    return len(target) if target.is_floating_point() else int((target != NO_TARGET).sum())


@torch.no_grad()
def _logit_map(model: PreTrainedModel, probe: Tensor) -> Callable[[Tensor], Tensor]:
    """What the model does between its head and its logits: nothing, a factor, or a soft cap.

    Raises:
        LowbitError: something else.
    """
    probe = probe[:, :32]
    raw = model.get_output_embeddings()(head_input(model, probe)).float()
    logits = model(input_ids=probe.to(model.device), use_cache=False).logits.float()
    factor = float((logits * raw).sum() / raw.square().sum().clamp(min=1e-30))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    maps: list[Callable[[Tensor], Tensor]] = [lambda z: z, lambda z: z * factor]
    if cap:
        maps.append(lambda z: cap * torch.tanh(z / cap))
    for candidate in maps:
        if (candidate(raw) - logits).abs().max() <= 0.02 * logits.abs().max():
            return candidate
    raise LowbitError(
        f"{type(model).__name__} makes its logits in an unknown way and can't be trained: "
        "use --effort balanced, without --method qat"
    )
