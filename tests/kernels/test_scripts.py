"""The scripts that time kernels, as far as a machine without a GPU can tell."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.mark.parametrize("name", ["bench_kernels", "probe_kernels"])
def test_help_needs_no_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert (script.__doc__ or "").splitlines()[0] in capsys.readouterr().out


def test_a_shape_of_two_models_has_two_columns() -> None:
    """Not one title over two columns, which would put all that follow under the wrong one."""

    def row(model: str, out: int, rows: int, us: float) -> dict[str, Any]:
        return {"model": model, "out": out, "in": 64, "bits": 4, "dtype": "float16", "rows": rows, "us": us,
                "speedup": 2.0}  # fmt: skip

    measured = [row("a", 32, 1, 1.0), row("a", 32, 2, 2.0), row("b", 32, 1, 3.0), row("b", 32, 2, 4.0)]
    measured += [row("b", 96, 1, 5.0), row("b", 96, 2, 6.0)]
    table = importlib.import_module("bench_kernels").table(measured, "head").splitlines()
    assert table[2:] == [
        "| W4 float16, rows of x | 32 x 64 | 32 x 64 | 96 x 64 |",
        "|---|---|---|---|",
        "| 1 | 1.0 us (2.00x) | 3.0 us (2.00x) | 5.0 us (2.00x) |",
        "| 2 | 2.0 us (2.00x) | 4.0 us (2.00x) | 6.0 us (2.00x) |",
    ]
