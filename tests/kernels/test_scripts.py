"""The scripts that time kernels, as far as a machine without a GPU can tell."""

from __future__ import annotations

import importlib

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
