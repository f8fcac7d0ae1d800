"""`SHA256SUMS`, and what it must list before it vouches for a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit import beside
from lowbit.cli import app
from lowbit.errors import LowbitError

Folders = Callable[..., Path]


@pytest.fixture
def folder(checkpoint: Folders, tmp_path: Path) -> Path:
    """A checkpoint of several files that a test may damage."""
    return shutil.copytree(checkpoint(max_shard_size="50KB"), tmp_path / "w4")


def test_what_was_written_is_verified(folder: Path) -> None:
    assert beside.verify_sums(folder) == len(list(folder.iterdir())) - 1
    changed = sorted(folder.glob("*.safetensors"))[1]
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    with pytest.raises(LowbitError, match=rf"{changed.name} is missing or not what was written"):
        beside.verify_sums(folder)


@pytest.mark.parametrize("pattern", ["config.json", "model-00002-of-*.safetensors"])
def test_a_list_without_what_is_loaded(folder: Path, pattern: str) -> None:
    (lost,) = (path.name for path in folder.glob(pattern))
    sums = folder / beside.SUMS
    sums.write_text(
        "".join(line for line in sums.read_text().splitlines(True) if not line.endswith(f"  {lost}\n"))
    )
    (folder / lost).write_bytes(b"anything")
    with pytest.raises(LowbitError) as caught:
        beside.verify_sums(folder)
    assert str(caught.value) == f"{sums} does not list {lost}: copy the checkpoint again"


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (0, "does not list config.json"),
        (40, "line 1 is cut short"),
        (-8, "is missing or not what was written"),
    ],
)
def test_a_list_that_was_cut(folder: Path, kept: int, expected: str) -> None:
    sums = folder / beside.SUMS
    sums.write_text(sums.read_text()[:kept])
    result = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert isinstance(result.exception, LowbitError)
    assert result.stdout == ""
    assert expected in str(result.exception)
    assert str(result.exception).endswith(": copy the checkpoint again")
