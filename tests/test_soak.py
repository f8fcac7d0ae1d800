"""The short form of `scripts/soak.py`: processes that are killed, and what goes on after them."""

from __future__ import annotations

import pytest

from scripts import soak


@pytest.mark.slow
def test_every_end_of_a_run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.training.KEEP_SECONDS", 60.0)  # put back afterwards
    assert soak.main(["--kills", "3"]) == 0
    assert "all as in one piece" in capfd.readouterr().out
