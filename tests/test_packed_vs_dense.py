"""The script that compares packed with dense: it passes what is right, and fails a wrong kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
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


def test_a_wrong_kernel_fails(
    script: ModuleType, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cpu.matmul

    def wrong(*args: object, **rest: object) -> Tensor:
        return real(*args, **rest) * 1.05  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "matmul", wrong)
    assert not script.compare(str(checkpoint("llama", QuantScheme(4, 32))), 4)
