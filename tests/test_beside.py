"""`SHA256SUMS`, and what it must list before it vouches for a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit import beside, durable, places, record
from lowbit.cli import app
from lowbit.conversion import convert
from lowbit.errors import LowbitError
from lowbit.push import files_of
from lowbit.results import Report
from tests.test_report import measure

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


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint as the hub's cache keeps it: every file is a link to a blob."""
    cache = tmp_path / "models--me--w4"
    at = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    at.mkdir(parents=True)
    for path in folder.iterdir():
        digest = durable.sha256(path)
        shutil.copyfile(path, cache / "blobs" / digest)
        (at / path.name).symlink_to(f"../../blobs/{digest}")
    return at


def blobs_are_sound(snapshot: Path) -> bool:
    blobs = list((snapshot.parents[1] / "blobs").iterdir())
    return bool(blobs) and all(durable.sha256(path) == path.name for path in blobs)


def test_the_blobs_of_the_hubs_cache_stay(snapshot: Path, tiny_model: Folders, text_file: str) -> None:
    before = (snapshot / "README.md").read_bytes()
    measure(snapshot, tiny_model("llama"), text_file)
    assert blobs_are_sound(snapshot)
    written = {path.name for path in snapshot.iterdir() if not path.is_symlink()}
    assert written == {*beside.DESCRIBING, beside.SUMS}
    assert (snapshot / "README.md").read_bytes() != before
    kept = record.load(snapshot)
    assert kept is not None
    assert len(kept["evaluations"]) == 1
    assert beside.verify_sums(snapshot) == len(list(snapshot.iterdir())) - 1


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("mine")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(mine)
    (note,) = beside.after_eval(folder, {"tasks": [], "reference": None})
    assert note.startswith(f"no report: {folder / 'README.md'} is a link out of its folder")
    assert mine.read_text() == "mine"


def test_a_link_to_nowhere_makes_room(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("gone")
    durable.part_from(folder, "README.md")
    assert not (folder / "README.md").is_symlink()
    assert not (folder / "gone").exists()


def test_named_chat_templates_are_listed_and_go(
    tiny_model: Folders, tmp_path: Path, quantize: Callable[..., Report]
) -> None:
    source = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    template = f"{places.CHAT_TEMPLATES}/tool_use.jinja"
    (source / places.CHAT_TEMPLATES).mkdir()
    (source / template).write_text("{{ messages }}")
    (source / ".env").write_text("SECRET=1")
    made = quantize(source, method="rtn").output
    convert(made, tmp_path / "gptq", "gptq")
    for folder in (made, tmp_path / "gptq"):
        assert (folder / template).read_text() == "{{ messages }}"
        listed = {line.partition("  ")[2] for line in (folder / beside.SUMS).read_text().splitlines()}
        assert template in listed
        assert ".env" not in listed
        assert not (folder / ".env").exists()
        beside.verify_sums(folder)
        assert {*listed, beside.SUMS} == {name for name, _ in files_of(folder)}
    (made / template).write_text("another")
    with pytest.raises(LowbitError, match=r"tool_use\.jinja is missing or not what was written"):
        beside.verify_sums(made)
