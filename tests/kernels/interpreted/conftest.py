"""Runs in a process of its own, in which Triton interprets: `test_interpreted.py` starts it."""

from __future__ import annotations

import pytest
import torch

from lowbit_kernels import matmul
from tests.kernels.interpreted import interpreter

interpreter.install()


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Fill new tensors with NaN: what a kernel leaves out, or reads before it is written, shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()


@pytest.fixture(params=[False, True], ids=["tl", "ptx"])
def spelling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both spellings of the kernels, on a device of four multiprocessors, so that K is split."""
    device = matmul.Target("sm_80", 4, request.param)
    monkeypatch.setattr(matmul, "target", lambda _: device)
