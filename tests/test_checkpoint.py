"""Shards, index, config, and the one step that puts a checkpoint in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowbit import checkpoint, durable, places
from lowbit.checkpoint import CheckpointWriter
from lowbit.errors import LowbitError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("300MB", 3 * 10**8), ("300mb", 3 * 10**8), ("1.5 GB", 15 * 10**8),
     ("2G", 2 * 10**9), ("70KB", 70_000), ("1TB", 10**12), ("4096", 4096), (" 10B ", 10)],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert checkpoint.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0", "0.1B", "5 GB GB", "five", "5GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(LowbitError, match="is not a size: write it like 5GB or 300MB"):
        checkpoint.parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "10000000TB", "9223372036854775808"])
def test_a_size_that_no_disk_has_is_refused(text: str) -> None:
    with pytest.raises(LowbitError, match="is more than any disk holds: write it like 5GB") as caught:
        checkpoint.parse_size(text)
    assert len(str(caught.value)) < 100


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 30, generator=generator)
    return {
        "a.weight": wide,
        "b.weight": wide.T,  # not contiguous
        "c.weight": wide[:7],  # a view of another's memory
        "c.bias": wide[3].bfloat16(),
        "d.qweight": torch.arange(12, dtype=torch.int32),
        "e.scalar": torch.tensor(3.0),
        "f.empty": torch.empty(0, 4),
    }


def test_one_shard_has_the_plain_name(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", 10**9)
    for name, tensor in some_tensors().items():
        writer.add(name, tensor)
    writer.finish({"a": 1}, [])
    assert sorted(file.name for file in writer.folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_file(writer.folder / "model.safetensors")
    for name, tensor in some_tensors().items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype
    with safe_open(writer.folder / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without it
    assert writer.total_size == sum(t.numel() * t.element_size() for t in some_tensors().values())
    # A view was stored alone, not with all of the memory behind it.
    assert (writer.folder / "model.safetensors").stat().st_size < writer.total_size + 2000


def test_shards_keep_to_their_size_and_to_the_index(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", 5000)
    for name, tensor in some_tensors().items():
        writer.add(name, tensor)
    writer.finish({}, [])
    shards = sorted(writer.folder.glob("*.safetensors"))
    assert [s.name for s in shards] == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((writer.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": writer.total_size}
    found = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == found
    assert set(found) == set(some_tensors())
    for shard in shards:
        sizes = [t.numel() * t.element_size() for t in load_file(shard).values()]
        assert sum(sizes) <= 5000 or len(sizes) == 1
    assert not list(writer.folder.glob("part-*"))


@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_name_may_come_once(tmp_path: Path, limit: int) -> None:
    writer = CheckpointWriter(tmp_path / "out", limit)
    writer.add("a", torch.ones(2))
    writer.add("b", torch.ones(2))
    with pytest.raises(ValueError, match="a was written twice"):
        writer.add("a", torch.ones(2))


def test_sidecars_are_copied_and_the_config_is_ours(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\x00 bytes as they are")
    writer = CheckpointWriter(tmp_path / "out", 10**9)
    writer.add("a", torch.ones(2))
    writer.finish({"name": "é"}, [tmp_path / "tokenizer.json"])
    assert (writer.folder / "tokenizer.json").read_bytes() == b"\xff\x00 bytes as they are"
    assert (writer.folder / "config.json").read_bytes() == '{\n  "name": "é"\n}\n'.encode()


def test_chat_templates_keep_their_folder(tmp_path: Path) -> None:
    """Also where the source itself is called like that, or a finished checkpoint is copied as it is."""
    source = tmp_path / places.CHAT_TEMPLATES
    (source / places.CHAT_TEMPLATES).mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    (source / places.CHAT_TEMPLATES / "rag.jinja").write_text("x")
    files = [source / "tokenizer.json", source / places.CHAT_TEMPLATES / "rag.jinja"]
    for number, sidecars in enumerate([files, [files[0], source / places.CHAT_TEMPLATES]]):
        writer = CheckpointWriter(tmp_path / f"out{number}", 10**9)
        writer.add("a", torch.ones(2))
        writer.finish({}, sidecars)
        assert (writer.folder / "tokenizer.json").is_file()
        assert (writer.folder / places.CHAT_TEMPLATES / "rag.jinja").read_text() == "x"


def test_a_subfolder_is_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / places.CHAT_TEMPLATES / "rag.jinja"
    file.parent.mkdir()
    file.touch()
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync", synced.append)
    durable.sync_folder(tmp_path)
    assert synced == [file, file.parent, tmp_path]


def test_a_run_that_ended_while_it_copied_goes_on(tmp_path: Path) -> None:
    template = tmp_path / "source" / places.CHAT_TEMPLATES / "rag.jinja"
    template.parent.mkdir(parents=True)
    template.write_text("x")
    writer = CheckpointWriter(tmp_path / "out", 10**9, [])
    writer.add("a", torch.ones(2))
    marks = writer.mark()
    writer.finish({}, [template])
    again = CheckpointWriter(tmp_path / "out", 10**9, marks)
    assert not (again.folder / places.CHAT_TEMPLATES).exists()
    again.finish({}, [template])
    assert (again.folder / places.CHAT_TEMPLATES / "rag.jinja").is_file()


@pytest.mark.parametrize("tied", [None, False])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config(tmp_path: Path, tied: bool | None, key: str) -> None:
    source = {
        "architectures": ["X"],
        key: "float16",
        "tie_word_embeddings": True,
        "text_config": {key: "float16", "tie_word_embeddings": True, "hidden_size": 8},
        "vision_config": {"hidden_size": 4},
        "rope_scaling": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(source))
    config = checkpoint.quantized_config(tmp_path / "config.json", {"quant_method": "gptq"}, tied)
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in json.dumps(config)
    assert "float16" not in json.dumps(config).replace("bfloat16", "")
    assert config["quantization_config"] == {"quant_method": "gptq"}
    expected = True if tied is None else tied
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == expected
    assert config["vision_config"] == {"hidden_size": 4}
    assert config["rope_scaling"] is None
    assert config["architectures"] == ["X"]


@pytest.mark.parametrize(
    ("tensor", "model", "expected"),
    [
        (torch.float16, torch.float16, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),  # a router or a scale kept exact on purpose
        (torch.int64, torch.float16, torch.int64),
        (torch.bool, torch.float16, torch.bool),
    ],
)
def test_stored_dtype(tensor: torch.dtype, model: torch.dtype, expected: torch.dtype) -> None:
    assert checkpoint.stored_dtype(tensor, model) == expected


def make_checkpoint(folder: Path, mark: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(mark)
    return folder


def test_put_in_place(tmp_path: Path) -> None:
    checkpoint.put_in_place(make_checkpoint(tmp_path / "scratch" / "checkpoint", "new"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    (tmp_path / "out" / "stale.bin").write_text("of the old one")
    checkpoint.put_in_place(make_checkpoint(tmp_path / "scratch" / "checkpoint", "newer"), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "newer"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_old_checkpoint_survives_a_failed_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "out", "old")
    finished = make_checkpoint(tmp_path / "scratch" / "checkpoint", "new")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self == finished:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.put_in_place(finished, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_an_old_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.gguf").write_text("old")
    (tmp_path / "scratch").mkdir()
    finished = tmp_path / "scratch" / "model.gguf"
    finished.write_text("new")

    def moved(self: Path, target: Path) -> Path:
        raise AssertionError(f"{self} was moved: nothing is called {target} for a moment")

    monkeypatch.setattr(Path, "rename", moved)
    checkpoint.put_in_place(finished, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "new"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_kill_leaves_of_an_exchange_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames both are whole in a folder beside the output that `ls` shows."""
    make_checkpoint(tmp_path / "out", "old")
    rename, seen = Path.rename, {}

    def last_moment(self: Path, target: Path) -> Path:
        if self.name == "checkpoint":
            seen.update({path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.json")})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", last_moment)
    with checkpoint.scratch_beside(tmp_path / "out") as scratch:
        checkpoint.put_in_place(make_checkpoint(scratch / "checkpoint", "new"), tmp_path / "out")
    assert {path.parent.name: text for path, text in seen.items()} == {"replaced": "old", "checkpoint": "new"}
    assert all(path.parts[0].startswith("out.unfinished-") for path in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_scratch_leaves_no_trace_of_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"

    def run(error: type[BaseException] | None) -> None:
        with checkpoint.scratch_beside(target) as scratch:
            assert scratch.parent == target.parent
            (scratch / "part").write_text("half a file")
            if error:
                raise error
            make_checkpoint(target, "done")

    for error in (KeyError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            run(error)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine").write_text("was here before")
    with pytest.raises(KeyError):
        run(KeyError)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["deep", "deep/mine"]
    run(None)
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("depth", [1, 2])
def test_an_output_below_a_file(tmp_path: Path, depth: int) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path.joinpath("file", *["x"] * depth)
    with (
        pytest.raises(LowbitError, match=r"can't be written \(.+\): choose another"),
        checkpoint.scratch_beside(target),
    ):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_target(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "models" / "original", "model")
    accepted: list[tuple[Path, bool]] = [(tmp_path / "new", False), (tmp_path / "empty", False)]
    (tmp_path / "empty").mkdir()
    accepted.append((make_checkpoint(tmp_path / "old", "old"), True))
    (tmp_path / "old" / "model.safetensors").touch()
    accepted.append((source / "inside", False))  # in the model's folder, but not in its way
    for output, overwrite in accepted:
        places.check_target(output, str(source), overwrite)
    (tmp_path / "file").write_text("")
    for name in ("project", "written"):
        (make_checkpoint(tmp_path / name, name) / "model.safetensors").touch()
    (tmp_path / "project" / ".git").mkdir()
    (tmp_path / "written" / "thesis.tex").write_text("ten years")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "models" / "config.json").write_text("a checkpoint around the model")
    refused: list[tuple[Path, bool, str]] = [
        (tmp_path / "old", False, "exists and is not empty: choose another or add --overwrite"),
        (source, True, "is the model itself"),
        (source.parent, True, "holds .*the model itself"),
        ((tmp_path / "link").resolve(), True, "is the model itself"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "model.gguf", False, "named like a file: choose a folder, and lowbit convert"),
        (tmp_path / "notes", True, "holds something else than a model"),
        (tmp_path / "project", True, r"/\.git is no part of a model: move it away"),
        (tmp_path / "written", True, r"/thesis\.tex is no part of a model: move it away"),
    ]
    for output, overwrite, message in refused:
        with pytest.raises(LowbitError, match=message):
            places.check_target(output, str(source), overwrite)
    with pytest.raises(LowbitError, match="the model itself"):
        places.check_target(source, str(tmp_path / "link"), True)
    places.check_target(tmp_path / "old", "", True)  # a model without a folder
    places.check_target(tmp_path / "old", "org/name", True)


def test_a_gguf_beside_an_old_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "config")
    (folder / "model.gguf").write_text("the only copy")
    with pytest.raises(LowbitError, match=r"holds .*the model itself"):
        places.check_target(folder, str(folder / "model.gguf"), True)


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    checkpoint.check_room(tmp_path / "not" / "yet", 2_999_999_999)
    assert asked == [tmp_path]
    with pytest.raises(LowbitError, match=r"3\.00 GB free and 4\.00 GB are needed: free some space or"):
        checkpoint.check_room(tmp_path, 4_000_000_000)
