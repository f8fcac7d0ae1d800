"""Calibration text without data: the model writes its own.

Sampling is one token at a time with the key/value cache, all rows of a batch at once, so its cost
is `seq_len` steps through the weights per batch of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.dataset import check_shape, prefix_ids
from lowbit.errors import LowbitError
from lowbit.progress import Count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GREEDY = 4  # tokens after a random first token that are not sampled
BATCH = 32  # rows written at a time: bounds the key/value cache


def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Count | None = None,
) -> Tensor:
    """Calibration text that the model writes itself.

    As in LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 3.1): a first token drawn uniformly
    from the vocabulary, a few greedy tokens that make sense of it, then sampling from the model's
    own distribution (temperature 1). Williams et al. (2024, arXiv:2410.17170) find text that the
    model wrote as good a calibration set as real data. Special tokens and padding of the vocabulary
    are never a first token. A row does not stop at EOS: the model goes on as after EOS in its
    training data, with the next text or turn.

    Args:
        model: A causal language model in eval mode, on any device; its dtype is used.
        tokenizer: The model's own.
        samples: Rows.
        seq_len: Tokens in a row.
        seed: Of every random choice; the same rows on the same device and dtype.
        progress: Called with (tokens written, tokens in all).

    Returns:
        int64 `[samples, seq_len]` on the CPU.

    Raises:
        LowbitError: the model gives NaN logits.
    """
    prefix = prefix_ids(tokenizer)
    check_shape(samples, seq_len, prefix)
    vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
    firsts = torch.ones(vocabulary, device=model.device)
    firsts[[i for i in tokenizer.all_special_ids if i < vocabulary]] = 0
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.zeros(samples, seq_len, dtype=torch.int64, device=model.device)
    tokens[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    tokens[:, len(prefix)] = _draw(firsts.expand(samples, -1), generator)
    for start in range(0, samples, BATCH):
        batch = tokens[start : start + BATCH]
        for length in _write(model, batch, len(prefix) + 1, vocabulary, tokenizer.eos_token_id, generator):
            if progress:
                progress(start * seq_len + len(batch) * length, samples * seq_len)
    return tokens.cpu()


def _write(
    model: PreTrainedModel,
    tokens: Tensor,
    begin: int,
    vocabulary: int,
    eos: int | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """Fill `tokens [batch, seq_len]` in place after its first `begin` columns; yield each length reached."""
    cache, seen = None, 0
    for position in range(begin, tokens.shape[1]):
        with torch.inference_mode():
            output = model(input_ids=tokens[:, seen:position], past_key_values=cache, use_cache=True)
        cache, seen = output.past_key_values, position
        probabilities = output.logits[:, -1, :vocabulary].float().softmax(-1)
        if probabilities.isnan().any():
            name = model.config.name_or_path or type(model).__name__
            raise LowbitError(f"{name} gives NaN logits: load it in bfloat16 or float32")
        if eos is not None:  # text follows EOS, even where a model would pad with more of it
            probabilities[tokens[:, position - 1] == eos, eos] = 0
        greedy = position < begin + GREEDY
        tokens[:, position] = probabilities.argmax(-1) if greedy else _draw(probabilities, generator)
        yield position + 1


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row of `weights [batch, vocabulary]`, drawn in proportion to them; int64 `[batch]`.

    A draw costs one number per row; `torch.multinomial` draws one per entry, which on the CPU takes
    as long as a small model.
    """
    totals = weights.cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(weights), 1, generator=generator, device=weights.device, dtype=torch.float64)
    # right=True: the first index whose running total exceeds the point, so never a weight of zero.
    return torch.searchsorted(totals, points * totals[:, -1:], right=True).squeeze(-1)
