"""Where a model diverges from its original: how KL spreads over tokens, and the passages where it is worst.

A mean of 0.05 nats can be 0.05 at every token, or nothing at most of them and 5 at one in a hundred;
the second is what a reader notices. `Divergence` watches an evaluation and keeps a histogram over
fixed logarithmic bins and the worst passage of each of the worst windows, so memory does not
grow with the text.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOWEST, HIGHEST, PER_DECADE = -7, 2, 8  # powers of ten of nats, and bins in each
SPAN = 48  # tokens of a passage
PASSAGES = 6  # passages kept
EDGES = torch.logspace(LOWEST, HIGHEST, (HIGHEST - LOWEST) * PER_DECADE + 1, dtype=torch.float64)


@dataclass(frozen=True, order=True)
class Passage:
    """Some tokens in a row, with the divergence at each.

    Attributes:
        kl: Mean over its tokens, nats.
        window: Number of the window that it was found in.
        start: Position of its first token there.
        ids: Its tokens, `[n]`.
        token_kl: KL of the two predictions of each token, nats, `[n]`.
        expected: The original's most likely token in each place, `[n]`.
        got: The quantized model's, `[n]`.
    """

    kl: float
    window: int
    start: int
    ids: list[int] = field(compare=False)
    token_kl: list[float] = field(compare=False)
    expected: list[int] = field(compare=False)
    got: list[int] = field(compare=False)


class Divergence:
    """Distribution of KL over tokens, and the worst passages; told about one window at a time.

    Attributes:
        counts: Tokens in each bin: below `EDGES[0]`, between two neighbours, from `EDGES[-1]` up.
        total: Sum of KL over all tokens, nats.
        largest: The largest KL of one token, nats.

    >>> seen = Divergence()
    >>> seen.add(0, torch.tensor([5, 6, 7]), torch.tensor([0.5, 0.0]), *torch.zeros(2, 2, dtype=torch.int64))
    >>> seen.tokens, seen.total, seen.passages[0].token_kl
    (2, 0.5, [0.5, 0.0])
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(len(EDGES) + 1, dtype=torch.int64)
        self.total = 0.0
        self.largest = 0.0
        self._worst: list[Passage] = []

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return int(self.counts.sum())

    @property
    def passages(self) -> list[Passage]:
        """The worst passages, worst first; at most one from a window."""
        return sorted(self._worst, reverse=True)

    def add(self, window: int, ids: Tensor, kl: Tensor, expected: Tensor, got: Tensor) -> None:
        """Take in one window.

        Args:
            window: Its number.
            ids: Its tokens, int64 `[seq_len]`.
            kl: Divergence at every token but the first, nats, `[seq_len - 1]`.
            expected: The original's most likely tokens, int64 `[seq_len - 1]`.
            got: The quantized model's.
        """
        kl = kl.detach().double().cpu().clamp(min=0)  # float32 sums may come out at -1e-9
        bins = torch.bucketize(kl, EDGES, right=True)
        self.counts += torch.bincount(bins, minlength=len(self.counts))
        self.total += kl.sum().item()
        self.largest = max(self.largest, kl.max().item())
        span = min(SPAN, len(kl))
        means = kl.unfold(0, span, max(1, span // 2)).mean(1)
        start = int(means.argmax()) * max(1, span // 2)
        part = slice(start, start + span)
        passage = Passage(
            kl[part].mean().item(),
            window,
            start + 1,
            ids[1:][part].tolist(),
            kl[part].tolist(),
            expected[part].tolist(),
            got[part].tolist(),
        )
        heapq.heappush(self._worst, passage)
        if len(self._worst) > PASSAGES:
            heapq.heappop(self._worst)

    def quantile(self, fraction: float) -> float:
        """KL that this fraction of the tokens stays below, to the width of a bin, nats."""
        reached = (self.counts.cumsum(0) >= fraction * self.tokens).nonzero()[0].item()
        return EDGES[min(int(reached), len(EDGES) - 1)].item()

    def to_dict(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Everything as plain data, the passages as text."""
        return {
            "edges": [float(f"{edge:.6g}") for edge in EDGES.tolist()],
            "counts": self.counts.tolist(),
            "largest": self.largest,
            "quantiles": {name: self.quantile(float(name)) for name in ("0.5", "0.9", "0.99", "0.999")},
            "passages": [_readable(passage, tokenizer) for passage in self.passages],
        }


def _readable(passage: Passage, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    texts = pieces(passage.ids, tokenizer)
    expected = [tokenizer.decode([token]) for token in passage.expected]
    got = [tokenizer.decode([token]) for token in passage.got]
    tokens = zip(texts, passage.token_kl, expected, got, strict=True)
    return {
        "kl": passage.kl,
        "window": passage.window,
        "start": passage.start,
        "tokens": [
            {"text": text, "kl": float(f"{kl:.4g}"), "expected": wanted, "got": came}
            for text, kl, wanted, came in tokens
        ],
    }


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, such that together they are the text of all.

    A character spread over several tokens belongs to the last of them; the others are empty.
    """
    found, done = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and end < len(ids):  # half a character
            found.append("")
            continue
        found.append(text[len(done) :])
        done = text
    return found
