"""Text that a model writes itself, against a loop that knows no cache and no batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowbit import sampling
from lowbit.errors import LowbitError
from lowbit.sampling import GREEDY, sample_from_model
from tests.tiny import FAMILIES

BOS, EOS = 1, 2
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load(folder: Path) -> Loaded:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Loaded:
    return load(tiny_model("llama"))


@pytest.fixture
def qwen(tiny_model: Callable[..., Path]) -> Loaded:
    return load(tiny_model("qwen2"))


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, row: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        row = torch.cat([row, model(input_ids=row[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_greedy_loop_without_cache(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(sampling, "GREEDY", 100)
    model, tokenizer = load(tiny_model(family))
    rows = sample_from_model(model, tokenizer, 3, 24, seed=0)
    begin = 1 + (rows[0, 0] == BOS).int().item()
    for row in rows:
        if EOS not in row:  # after EOS the two differ by design
            assert torch.equal(row, continue_greedily(model, row[:begin], 24 - begin))


def test_shape_bos_and_first_tokens(llama: Loaded) -> None:
    rows = sample_from_model(*llama, 100, 8, seed=0)
    assert rows.shape == (100, 8)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == BOS).all()
    firsts = rows[:, 1]
    assert (firsts > 3).all(), "a special token began a text"
    assert len(firsts.unique()) > 70  # 87 +- 3 different ones are expected of 348


def test_no_bos_where_the_tokenizer_adds_none(qwen: Loaded) -> None:
    assert (sample_from_model(*qwen, 50, 8, seed=0)[:, 0] > 3).all()


def test_few_tokens_are_greedy_and_the_rest_is_sampled(llama: Loaded) -> None:
    model, tokenizer = llama
    rows = sample_from_model(model, tokenizer, 20, 2 + GREEDY + 8, seed=0)
    rows = rows[[EOS not in row for row in rows]]
    assert len(rows) > 5
    greedy = torch.stack([continue_greedily(model, row[:2], GREEDY + 8) for row in rows])
    assert torch.equal(rows[:, : 2 + GREEDY], greedy[:, : 2 + GREEDY])
    assert (rows[:, 2 + GREEDY :] != greedy[:, 2 + GREEDY :]).float().mean() > 0.5


def test_seed_decides_and_batches_do_not_repeat(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BATCH", 4)
    first, again, other = (sample_from_model(*llama, 10, 12, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 10


def test_a_model_that_only_ends_texts_still_writes(qwen: Loaded) -> None:
    model, tokenizer = qwen
    model.lm_head = torch.nn.Linear(64, 352)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data[EOS] = 50.0
    rows = sample_from_model(model, tokenizer, 8, 32, seed=0)
    ended = rows == EOS
    assert ended.any(1).all()
    assert not (ended[:, 1:] & ended[:, :-1]).any(), "EOS after EOS"
    assert ended[:, 1::2].float().mean() == 1


def test_padding_of_the_vocabulary_is_never_written(llama: Loaded) -> None:
    model, tokenizer = llama
    model.resize_token_embeddings(400)
    model.lm_head = torch.nn.Linear(64, 400)
    model.lm_head.bias.data[352:] = 50.0
    assert sample_from_model(model, tokenizer, 8, 32, seed=0).max() < 352


def test_draw_follows_the_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    drawn = sampling._draw(weights.expand(80_000, -1), torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=6).double()
    assert counts[[0, 3, 5]].sum() == 0
    expected = 10_000 * weights[[1, 2, 4]].double()
    chi_squared = ((counts[[1, 2, 4]] - expected) ** 2 / expected).sum()
    assert chi_squared < 13.8  # two degrees of freedom, p = 0.001


def test_draw_at_the_very_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(shape, dtype=torch.float64))
    assert sampling._draw(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.Generator()).tolist() == [2]


def test_progress_counts_tokens(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BATCH", 4)
    told: list[tuple[int, int]] = []
    sample_from_model(*llama, 6, 10, 0, lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {60}
    assert told[-1] == (60, 60)


def test_nan_is_refused(llama: Loaded) -> None:
    model, tokenizer = llama
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(LowbitError, match=r"llama.* gives NaN logits: load it in bfloat16 or float32"):
        sample_from_model(model, tokenizer, 2, 8, seed=0)
