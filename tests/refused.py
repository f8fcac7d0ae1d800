"""The command line in this process, where it has to refuse: what every refusal owes the user."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowbit import cli


class Refused:
    """Runs `lowbit quantize` in this process and checks everything that every refusal owes."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.output = folder / "models" / "out"
        self._folder, self._monkeypatch, self._capfd = folder, monkeypatch, capfd

    def __call__(self, model: object, *options: object, method: str = "rtn", code: int = 2) -> str:
        """The line on stderr, without `lowbit: `."""
        before = snapshot(self._folder)
        arguments = ["quantize", model, "--output", self.output, "--method", method, *options]
        self._monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capfd.readouterr()
        assert caught.value.code == code
        assert out == ""
        assert err.startswith("lowbit: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert snapshot(self._folder) == before
        return err.removeprefix("lowbit: ").rstrip("\n")


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that lies below `folder`: names, times of change and contents."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns if path.is_file() else 0,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }
