"""`--drop-source`: the same bytes as from a folder, with a few files of the source on the disk at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme, Target, pipeline
from lowbit.errors import LowbitError
from lowbit.hub_shards import HubShards, copy_parts
from lowbit.hub_source import HubSource
from lowbit.results import Report
from lowbit.source import Source
from tests.hub_stub import MODEL, Hub, serving
from tests.refused import Refused
from tests.test_resume import bytes_of
from tests.tiny import make_model

ROOT = Path(__file__).parents[1]
Quantize = Callable[..., Report]
Make = Callable[[str], Path]


def shard(number: int) -> str:
    return f"model-0000{number}-of-00006.safetensors"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folders by kind: `blocks` end inside of files, `single` has one file, `extra` a layer too many."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            if kind == "single":
                return make_model("qwen2", folder, tied=True)
            make_model("llama", folder, max_shard_size="60KB", tied=False)
            if kind == "extra":
                add_layer(folder)
        return made[kind]

    return make


def add_layer(folder: Path) -> None:
    """A file of tensors that the architecture does not use."""
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    added = {f"model.layers.9.part.{n}.weight": torch.randn(64, 64, dtype=torch.bfloat16) for n in range(2)}
    save_file(added, folder / "model-extra.safetensors", {"format": "pt"})
    told["weight_map"] |= dict.fromkeys(added, "model-extra.safetensors")
    index.write_text(json.dumps(told))


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def hub(models: Make, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model whose blocks end inside of files, and an empty cache."""
    with serving(models("blocks")) as hub:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
        yield hub


