"""The fastest effort: no data of the user's, and a block runs once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import QuantScheme, hf, pipeline
from lowbit.batches import draw_rows
from lowbit.results import Report
from lowbit.stream import Stream

Folders = Callable[..., Path]


def test_the_fastest_effort_needs_no_data_and_loses_less_than_nearest(
    quantize: Callable[..., Report], tiny_model: Folders, text_file: str, tmp_path: Path
) -> None:
    """On what comes with lowbit, each block run once; judged on a text that it has not seen."""
    folder = tiny_model("llama")
    options: dict[str, Any] = {"method": None, "dataset": None, "samples": None}
    report = quantize(folder, output=tmp_path / "fast", effort="fast", **options)
    assert report.method == "quick"
    assert report.calibration == "lowbit's passages: 6 x 48 tokens, seed 0"
    assert report.notes == []
    nearest = quantize(folder, output=tmp_path / "rtn")
    lost = [
        lowbit.perplexity(made.output, text_file, reference=folder, seq_len=48, windows=40).kl
        for made in (report, nearest)
    ]
    assert 0 < lost[0] < lost[1]


def test_the_data_of_an_effort_are_for_its_own_method(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    """Whoever names a method gets the usual rows for it, and whoever names data gets those."""
    nothing: dict[str, Any] = {"dataset": None, "samples": None}
    dial, method = pipeline._choose("fast", "gptq", "gptq", None, None, "original", **nothing)
    assert (method, dial.dataset, dial.samples) == ("gptq", None, 128)
    dial, method = pipeline._choose("fast", None, "gptq", None, None, "original", "a.txt", None)
    assert (method, dial.dataset, dial.samples) == ("quick", "a.txt", 6)
    dial, _ = pipeline._choose("balanced", None, "gptq", None, None, "original", "a.txt", 9)
    assert (dial.dataset, dial.samples) == ("a.txt", 9)
    dial, _ = pipeline._choose("fast", "qat", "gptq", None, None, "original", **nothing)
    assert (dial.dataset, dial.samples, dial.training) == (None, 128, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": QuantScheme(8, -1, activation_bits=8)},
        {"scheme": None, "within": lowbit.Target(4.6)},
        {"format": "gptq"},
    ],
    ids=["w8a8", "target", "gptq"],
)
def test_fast_goes_with(
    options: dict[str, Any], quantize: Callable[..., Report], tiny_model: Folders, text_file: str
) -> None:
    folder = tiny_model("llama")
    report = quantize(folder, effort="fast", method=None, dataset=None, samples=None, **options)
    assert report.method == "quick"
    assert report.calibration.startswith("lowbit's passages: 6 x 48 tokens")
    assert report.verification is not None
    found = lowbit.perplexity(report.output, text_file, reference=folder, seq_len=48, windows=10)
    assert found.kl is not None
    assert found.kl < 0.2


@pytest.mark.parametrize(("method", "passes"), [("quick", 1), ("gptq", 2)])
def test_how_often_a_block_runs(
    quantize: Callable[..., Report],
    tiny_model: Folders,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    passes: int,
) -> None:
    """The calibration rows pass a block once or twice, and once they do it is the original that passes."""
    ran: list[tuple[int, int]] = []
    run = Stream.run

    def counted(self: Stream, block: int, batch: int, read: Tensor | None = None) -> Tensor:
        ran.append((block, batch))
        return run(self, block, batch, read)

    monkeypatch.setattr(Stream, "run", counted)
    kept: list[Tensor] = []
    logits = Stream.logits

    def last(self: Stream, batch: int, leaf: Tensor | None = None) -> Tensor:
        kept.append(logits(self, 0))
        return logits(self, batch, leaf)

    monkeypatch.setattr(Stream, "logits", last)
    folder = tiny_model("llama")
    quantize(folder, method=method, mix=False, samples=1000, dtype="float32", verify_output=False)
    rows = draw_rows(text_file, hf.load_tokenizer(folder), 1000, 48, 0)
    assert [ran.count((block, 0)) for block in range(2)] == [passes, passes]
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = original(input_ids=rows[:1]).logits
    assert (passes == 1) == torch.allclose(kept[0][:1], wanted, atol=1e-4)
