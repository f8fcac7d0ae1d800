"""`org/name@revision`: the files of that commit, wherever a model is named, and which commit it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit import QuantScheme, card, hf, record, report
from lowbit.errors import LowbitError
from lowbit.places import split_revision
from lowbit.results import Report
from tests.hub_stub import COMMIT, MODEL, OLD_COMMIT, Hub
from tests.refused import Refused
from tests.test_resume import bytes_of
from tests.tiny import make_model

Quantize = Callable[..., Report]
Folders = Callable[..., Path]


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `blocks` with other weights; never write to it."""
    folder = tmp_path_factory.mktemp("older")
    return make_model("llama", folder, seed=1, max_shard_size="60KB", tied=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name@v1", ("org/name", "v1")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("gpt2@main", ("gpt2", "main")),
        ("org/name@a@b", ("org/name", "a@b")),  # git allows one in the name of a branch
        ("org/name", ("org/name", None)),
        ("./name@v1", ("./name@v1", None)),
        ("~/name@v1", ("~/name@v1", None)),
        ("/models/me@home/name", ("/models/me@home/name", None)),
        ("a/b/c@v1", ("a/b/c@v1", None)),
        ("me@home/model.gguf", ("me@home/model.gguf", None)),
        ("here/name@v1", ("here/name@v1", None)),
    ],
)
def test_what_is_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str | None]
) -> None:
    (tmp_path / "here" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_revision(name) == expected


@pytest.mark.parametrize(
    ("revision", "keep_source"),
    [("v1", True), ("v1", False), ("refs/pr/1", True), (OLD_COMMIT, False), ("main", True)],
)
def test_the_bytes_of_a_revision(
    hub: Hub, older: Path, quantize: Quantize, tmp_path: Path, revision: str, keep_source: bool
) -> None:
    hub.older = older
    done = quantize(f"{MODEL}@{revision}", output=tmp_path / "hub", keep_source=keep_source)
    folder, commit = (hub.folder, COMMIT) if revision == "main" else (older, OLD_COMMIT)
    quantize(str(folder), output=tmp_path / "local")
    assert bytes_of(tmp_path / "hub") == bytes_of(tmp_path / "local")
    kept = json.loads((done.output / record.NAME).read_text())
    assert (kept["base_model"], kept["model"], kept["commit"]) == (MODEL, f"{MODEL}@{revision}", commit)
    text = (done.output / card.NAME).read_text()
    assert f"base_model: {MODEL}\n" in text
    assert f"[{MODEL}](https://huggingface.co/{MODEL}) at commit `{commit}`, quantized with" in text
    assert f"{MODEL}</a> at commit {commit}" in (done.output / report.NAME).read_text()


def test_without_a_revision_the_newest_commit_is_told(
    hub: Hub, older: Path, quantize: Quantize, tmp_path: Path
) -> None:
    hub.older = older
    done = quantize(MODEL)
    quantize(str(hub.folder), output=tmp_path / "local")
    assert bytes_of(done.output) == bytes_of(tmp_path / "local")
    quantize(str(older), output=tmp_path / "other")
    assert bytes_of(done.output) != bytes_of(tmp_path / "other")
    assert json.loads((done.output / record.NAME).read_text())["commit"] == COMMIT


@pytest.mark.parametrize("options", [(), ("--drop-source",)])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{MODEL}@v9", f"{MODEL} has no revision v9: give a branch, tag or commit of it"),
        (f"{MODEL}@", f"{MODEL}@ is half a name: give org/name@revision, with a branch, tag or commit"),
        ("@v1", "@v1 is half a name: give org/name@revision, with a branch, tag or commit"),
        ("here/name@v1", "here/name is a local file or folder, without revisions: leave out @v1"),
    ],
)
def test_a_revision_that_is_none(
    hub: Hub, older: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, expected: str, options: tuple[str, ...],
) -> None:  # fmt: skip
    hub.older = older
    (tmp_path / "here" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refused(name, *options) == expected
    for load in (hf.load, hf.load_stock, hf.load_tokenizer, hf.quantization_of):
        with pytest.raises(LowbitError) as caught:
            load(name)
        assert str(caught.value) == expected


def test_a_revision_is_loaded(hub: Hub, older: Path) -> None:
    hub.older = older
    for name, folder in ((f"{MODEL}@v1", older), (MODEL, hub.folder)):
        same_weights(lowbit.load(name), lowbit.load(folder))


def test_a_revision_of_a_checkpoint_is_loaded(hub: Hub, checkpoint: Folders) -> None:
    hub.folder, hub.older = checkpoint(), checkpoint(scheme=QuantScheme(8, 64))
    same_weights(lowbit.load(f"{MODEL}@v1"), lowbit.load(hub.older))
    same_weights(lowbit.load(MODEL), lowbit.load(hub.folder))


def test_a_tokenizer_of_a_revision(hub: Hub, older: Path, tmp_path: Path) -> None:
    hub.older = Path(shutil.copytree(older, tmp_path / "older"))
    file = hub.older / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
    assert hf.load_tokenizer(f"{MODEL}@v1").model_max_length == 77
    assert hf.load_tokenizer(MODEL).model_max_length != 77


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", ["me@home/model", "org/name@v1", "model@v1"])
def test_a_folder_with_an_at_sign(
    tiny_model: Folders, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("llama"), name)
    done = quantize(name)
    quantize(str(tiny_model("llama")), output=tmp_path / "plain")
    assert bytes_of(done.output) == bytes_of(tmp_path / "plain")
    kept = json.loads((done.output / record.NAME).read_text())
    assert (kept["base_model"], kept["model"], kept["commit"]) == (None, Path(name).name, None)
    assert "at commit" not in (done.output / card.NAME).read_text()
    same_weights(lowbit.load(name), lowbit.load(tiny_model("llama")))
    assert len(hf.load_tokenizer(name)) == len(hf.load_tokenizer(tiny_model("llama")))


def test_a_record_without_a_commit(hub: Hub, quantize: Quantize) -> None:
    done = quantize(MODEL)
    kept: dict[str, Any] = json.loads((done.output / record.NAME).read_text())
    told, told_page = card.render(kept), report.render(kept)
    del kept["commit"]
    assert card.render(kept) == told.replace(f" at commit `{COMMIT}`", "") != told
    assert report.render(kept) == told_page.replace(f" at commit {COMMIT}", "") != told_page


def test_a_data_set_at_a_revision_is_named(quantize: Quantize, tiny_model: Folders) -> None:
    kept: dict[str, Any] = json.loads((quantize(tiny_model("llama")).output / record.NAME).read_text())
    kept["quantization"]["calibration"] = "org/text@refs/convert/parquet:config: 128 x 512 tokens"
    assert card.metadata(kept).to_dict()["datasets"] == ["org/text"]
    assert record.public("org/text@refs/convert/parquet:config") == "org/text@refs/convert/parquet:config"


def test_commands_keep_the_revision() -> None:
    assert record.public(f"{MODEL}@v1") == f"{MODEL}@v1"
    assert record.public(f"--reference={MODEL}@v1") == f"--reference={MODEL}@v1"
