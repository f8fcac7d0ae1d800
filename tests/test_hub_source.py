"""`--drop-source`: the same bytes as from a folder, with a few files of the source on the disk at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme, Target, pipeline
from lowbit.errors import LowbitError
from lowbit.hub_shards import HubShards
from lowbit.hub_source import HubSource
from lowbit.results import Report
from lowbit.source import Source
from tests.hub_stub import MODEL, Hub, shard
from tests.refused import Refused
from tests.test_resume import bytes_of

ROOT = Path(__file__).parents[1]
Quantize = Callable[..., Report]
Make = Callable[[str], Path]


@pytest.mark.parametrize(
    ("kind", "method"),
    [("blocks", "rtn"), ("blocks", "gptq"), ("blocks", "qronos"), ("blocks", "awq"), ("single", "gptq"),
     ("extra", "rtn")],
)  # fmt: skip
def test_the_same_bytes_as_from_a_folder(
    hub: Hub, hub_cache: Path, hub_models: Make, quantize: Quantize, tmp_path: Path, kind: str, method: str
) -> None:
    hub.folder = hub_models(kind)
    options: dict[str, Any] = {"method": method, "max_shard_size": "60KB"}
    report = quantize(MODEL, output=tmp_path / "dropped", keep_source=False, **options)
    quantize(str(hub_models(kind)), output=tmp_path / "local", **options)
    assert bytes_of(tmp_path / "dropped") == bytes_of(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dropped", "local"]
    assert not list(hub_cache.rglob("*.safetensors"))
    fetched = [name for name in hub.whole if name.endswith(".safetensors")]
    (note,) = [note for note in report.notes if "downloaded" in note]
    total = sum((hub.folder / name).stat().st_size for name in fetched)
    assert note.startswith(f"{total / 1e6:.2f} MB of the source downloaded in {len(set(fetched))} files")
    assert ("more than once" in note) == (len(fetched) > len(set(fetched)))


def test_few_files_are_on_the_disk(
    hub: Hub, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, mapped, ahead, download = [], [], 0, HubShards._download
    source = tmp_path / "out.lowbit-work" / "source"

    def look() -> None:
        outside = source / "outside"
        files = [path for path in source.rglob("*.safetensors") if outside not in path.parents]
        held.append(len([*files, *source.rglob("*.incomplete")]))
        if sys.platform == "linux":  # what is removed but mapped takes room
            maps = Path("/proc/self/maps").read_text().splitlines()
            mapped.extend(line for line in maps if str(source) in line and line.endswith("(deleted)"))

    def watched(self: HubShards, *args: Any) -> None:
        nonlocal ahead
        ahead += threading.current_thread() is not threading.main_thread()
        look()
        download(self, *args)
        look()

    monkeypatch.setattr(HubShards, "_download", watched)
    quantize(MODEL, method="gptq", keep_source=False)
    most = 4  # the first block begins in one file and ends in the third, and one is on its way
    assert len(held) >= 12
    assert max(held) <= most < 6
    assert ahead >= 3
    assert mapped == []


def test_the_cache_is_read_and_left_alone(hub: Hub, hub_cache: Path, quantize: Quantize) -> None:
    kept = [Path(hf_hub_download(MODEL, shard(number))) for number in (1, 3)]
    report = quantize(MODEL, keep_source=False)
    assert all(path.is_file() for path in kept)
    assert [hub.whole.count(shard(number)) for number in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert "downloaded in 4 files" in " ".join(report.notes)
    assert len(list(hub_cache.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("kind", ["blocks", "single", "extra"])
def test_opened_as_from_a_folder(hub: Hub, hub_models: Make, tmp_path: Path, kind: str) -> None:
    hub.folder = hub_models(kind)
    remote = HubSource(MODEL, tmp_path / "source", torch.bfloat16)
    local = Source(hub_models(kind), torch.bfloat16)
    assert list(remote._file_of) == list(local._file_of)
    assert [path.name for path in remote._file_of.values()] == [path.name for path in local._file_of.values()]
    assert remote.bytes == local.bytes
    assert remote.extra_keys == local.extra_keys
    assert not any(name.endswith(".safetensors") for name in hub.whole)
    again = HubSource(MODEL, tmp_path / "other", torch.bfloat16)
    assert remote.identity() == again.identity()


def test_room_for_what_is_held(
    hub: Hub, hub_models: Make, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("lowbit.target.check_room", lambda _, count: needed.append(count))
    quantize(str(hub_models("blocks")), verify_output=False)
    quantize(MODEL, keep_source=False, overwrite=True, verify_output=False)
    files = {n: (hub_models("blocks") / shard(n)).stat().st_size for n in range(1, 7)}
    parts = [files[1] + files[2] + files[3], files[3] + files[4], files[4] + files[5], files[6]]
    outside = 2 * (352 * 64 + 64)  # embedding and norm, bfloat16
    assert needed[1] - needed[0] == max(parts) + max(files.values()) + outside


def test_known_by_what_the_hub_lists(hub: Hub, hub_models: Make, tmp_path: Path) -> None:
    before = HubSource(MODEL, tmp_path / "source", torch.bfloat16).identity()
    hub.folder = Path(shutil.copytree(hub_models("blocks"), tmp_path / "changed"))
    file = hub.folder / shard(2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert HubSource(MODEL, tmp_path / "source", torch.bfloat16).identity() != before


def test_a_hub_that_fails_is_waited_for(
    hub: Hub, hub_models: Make, quantize: Quantize, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": "gptq", "max_shard_size": "60KB"}
    hub.answer = lambda name, content: 500 if name == shard(5) and shard(3) in hub.whole else content
    with pytest.raises(
        ConnectionError, match=rf"^{MODEL}: {shard(5)} could not be downloaded .* check the network$"
    ):
        quantize(MODEL, keep_source=False, **options)
    work = tmp_path / "out.lowbit-work"
    assert json.loads((work / "state.json").read_text())["facts"]["blocks"] >= 1
    assert not (work / "source").exists()
    hub.answer, before = lambda name, content: content, len(hub.whole)
    report = quantize(MODEL, keep_source=False, **options)
    quantize(str(hub_models("blocks")), output=tmp_path / "local", **options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "local")
    assert shard(3) not in hub.whole[before:]
    assert "more than once" in " ".join(report.notes)
    assert not work.exists()


def test_downloads_that_were_asked_for_again_are_told_of(
    hub: Hub, quantize: Quantize, tmp_path: Path
) -> None:
    """Those before an interruption, too."""
    spoilt: list[str] = []

    def damaged_once(name: str, content: bytes) -> bytes | int:
        if name == shard(5) and shard(4) in spoilt:
            return 500
        if name not in (shard(1), shard(4)) or name in spoilt:  # both come ahead
            return content
        spoilt.append(name)
        return content[:-1] + b"!"

    hub.answer = damaged_once
    with pytest.raises(ConnectionError, match=shard(5)):
        quantize(MODEL, method="gptq", keep_source=False)
    assert spoilt == [shard(1), shard(4)]
    hub.answer = lambda name, content: content
    report = quantize(MODEL, method="gptq", keep_source=False)
    (note,) = [note for note in report.notes if "asked for again" in note]
    assert note.startswith(
        f"downloads that failed and were asked for again: 2; the first: {MODEL}: {shard(1)} arrived damaged"
    )


@pytest.mark.slow
def test_a_killed_run_goes_on(
    hub: Hub, hub_cache: Path, hub_models: Make, text_file: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lowbit", "quantize", MODEL, "--output", str(tmp_path / "out"),
               "--drop-source", "--method", "gptq", "--group-size", "32", "--dataset", text_file,
               "--samples", "4", "--seq-len", "48", "--dtype", "float32", "--json"]  # fmt: skip
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(hub_cache),
    }
    running: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def kill(name: str, content: bytes) -> bytes:
        if name == shard(6):  # on its way while the last block is rounded
            running[0].kill()
        return content

    hub.answer = kill
    running.append(start())
    running[0].communicate()
    assert running[0].returncode == -signal.SIGKILL
    state = json.loads((tmp_path / "out.lowbit-work" / "state.json").read_text())
    assert state["facts"]["blocks"] >= 1
    hub.answer = lambda name, content: content
    out, err = (again := start()).communicate()
    assert again.returncode == 0, err
    assert "downloaded" in " ".join(json.loads(out)["notes"])
    pipeline.quantize(str(hub_models("blocks")), QuantScheme(4, 32), output=tmp_path / "local", method="gptq",
                      dataset=text_file, samples=4, seq_len=48, dtype="float32",
                      auto_group=False)  # fmt: skip
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "out"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--effort", "high"],
            "training reads the whole original: use --effort balanced, or use --keep-source",
        ),
        (["--method", "qat"], "training reads the whole original: leave out --method qat, or"),
        (["--dataset", "self"], "--dataset self loads the whole model: give a text, or"),
        (["--target-bpw", "4.5"], "--target-bpw 4.5 reads the model three times: give --bits, or"),
    ],
)
def test_what_needs_the_whole_source(refused: Refused, options: list[str], expected: str) -> None:
    method = options[1] if options[0] == "--method" else "gptq"
    line = refused(MODEL, "--drop-source", *options, method=method)
    assert line.startswith("--drop-source: ")
    assert expected in line


def test_what_is_no_hub_id(refused: Refused, hub_models: Make, tmp_path: Path) -> None:
    folder = hub_models("blocks")
    assert refused(folder, "--drop-source") == (
        f"--drop-source is for a hub id, and {folder} is a local file or folder: use --keep-source"
    )
    assert "and model.gguf is a local file or folder" in refused("model.gguf", "--drop-source")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(LowbitError, match="not for a model in memory: use --keep-source"):
        pipeline.quantize(loaded, output=tmp_path / "out", keep_source=False)


def test_one_process_only(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.ranks.size", lambda: 2)
    with pytest.raises(LowbitError, match="--drop-source is for one process, not 2: leave out torchrun"):
        quantize(MODEL, keep_source=False)


def test_a_text_out_of_reach_is_not_replaced(
    hub: Hub, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(spec: str, **_: Any) -> list[str]:
        raise LowbitError(f"{spec} can't be read")

    monkeypatch.setattr("lowbit.dataset.read_documents", unreachable)
    with pytest.raises(LowbitError, match="pile-10k"):
        quantize(MODEL, method="gptq", dataset=None, keep_source=False)


def test_a_target_is_refused_from_python(quantize: Quantize) -> None:
    with pytest.raises(LowbitError, match=r"--target-bpw 4\.5 reads the model three times"):
        quantize(MODEL, None, within=Target(bits_per_weight=4.5), keep_source=False)
