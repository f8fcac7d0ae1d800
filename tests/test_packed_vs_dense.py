"""The script that compares packed with dense: it passes what is right, and fails a wrong kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lowbit import QuantScheme, cpu


@pytest.fixture
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "packed_vs_dense.py"
    spec = importlib.util.spec_from_file_location("packed_vs_dense", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_packed_checkpoint_passes(
    script: ModuleType, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.compare(str(checkpoint("llama", QuantScheme(4, 32))), 4)
    shown = capsys.readouterr().out
    assert shown.count("| packed,") == shown.count("| dense bfloat16,") == 2


def larger(product: Tensor) -> Tensor:
    return product * 1.05


def coarser(product: Tensor) -> Tensor:
    """bfloat16 with two bits less; float32 as it is."""
    return (
        (product.view(torch.int16) & -4).view(torch.bfloat16) if product.dtype == torch.bfloat16 else product
    )


@pytest.mark.parametrize("spoil", [larger, coarser])
def test_a_wrong_kernel_fails(
    spoil: Callable[[Tensor], Tensor],
    script: ModuleType,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = cpu.matmul

    def wrong(*args: object, **rest: object) -> Tensor:
        return spoil(real(*args, **rest))  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "matmul", wrong)
    assert not script.compare(str(checkpoint("llama", QuantScheme(4, 32))), 4)
    in_float32 = "greedy text is equal for 6 of 6" in capsys.readouterr().out
    assert in_float32 == (spoil is coarser)


def test_a_tie_is_no_error_and_a_lead_is_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Tokenizer:
        def decode(self, ids: Tensor) -> str:
            return str(ids.tolist())

    ids = torch.tensor([[1, 2]])
    ours, theirs = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])
    for lead, tie in ((0.5, True), (0.7, False)):
        logits = torch.tensor([0.0, 0.0, 0.0, 1.0, 10.0, 10.0 + lead])
        monkeypatch.setattr(script, "prefill_logits", lambda model, text, row=logits: row.expand(3, -1))
        assert script.check_text(Tokenizer(), [ids], [ours], [theirs], None, 0.1) is tie
        assert "| 1 of 2 |" in capsys.readouterr().out
    assert script.check_text(Tokenizer(), [ids], [ours], [ours], None, 0.0)
