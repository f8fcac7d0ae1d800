"""The distribution of KL over tokens and the worst passages, against all tokens kept and sorted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoTokenizer

from lowbit.divergence import EDGES, PASSAGES, SPAN, Divergence, pieces
from lowbit.evaluate import compare
from tests.test_evaluate import load, naive, perturbed, windows_for


def random_windows(count: int = 40, length: int = 200) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 99, (length,), generator=generator),
            10 ** (2 * torch.randn(length - 1, generator=generator, dtype=torch.float64) - 3),
        )
        for _ in range(count)
    ]


def watch(windows: list[tuple[Tensor, Tensor]]) -> Divergence:
    seen = Divergence()
    for number, (ids, kl) in enumerate(windows):
        seen.add(number, ids, kl, ids[1:], ids[:-1])
    return seen


def test_every_token_is_counted_once_in_its_bin() -> None:
    windows = random_windows()
    seen, everything = watch(windows), torch.cat([kl for _, kl in windows])
    assert seen.tokens == len(everything)
    assert seen.total == pytest.approx(everything.sum().item())
    assert seen.largest == everything.max()
    bounds = [-torch.inf, *EDGES.tolist(), torch.inf]
    for count, low, high in zip(seen.counts.tolist(), bounds[:-1], bounds[1:], strict=True):
        assert count == ((everything >= low) & (everything < high)).sum()


def test_quantiles_are_within_a_bin() -> None:
    windows = random_windows()
    everything = torch.cat([kl for _, kl in windows])
    for fraction in (0.5, 0.9, 0.99):
        exact = everything.quantile(fraction).item()
        assert exact <= watch(windows).quantile(fraction) * 1.001
        assert watch(windows).quantile(fraction) <= exact * float(EDGES[1] / EDGES[0]) * 1.001


def test_the_worst_passages_are_the_worst() -> None:
    """Of each window the worst of all half-overlapping passages, of these the worst six, in order."""
    windows = random_windows()
    best = []
    for number, (_, kl) in enumerate(windows):
        starts = range(0, len(kl) - SPAN + 1, SPAN // 2)
        best.append(max((kl[start : start + SPAN].mean().item(), number, start) for start in starts))
    expected = sorted(best, reverse=True)[:PASSAGES]
    found = watch(windows).passages
    assert [(passage.window, passage.start - 1) for passage in found] == [(n, s) for _, n, s in expected]
    for passage in found:
        ids, kl = windows[passage.window]
        assert passage.ids == ids[passage.start : passage.start + SPAN].tolist()
        assert passage.token_kl == kl[passage.start - 1 : passage.start - 1 + SPAN].tolist()
        assert passage.expected == passage.ids


def test_memory_does_not_grow() -> None:
    seen = watch(random_windows(100))
    assert len(seen._worst) == PASSAGES
    assert len(seen.counts) == len(EDGES) + 1


def test_an_evaluation_tells_every_token(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model, reference, windows = perturbed(folder), load(folder), windows_for(folder, 60, 3)
    seen = Divergence()
    result = compare(model, reference, windows, None, seen)
    assert seen.tokens == result.tokens
    assert seen.total / seen.tokens == pytest.approx(result.kl, rel=1e-6)
    p, q = naive(reference, windows), naive(model, windows)
    exact = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    for passage in seen.passages:
        first = passage.start - 1
        part = slice(first, first + SPAN)
        assert passage.token_kl == pytest.approx(exact[passage.window, part].tolist(), rel=1e-3, abs=1e-6)
        assert passage.ids == windows[passage.window, 1:][part].tolist()
        assert passage.expected == p[passage.window, part].argmax(-1).tolist()
        assert passage.got == q[passage.window, part].argmax(-1).tolist()


def test_a_given_function_stands_for_the_reference(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model, reference, windows = perturbed(folder), load(folder), windows_for(folder)
    kept = [reference(input_ids=window[None]).logits[0, :-1].detach() for window in windows]
    seen: list[int] = []

    def original(index: int, window: Tensor) -> Tensor:
        seen.append(index)
        assert torch.equal(window, windows[index])
        return kept[index]

    given, usual = compare(model, original, windows), compare(model, reference, windows)
    assert seen == list(range(6))
    for name, value in usual.to_dict().items():
        if name != "seconds":
            assert getattr(given, name) == value, name


def test_pieces_make_up_the_text(tiny_model: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    text = "The naïve miller — 12 € — said:\n  “no 🦀”"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(found)
    assert "🦀" in found  # four bytes, one piece


def test_as_plain_data(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    seen = Divergence()
    compare(perturbed(folder), load(folder), windows_for(folder), None, seen)
    data = seen.to_dict(AutoTokenizer.from_pretrained(folder))
    assert sum(data["counts"]) == 6 * 31
    assert len(data["edges"]) + 1 == len(data["counts"])
    assert data["quantiles"]["0.5"] <= data["quantiles"]["0.99"]
    assert {"text", "kl", "expected", "got"} == set(data["passages"][0]["tokens"][0])
