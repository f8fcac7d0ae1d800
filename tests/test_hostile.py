"""Files that mean harm: refused before they do any. `scripts/fuzz.py` looks for what nobody thought of."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit import gguf_header, hf, untrusted
from lowbit.conversion import convert
from lowbit.errors import LowbitError
from lowbit.inspection import inspect
from lowbit.results import Report
from scripts import fuzz
from tests.refused import snapshot

Folders = Callable[..., Path]


@pytest.fixture
def model(tiny_model: Folders, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "inner" / "model")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../x", "..\\x", "a\0b", "", 3]
)
def test_an_index_that_leaves_the_folder(quantize: Callable[..., Report], model: Path, name: object) -> None:
    shutil.copyfile(model / "model.safetensors", model.parent / "outside.safetensors")
    weight_map = {"model.norm.weight": name}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for read in (quantize, inspect, lambda folder: hf.index(folder, None)):  # type: ignore[arg-type]
        with pytest.raises(LowbitError, match=r"names a file outside of itself|No such file"):
            read(model)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "notes.txt", "config.json"])
def test_links_out_of_the_folder(
    quantize: Callable[..., Report], model: Path, tmp_path: Path, name: str
) -> None:
    """What a link shows would be read, copied into the output, and pushed."""
    secret = tmp_path / "secret"
    shutil.copyfile(model / name, secret) if (model / name).exists() else secret.write_text("a password")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(LowbitError, match="is a link out of its folder: copy the file to where the link is"):
        quantize(model)


def test_links_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1234").mkdir(parents=True)
    shutil.copyfile(model / "model.safetensors", cache / "blobs" / "5678")
    (cache / "snapshots" / "1234" / "model.safetensors").symlink_to("../../blobs/5678")
    assert len(untrusted.weight_files(cache / "snapshots" / "1234")) == 1


def test_pickled_weights_are_not_opened(quantize: Callable[..., Report], model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(LowbitError, match=r"has pickled weights \(\*\.bin\), which can run code"):
        quantize(model)
    with pytest.raises(LowbitError):
        hf.load(model)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_repository_is_not_run(
    quantize: Callable[..., Report], model: Path, tmp_path: Path
) -> None:
    mine = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.T", None]}
    edit(model / "config.json", auto_map=mine, model_type="unheard_of")
    edit(model / "tokenizer_config.json", auto_map=mine, tokenizer_class="T")
    (model / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass T: pass\n"
    )
    for read in (quantize, hf.load, hf.load_tokenizer, inspect):
        with pytest.raises(LowbitError):
            read(model)  # type: ignore[operator]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"vocab_size": 2**62},
        {"max_position_embeddings": 2**40},
        {"head_dim": 2**39},
    ],
    ids=str,
)
def test_numbers_out_of_proportion(
    quantize: Callable[..., Report], model: Path, values: dict[str, int]
) -> None:
    edit(model / "config.json", **values)
    with pytest.raises(LowbitError):
        quantize(model)


def test_a_number_larger_than_the_model_may_be_meant(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path]
) -> None:
    """Layers from which on Qwen2 would attend to a window: by default the 28th, of however many."""
    folder = tiny_model("qwen2", blocks=1)
    assert json.loads((folder / "config.json").read_text())["max_window_layers"] == 28
    assert len(quantize(folder).layers) == 7


def test_what_lowbit_notes_of_its_own_run_is_not_judged(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path]
) -> None:
    """The numbers of a command line stand in `config.json`, too, and may be of any size."""
    report = quantize(tiny_model("llama"), max_shard_size="20TB", seed=2**62)
    assert report.verification is not None
    assert hf.load(report.output) is not None


def test_frequencies_that_fill_the_memory(quantize: Callable[..., Report], model: Path) -> None:
    """Rotary frequencies are computed when a model is built, as many as half the size of a head."""
    edit(model / "config.json", head_dim=2**36)
    with pytest.raises(LowbitError, match=r"asks for \d+ GB of computed tensors"):
        quantize(model)


def test_endless_json(quantize: Callable[..., Report], model: Path) -> None:
    (model / "config.json").write_bytes(b'{"a":' * 10**6 + b"1" + b"}" * 10**6)
    with pytest.raises(LowbitError, match="can't be used"):
        quantize(model)
    with (model / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(LowbitError, match="has more than"):
        quantize(model)


def gguf(tensors: int = 0, values: bytes = b"", count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + values


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "4 bytes wanted"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (gguf(2**60), "tensors and 1 values in"),
        (gguf(count=2**60), "0 tensors and"),
        (gguf(values=struct.pack("<Q", 2**61)), "bytes wanted"),
        (gguf(values=struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60)), "bytes wanted"),
        (gguf(values=struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60)), "of type 8"),
        (gguf(values=struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)), "of type 9"),
        (gguf(values=struct.pack("<Q13sII", 13, b"x.block_count", 4, 10**9)), "block_count=1000000000"),
    ],
)
def test_gguf_counts(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(LowbitError, match=what):
        gguf_header.check(tmp_path / "x.gguf")


def test_a_sound_gguf_passes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    convert(checkpoint(), tmp_path / "sound.gguf")
    gguf_header.check(tmp_path / "sound.gguf")


def test_refusals_write_nothing(quantize: Callable[..., Report], model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", num_hidden_layers=10**9)
    before = snapshot(tmp_path)
    with pytest.raises(LowbitError):
        quantize(model)
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_spoiled_files(capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "200"]) == 0
    assert "200 files" in capfd.readouterr().out


def test_the_fuzzer_sees_what_it_looks_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(folder: Path) -> None:
        (tmp_path / "elsewhere").write_text("")

    def grows(folder: Path) -> None:
        kept.append(bytearray(2**21) * 2**6)

    kept: list[bytearray] = []
    monkeypatch.setattr(fuzz, "SECONDS", 20.0)
    monkeypatch.setattr(fuzz, "MEMORY", 2**26)
    for number, (do, expected) in enumerate(
        (
            (lambda folder: 1 / 0, "crash"),
            (lambda folder: os.kill(os.getpid(), 9), "crash"),
            (writes, "outside"),
            (grows, "memory"),
            (lambda folder: None, "read"),
        )
    ):
        room = tmp_path / f"room{number}"
        room.mkdir()
        monkeypatch.setitem(fuzz.READERS, "gguf", (do, "gguf", 1))
        told: list[str] = []
        assert fuzz.run_batch("gguf", [model], range(2), room, told.append) == {expected: 2}, told
