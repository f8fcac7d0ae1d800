"""What quantization cost: perplexity, divergence from the original, agreement on the next token.

Perplexity alone is a noisy judge: on a few dozen windows its standard error is larger than the
harm of a good 4-bit quantization. Three numbers that compare the same tokens are far sharper:

- the ratio of the two perplexities, whose error is that of the *paired* differences;
- the mean over tokens of `KL(original || quantized)`, over the whole vocabulary, in nats;
- how often both models rank the same token first.

Windows are the independent units: means are over windows (all equally long, so also over tokens),
and standard errors are the spread of the windows' means over the square root of their number. The
error of a perplexity `exp(nll)` is `ppl * se(nll)`, by the delta method.

Both models see a window before the next one is taken. Logits are normalized in float32 a few rows
at a time, so no float32 copy of `[seq_len, vocabulary]` is ever made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbit import hf
from lowbit.dataset import evaluation_windows, read_documents
from lowbit.divergence import Divergence
from lowbit.errors import LowbitError
from lowbit.hardware import evaluation_dtype, find_device
from lowbit.progress import Count

Logits: TypeAlias = Callable[[int, Tensor], Tensor]

CHUNK_BYTES = 2**26  # of float32 logits normalized at a time


@dataclass(frozen=True)
class Result:
    """A model on a text, and against the original model where one was given.

    Every `_se` is a standard error over windows, None where there is only one window. The fields
    from `reference_perplexity` on are None without a reference.

    Attributes:
        perplexity: `exp` of the mean negative log-likelihood of the next token.
        perplexity_se: Its standard error.
        windows: Windows evaluated.
        tokens: Predicted tokens, `windows * (seq_len - 1)`.
        seconds: Wall time, reading and loading excluded.
        reference_perplexity: Perplexity of the original on the same windows.
        reference_perplexity_se: Its standard error.
        perplexity_ratio: `perplexity / reference_perplexity`.
        perplexity_ratio_se: Its standard error, from paired differences of the windows.
        kl: Mean over tokens of `KL(original || quantized)`, nats.
        kl_se: Its standard error.
        top1_agreement: Fraction of tokens for which both models rank the same token first.
        top1_agreement_se: Its standard error.
        dtype: Precision in which the model computed, `bfloat16` or another of torch's names.
    """

    perplexity: float
    perplexity_se: float | None
    windows: int
    tokens: int
    seconds: float
    reference_perplexity: float | None = None
    reference_perplexity_se: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    top1_agreement: float | None = None
    top1_agreement_se: float | None = None
    dtype: str | None = None

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The fields, ready for JSON."""
        return asdict(self)


def perplexity(
    model: PreTrainedModel | str | Path,
    text: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: PreTrainedModel | str | Path | None = None,
    seq_len: int = 2048,
    windows: int | None = None,
    split: str = "test",
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    progress: Count | None = None,
    divergence: Divergence | None = None,
) -> Result:
    """Evaluate a model on a text, and against the original model if one is given.

    Args:
        model: A causal language model in evaluation mode, or a checkpoint folder or hub id.
        text: A local file or a hub dataset, as `lowbit.dataset.read_documents` takes it.
        tokenizer: The model's own; needed where `model` is not a path.
        reference: The original model, for the ratio, the divergence and the agreement.
        seq_len: Tokens in a window.
        windows: Evaluate the first so many windows; None takes the whole text.
        split: Split of a hub dataset where `text` names none.
        device: Where to put what is named; `auto` is where the model is that was given as one; where neither
            was, a GPU if there is one.
        dtype: Precision of what is named; `auto` is that of the model that was given as one; where neither
            was, the checkpoint's own, or float32 on CPUs that have no bfloat16 products.
        progress: Called with (windows done, windows in all).
        divergence: Told of the divergence at every token.

    Raises:
        LowbitError: the text, a model or its tokenizer can't be read, the text is shorter than one
            window, the device or precision can't be used, or what `compare` refuses.

    >>> result = perplexity(checkpoint, text_file, reference=tiny_model, seq_len=64)
    >>> result.perplexity > 1, 0 < result.kl < 0.5
    (True, True)
    """
    if tokenizer is None:
        if isinstance(model, PreTrainedModel):
            raise LowbitError("a loaded model needs its tokenizer: pass tokenizer=, or the model's folder")
        tokenizer = hf.load_tokenizer(model)
    tokens = evaluation_windows(read_documents(text, split), tokenizer, seq_len, windows)
    given = [one for one in (model, reference) if isinstance(one, PreTrainedModel)]
    if given and device == "auto":
        device = given[0].device
    where = find_device(device) if isinstance(device, str) else device
    precision = given[0].dtype if given and dtype == "auto" else evaluation_dtype(dtype, where)

    def opened(one: PreTrainedModel | str | Path) -> PreTrainedModel:
        if isinstance(one, PreTrainedModel):
            return one
        return hf.load(one, packed=False, dtype=precision, device=where)

    loaded = opened(model)
    original = None if reference is None else opened(reference)
    return compare(loaded, original, tokens, progress, divergence)


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel | Logits | None,
    windows: Tensor,
    progress: Count | None = None,
    divergence: Divergence | None = None,
) -> Result:
    """Evaluate `model` on token windows, against `reference` unless that is None.

    Args:
        model: A causal language model in evaluation mode.
        reference: The original, with the same vocabulary; may be on another device. Or a function from
            the number of a window and the window to the original's logits, `[seq_len - 1, vocabulary]`.
        windows: int64 `[n, seq_len]`.
        progress: Called with (windows done, windows in all).
        divergence: Told of the divergence at every token; needs a reference.

    Raises:
        LowbitError: a model is in training mode, its context is shorter than a window, its logits or the
            reference's are NaN or infinite, or the vocabularies differ.
    """
    for one in (model, reference):
        if isinstance(one, PreTrainedModel):
            check_model(one, windows.shape[1])
    start = time.perf_counter()
    rows = []
    for index, window in enumerate(windows):
        tokens = _evaluate_window(model, reference, index, window)
        rows.append(tokens.means())
        if divergence is not None and reference is not None:
            divergence.add(index, window, tokens.kl, tokens.reference_top, tokens.top)
        if progress:
            progress(index + 1, len(windows))
    count, seq_len = windows.shape
    nll, reference_nll, kl, top1 = torch.tensor(rows, dtype=torch.float64).unbind(1)
    ppl, ppl_se = _exp_mean(nll)
    precision = str(model.dtype).removeprefix("torch.")
    seconds = time.perf_counter() - start
    own = Result(ppl, ppl_se, count, count * (seq_len - 1), seconds, dtype=precision)
    if reference is None:
        return own
    reference_ppl, reference_se = _exp_mean(reference_nll)
    ratio, ratio_se = _exp_mean(nll - reference_nll)
    mean_kl, kl_se = _mean(kl)
    agreement, agreement_se = _mean(top1)
    return replace(
        own,
        reference_perplexity=reference_ppl,
        reference_perplexity_se=reference_se,
        perplexity_ratio=ratio,
        perplexity_ratio_se=ratio_se,
        kl=mean_kl,
        kl_se=kl_se,
        top1_agreement=agreement,
        top1_agreement_se=agreement_se,
    )


