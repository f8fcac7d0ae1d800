"""A GPU without room: one line that says what to try, whatever the command was doing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import QuantScheme, cli, hf, interruption


@pytest.mark.parametrize(
    ("command", "ways"),
    [
        ("quantize", "--max-memory or --device cpu"),
        ("eval", "a smaller --seq-len or --device cpu"),
        ("compare", "a smaller --seq-len or fewer --windows or --device cpu"),
        ("generate", "--device cpu"),
    ],
)
def test_a_full_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, ways: str
) -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 GiB"
    )

    def full(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", full)
    monkeypatch.setattr(interruption, "listen", lambda: None)
    monkeypatch.setattr(sys, "argv", ["lowbit", command, "model"])
    line = f"lowbit: the GPU's memory is full (2.50 GiB more was needed): try {ways}"
    for more in ("", ", with --restart"):
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert capsys.readouterr().err == f"{line}{more}\n"
        error.kept = Path("work")  # type: ignore[attr-defined]


def test_a_full_gpu_is_no_fault_of_the_checkpoint(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowbit.quantize(tiny_model("llama"), QuantScheme(4, 32), output=tmp_path / "w4", method="rtn")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        hf.load(tmp_path / "w4")
