"""Kernels against their naive twins: interpreted (`test_interpreted.py`), or on a GPU (`make test-gpu`).

On a GPU every tensor that a check makes is made there, and the kernels are compiled: what runs is what ships.
"""

from __future__ import annotations

import os

import pytest
import torch

from lowbit_kernels import matmul

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.kernels.checks import interpreter

    interpreter.install()
elif torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for
    torch.set_default_device("cuda")
else:
    pytest.exit("no GPU here: tests/kernels/test_interpreted.py runs these checks without one", returncode=2)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Fill new tensors with NaN: what a kernel leaves out, or reads before it is written, shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=not INTERPRETED)  # only for the filling
    assert torch.ones(1).new_empty(3).isnan().all()


@pytest.fixture(params=[False, True], ids=["tl", "ptx"])
def spelling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both spellings of the kernels, on a device of four multiprocessors, so that K is split."""
    arch = "sm_80" if INTERPRETED else matmul.target(torch.device("cuda", 0)).arch
    device = matmul.Target(arch, 4, request.param)
    monkeypatch.setattr(matmul, "target", lambda _: device)
