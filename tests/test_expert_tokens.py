"""The measurement of which tokens an expert is calibrated on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    yield importlib.import_module("expert_tokens")
    sys.path.pop(0)
    sys.modules.pop("expert_tokens", None)


def test_a_moment_is_a_mean_whatever_the_weights(script: ModuleType) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(script.moment(x), torch.tensor([[5.0, 7.0], [7.0, 10.0]]))
    assert torch.equal(script.moment(x, torch.tensor([0.0, 0.5])), torch.tensor([[9.0, 12.0], [12.0, 16.0]]))


def test_each_policy_takes_the_tokens_that_it_names(script: ModuleType) -> None:
    x = torch.eye(4) * 2
    experts = torch.tensor([[0, 1], [0, 1], [2, 0], [2, 3]])
    shares = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    found = script.policies(script.Seen(x, experts, shares), tokens=2)

    def diagonal(name: str, expert: int) -> list[float]:
        return [float(value) for value in found[name](expert, lambda rows: rows).diagonal()]

    assert diagonal("own", 0) == [2, 2, 0, 0]
    assert diagonal("own", 2) == [0, 0, 0, 0]  # sent nothing among the first two tokens
    assert diagonal("own, more", 2) == [0, 0, 4, 0]  # an equal share of two tokens is one
    assert diagonal("all", 2) == [2, 2, 0, 0]
    assert diagonal("both, 32", 2) == [2, 2, 0, 0]
    assert diagonal("own, weighted", 1) == [2, 2, 0, 0]


@pytest.mark.slow
def test_the_table_is_made(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = ["--training", str(text), "--calibration", str(text), "--text", str(text), "--kept"]
    words += [str(tmp_path / "kept"), "--steps", "2", "--experts", "4", "--tokens", "256"]
    monkeypatch.setattr(sys, "argv", ["expert_tokens.py", *words])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 256 |")]
    assert len(rows) == 2
    assert all(0 < float(cell) < 1.5 for row in rows for cell in row.split("|")[5:-1])