class _Tokens(NamedTuple):
    """What both models make of every token; `[tokens]` each, those of a missing reference empty."""

    nll: Tensor
    reference_nll: Tensor
    kl: Tensor
    top: Tensor
    reference_top: Tensor

    def means(self) -> tuple[float, float, float, float]:
        """Nll, nll of the reference, divergence, agreement; 0 without a reference."""
        if not len(self.kl):
            return self.nll.mean().item(), 0.0, 0.0, 0.0
        same = (self.top == self.reference_top).double()
        return (
            self.nll.mean().item(),
            self.reference_nll.mean().item(),
            self.kl.mean().item(),
            same.mean().item(),
        )


def _evaluate_window(
    model: PreTrainedModel, reference: PreTrainedModel | Logits | None, index: int, window: Tensor
) -> _Tokens:
    logits = _logits(model, index, window)
    if reference is None:
        others = logits[:0]
    else:
        others = _logits(reference, index, window).to(logits.device)
        if others.shape != logits.shape:
            raise LowbitError(
                f"{_name(model)} has {logits.shape[-1]} logits and {_name(reference)} {others.shape[-1]}: "
                "compare a model with the one it was made from"
            )
    targets = window[1:].to(logits.device)
    step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    parts = [part.split(step) for part in (logits, others, targets)]
    if reference is None:
        parts[1] = (others,) * len(parts[0])
    chunks = [_token_values(*chunk) for chunk in zip(*parts, strict=True)]
    return _Tokens(*map(torch.cat, zip(*chunks, strict=True)))


def _token_values(logits: Tensor, others: Tensor, targets: Tensor) -> _Tokens:
    """Of a few tokens; `logits, others [tokens, vocabulary]`, `others` may be empty. Sums in float64."""
    q = logits.float().log_softmax(-1)
    nll = -q.gather(1, targets[:, None])[:, 0].double()
    top = logits.argmax(-1)
    if not len(others):
        return _Tokens(nll, nll[:0], nll[:0], top, top[:0])
    p = others.float().log_softmax(-1)
    other_nll = -p.gather(1, targets[:, None])[:, 0].double()
    mass = p.exp()
    # A token that the original rules out (a logit of -inf) adds nothing, and -inf - -inf is no number.
    kl = torch.where(mass > 0, mass * (p - q), 0).sum(-1).double()
    return _Tokens(nll, other_nll, kl, top, others.argmax(-1))


@torch.inference_mode()
def _logits(model: PreTrainedModel | Logits, index: int, window: Tensor) -> Tensor:
    """Logits for every token of window number `index` but the first, `[seq_len - 1, vocabulary]`."""
    if isinstance(model, PreTrainedModel):
        logits: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
    else:
        logits = model(index, window)
    # A row whose largest is no number is NaN once normalized, and the divergence would take it for a 0.
    largest = logits.amax(-1)
    if not largest.isfinite().all():
        what = "NaN" if largest.isnan().any() else "infinite"
        raise LowbitError(f"{_name(model)} gives {what} logits: load it in bfloat16 or float32")
    return logits


def check_model(model: PreTrainedModel, seq_len: int) -> None:
    """Raise `LowbitError` unless the model is in evaluation mode and takes windows of `seq_len` tokens."""
    if model.training:
        raise LowbitError(f"{_name(model)} is in training mode: call model.eval() first")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise LowbitError(
            f"windows of {seq_len} tokens exceed the {longest} positions of {_name(model)}: "
            f"use --seq-len {longest}"
        )


def _name(model: PreTrainedModel | Logits) -> str:
    if not isinstance(model, PreTrainedModel):
        return "the original"
    return model.config.name_or_path or type(model).__name__


def _mean(values: Tensor) -> tuple[float, float | None]:
    """Mean over windows and its standard error, `std / sqrt(n)` with the unbiased variance."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def _exp_mean(values: Tensor) -> tuple[float, float | None]:
    """`exp` of the mean over windows and its standard error by the delta method."""
    _, error = _mean(values)
    value = values.mean().exp().item()
    return value, None if error is None else value * error