@pytest.mark.parametrize(
    ("kind", "method"),
    [("blocks", "rtn"), ("blocks", "gptq"), ("blocks", "qronos"), ("blocks", "awq"), ("single", "gptq"),
     ("extra", "rtn")],
)  # fmt: skip
def test_the_same_bytes_as_from_a_folder(
    hub: Hub, cache: Path, models: Make, quantize: Quantize, tmp_path: Path, kind: str, method: str
) -> None:
    hub.folder = models(kind)
    options: dict[str, Any] = {"method": method, "max_shard_size": "60KB"}
    report = quantize(MODEL, output=tmp_path / "dropped", keep_source=False, **options)
    quantize(str(models(kind)), output=tmp_path / "local", **options)
    assert bytes_of(tmp_path / "dropped") == bytes_of(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dropped", "local"]
    assert not list(cache.rglob("*.safetensors"))
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


def test_one_download_is_ahead(hub: Hub, tmp_path: Path) -> None:
    shards = HubShards(MODEL, tmp_path / "source")
    assert shards.need([shard(1)], shard(2)) == [shard(1)]
    assert shards._ahead is not None
    shards._ahead.join()
    assert hub.whole[-1] == shard(2)
    assert shards.need([shard(2)]) == [shard(2)]
    assert hub.whole.count(shard(2)) == 1
    assert [path.name for path in (tmp_path / "source").glob("*.safetensors")] == [shard(2)]
    assert shards.need([shard(1)]) == [shard(1)]  # dropped, so it comes again
    shards.close()
    assert not (tmp_path / "source").exists()


def test_what_is_on_its_way_is_given_up(hub: Hub, tmp_path: Path) -> None:
    shards = HubShards(MODEL, tmp_path / "source")
    hub.answer = lambda name, content: content if name == shard(1) else time.sleep(0.3) or content
    shards.need([shard(1)], shard(2))
    ahead = shards._ahead
    assert ahead is not None
    shards.close()
    assert not ahead.is_alive()
    assert not ahead.done
    assert not (tmp_path / "source").exists()


def test_a_failure_ahead_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    shards = HubShards(MODEL, tmp_path / "source")
    shards.need([shard(1)])
    hub.answer = lambda name, content: 500
    shards.need([shard(1)], shard(2))
    assert shards._ahead is not None
    shards._ahead.join()
    hub.answer = lambda name, content: content
    assert shards.need([shard(2)]) == [shard(2)]
    assert shards.has([shard(2)])


def test_the_cache_is_read_and_left_alone(hub: Hub, cache: Path, quantize: Quantize) -> None:
    kept = [Path(hf_hub_download(MODEL, shard(number))) for number in (1, 3)]
    report = quantize(MODEL, keep_source=False)
    assert all(path.is_file() for path in kept)
    assert [hub.whole.count(shard(number)) for number in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert "downloaded in 4 files" in " ".join(report.notes)
    assert len(list(cache.rglob("*.safetensors"))) == 2


def test_opened_as_from_a_folder(hub: Hub, models: Make, tmp_path: Path) -> None:
    remote = HubSource(MODEL, tmp_path / "source", torch.bfloat16)
    local = Source(models("blocks"), torch.bfloat16)
    assert list(remote._file_of) == list(local._file_of)
    assert [path.name for path in remote._file_of.values()] == [path.name for path in local._file_of.values()]
    assert remote.bytes == local.bytes
    assert remote.held < local.bytes
    assert not any(name.endswith(".safetensors") for name in hub.whole)
    again = HubSource(MODEL, tmp_path / "other", torch.bfloat16)
    assert remote.identity() == again.identity()


def test_room_for_what_is_held(
    hub: Hub, models: Make, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("lowbit.target.check_room", lambda _, count: needed.append(count))
    quantize(str(models("blocks")), verify_output=False)
    quantize(MODEL, keep_source=False, overwrite=True, verify_output=False)
    files = {n: (models("blocks") / shard(n)).stat().st_size for n in range(1, 7)}
    parts = [files[1] + files[2] + files[3], files[3] + files[4], files[4] + files[5], files[6]]
    outside = 2 * (352 * 64 + 64)  # embedding and norm, bfloat16
    assert needed[1] - needed[0] == max(parts) + max(files.values()) + outside


def test_known_by_what_the_hub_lists(hub: Hub, models: Make, tmp_path: Path) -> None:
    before = HubSource(MODEL, tmp_path / "source", torch.bfloat16).identity()
    hub.folder = Path(shutil.copytree(models("blocks"), tmp_path / "changed"))
    file = hub.folder / shard(2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert HubSource(MODEL, tmp_path / "source", torch.bfloat16).identity() != before


def test_parts_are_copied_to_their_places(models: Make, tmp_path: Path) -> None:
    whole = models("blocks") / shard(1)
    content = whole.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    places = json.loads(content[8:begin])
    start, stop = places["model.embed_tokens.weight"]["data_offsets"]
    copy_parts(whole, [(start, stop)], tmp_path / "deep" / "copy.safetensors")
    copied = (tmp_path / "deep" / "copy.safetensors").read_bytes()
    assert len(copied) == len(content)
    assert copied[:begin] == content[:begin]
    assert copied[begin + start : begin + stop] == content[begin + start : begin + stop]
    assert not any(copied[begin : begin + start] + copied[begin + stop :])
    with safe_open(tmp_path / "deep" / "copy.safetensors", "pt") as opened:
        assert set(opened.keys()) == places.keys() - {"__metadata__"}


def test_a_hub_that_fails_is_waited_for(hub: Hub, models: Make, quantize: Quantize, tmp_path: Path) -> None:
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
    quantize(str(models("blocks")), output=tmp_path / "local", **options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "local")
    assert shard(3) not in hub.whole[before:]
    assert "more than once" in " ".join(report.notes)
    assert not work.exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(hub: Hub, cache: Path, models: Make, text_file: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowbit", "quantize", MODEL, "--output", str(tmp_path / "out"),
               "--drop-source", "--method", "gptq", "--group-size", "32", "--dataset", text_file,
               "--samples", "4", "--seq-len", "48", "--json"]  # fmt: skip
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache)}
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
    pipeline.quantize(str(models("blocks")), QuantScheme(4, 32), output=tmp_path / "local", method="gptq",
                      dataset=text_file, samples=4, seq_len=48, auto_group=False)  # fmt: skip
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "out"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda content: 500, "could not be downloaded (HfHubHTTPError): check the network"),
        (lambda content: content[:-100], "could not be downloaded (OSError): check the network"),
        (lambda content: content[:-1] + b"!", "arrived damaged"),
    ],
)
def test_a_file_that_does_not_arrive(
    hub: Hub, refused: Refused, answer: Callable[[bytes], bytes | int], expected: str
) -> None:
    hub.answer = lambda name, content: answer(content) if name.endswith(".safetensors") else content
    line = refused(MODEL, "--drop-source")
    assert line.startswith(f"{MODEL}: {shard(5)} ")  # the last norm is there, the embedding is in the first
    assert expected in line


def test_a_hub_without_weights(hub: Hub, refused: Refused, models: Make, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(models("single"), tmp_path / "copy"))
    (hub.folder / "model.safetensors").unlink()
    assert refused(MODEL, "--drop-source") == (
        f"{MODEL} has no weights (*.safetensors): give a model that has some"
    )


def test_a_hub_without_a_file(hub: Hub, refused: Refused, models: Make, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(models("blocks"), tmp_path / "copy"))
    (hub.folder / shard(3)).unlink()
    assert refused(MODEL, "--drop-source") == (
        f"{MODEL} lacks {shard(3)}, which its index names: give a sound model"
    )


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


def test_what_is_no_hub_id(refused: Refused, models: Make, tmp_path: Path) -> None:
    folder = models("blocks")
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
