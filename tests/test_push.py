"""What goes to the Hub, with a stand-in for its client whose signatures are the client's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import _http, filter_repo_objects

from lowbit import beside
from lowbit.errors import LowbitError
from lowbit.push import NEVER, files_of, push

Folders = Callable[..., Path]


@pytest.fixture
def folder(checkpoint: Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(), tmp_path / "w4"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = RepoUrl("https://huggingface.co/me/river-w4")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return api


def test_a_dry_run_sends_and_writes_nothing(folder: Path, hub: Any) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = push(folder, "me/river-w4", dry_run=True)
    assert hub.mock_calls == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    names = {name for name, _ in done.files}
    assert {"model.safetensors", "config.json", "README.md", "report.html", "lowbit_report.json"} < names
    assert not any(name.startswith(".cache") for name in names)
    assert done.bytes == sum((folder / name).stat().st_size for name in names)
    assert done.files[0][1] == max(size for _, size in done.files)
    assert done.url is None


def test_what_is_shown_is_what_the_client_takes(folder: Path) -> None:
    """huggingface_hub's own filter, on the patterns that it is given."""
    for name in (
        ".git/config",
        "sub/.hidden",
        "sub/own.json",
        "__pycache__/a.pyc",
        "sub/__pycache__/b.pyc",
        "x.tmp",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    everything = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    kept = set(filter_repo_objects(everything, ignore_patterns=list(NEVER)))
    assert {name for name, _ in files_of(folder)} == kept
    assert "sub/own.json" in kept
    assert not {"sub/.hidden", "x.tmp", "sub/__pycache__/b.pyc"} & kept


def test_an_upload(folder: Path, hub: Any) -> None:
    done = push(folder, "me/river-w4", private=True)
    hub.create_repo.assert_called_once_with("me/river-w4", private=True, exist_ok=True)
    (call,) = hub.upload_folder.call_args_list
    assert (call.kwargs["repo_id"], call.kwargs["folder_path"]) == ("me/river-w4", folder)
    assert done.url == "https://huggingface.co/me/river-w4"
    card = (folder / "README.md").read_text()
    assert 'model="me/river-w4"' in card
    assert "vllm serve me/river-w4" in card
    assert ModelCard(card).data.library_name == "transformers"


def test_an_edited_card_goes_as_it_is(folder: Path, hub: Any) -> None:
    mine = (folder / "README.md").read_text() + "\nMine.\n"
    (folder / "README.md").write_text(mine)
    push(folder, "me/river-w4")
    assert ModelCard((folder / "README.md").read_text()).text == ModelCard(mine).text
    hub.create_repo.assert_called_once_with("me/river-w4", private=None, exist_ok=True)


def test_errors_of_the_hub_are_one_line(folder: Path, hub: Any) -> None:
    hub.create_repo.side_effect = LocalTokenNotFoundError("no token")
    with pytest.raises(LowbitError, match="hf auth login"):
        push(folder, "me/river-w4")
    hub.create_repo.side_effect = ConnectionError("down")
    with pytest.raises(LowbitError, match="can't be reached"):
        push(folder, "me/river-w4")


def test_without_a_network(folder: Path, hub: Any) -> None:
    """Errors of the HTTP client, by its true classes; the card waits for the repository."""
    client: Any = getattr(_http, "httpx2", None) or getattr(_http, "httpx", None)
    assert not issubclass(client.ConnectError, OSError)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.create_repo.side_effect = client.ConnectError("no route")
    with pytest.raises(LowbitError, match=r"^the Hub can't be reached \(ConnectError\): the same command"):
        push(folder, "me/river-w4")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    hub.create_repo.side_effect = None
    hub.upload_folder.side_effect = client.ReadTimeout("slow")
    with pytest.raises(LowbitError, match=r"^the Hub can't be reached \(ReadTimeout\)"):
        push(folder, "me/river-w4")
    hub.upload_folder.side_effect = ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        push(folder, "me/river-w4")


def test_the_card_names_the_repository_that_was_made(folder: Path, hub: Any) -> None:
    push(folder, "river-w4")
    assert "vllm serve me/river-w4" in (folder / "README.md").read_text()
    beside.verify_sums(folder)


def test_a_card_that_is_a_link_is_replaced(folder: Path, hub: Any) -> None:
    """The hub's cache shares what its links lead to."""
    blob = (folder / "README.md").rename(folder / "blob")
    before = blob.read_bytes()
    (folder / "README.md").symlink_to("blob")
    push(folder, "me/river-w4")
    assert blob.read_bytes() == before
    assert "vllm serve me/river-w4" in (folder / "README.md").read_text()


def test_a_card_that_cannot_be_written(folder: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbit.card.write", full)
    with pytest.raises(LowbitError, match=r"w4 can't be written \(No space left on device\), and its card"):
        push(folder, "me/river-w4")
    assert not hub.upload_folder.called


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "white space", "-x/y"])
def test_no_name_of_a_repository(folder: Path, repo_id: str) -> None:
    with pytest.raises(LowbitError, match="write it like org/name"):
        push(folder, repo_id, dry_run=True)


def test_what_is_not_a_finished_checkpoint(folder: Path, tiny_model: Folders, tmp_path: Path) -> None:
    def refused(path: Path, why: str) -> None:
        with pytest.raises(LowbitError, match=why):
            push(path, "me/river-w4", dry_run=True)

    refused(tmp_path / "nothing", "is not a folder")
    refused(tiny_model("llama"), "is not quantized")
    (folder / "part-1.safetensors").touch()
    refused(folder, "unfinished shards")
    (folder / "state.json").touch()
    refused(folder, "work folder of an unfinished run")
    (folder / "state.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refused(folder, "has no weights")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
