"""Runs that were stopped: what is kept, that the same command goes on, and that the bytes are the same.

The oracle is a run in one piece. Interruptions are exceptions here; `scripts/soak.py` and its test use
signals that no process survives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import QuantScheme, Target, checkpoint, identity, road, training, work
from lowbit.algorithms import columns
from lowbit.errors import LowbitError, VerificationError
from lowbit.results import Report
from tests.tiny import TEXT

Folders = Callable[..., Path]
TELL_OF_THE_RUN = {"README.md", "report.html", "lowbit_report.json", "SHA256SUMS"}


class Killed(KeyboardInterrupt):
    """What stops the runs of these tests."""


@pytest.fixture
def run(quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path) -> Callable[..., Path]:
    """A calibrated run in small shards, into a folder below `tmp_path`."""

    def go(output: str = "out", family: str = "llama", **options: Any) -> Path:
        usual = {"method": "gptq", "max_shard_size": "60KB", "samples": 16}
        model = options.pop("model", None) or tiny_model(family)
        return quantize(model, output=tmp_path / output, **(usual | options)).output

    return go


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in TELL_OF_THE_RUN}


def record_of(folder: Path) -> dict[str, Any]:
    """The record without times, memory and the name of the output."""
    record = json.loads((folder / "lowbit_report.json").read_text())
    for name in ("seconds", "cpu_seconds", "memory", "output"):
        del record["quantization"][name]
    return {name: record[name] for name in record if name not in ("run", "name", "card")}


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`stop_after(n)`: the n-th commit from now on is the last thing that its run does."""
    commit = work.Work.commit

    def arm(count: int | None) -> None:
        left = [count]

        def counted(self: work.Work, *args: Any, **kwargs: Any) -> None:
            commit(self, *args, **kwargs)
            if left[0] is not None:
                left[0] -= 1
                if not left[0]:
                    raise Killed

        monkeypatch.setattr(work.Work, "commit", counted)

    return arm


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"effort": "high", "method": None}),
        ("llama", {"method": "qat", "effort": "fast", "epochs": 4, "scheme": QuantScheme(2, 32)}),
        ("mixtral", {"head_bits": 8}),
        ("gemma3", {"method": "awq"}),
        ("gpt2", {"method": "rtn", "format": "gptq", "max_shard_size": "5GB"}),
        ("llama", {"scheme": QuantScheme(8, -1, activation_bits=8)}),
        ("llama", {"scheme": None, "within": Target(4.5), "skip": ["layers.1.*.k_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stopped_after_every_commit(
    run: Callable[..., Path],
    stop_after: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(training, "KEEP_SECONDS", 0.0)
    whole = run("whole", family, **options)
    stops, folder = 0, whole.with_name("out.lowbit-work")
    stop_after(2)  # before the second one nothing is worth keeping
    finished = False
    while not finished:
        with pytest.raises(Killed) as stop:
            run("out", family, **options)
        assert stop.value.kept == folder  # type: ignore[attr-defined]
        stops += 1
        facts = json.loads((folder / "state.json").read_text())["facts"]
        finished = "all" in facts["report"]["seconds"]  # only the renaming was left
        stop_after(1)
    stop_after(None)
    run("out", family, **options)
    blocks = 4 if family == "gemma3" else 3
    assert stops >= blocks + 3  # and the finished files, the verification, the description
    assert bytes_of(whole.with_name("out")) == bytes_of(whole)
    assert record_of(whole.with_name("out")) == record_of(whole)
    assert sorted(path.name for path in whole.parent.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_stopped_between_commits(run: Callable[..., Path], tmp_path: Path, method: str) -> None:
    """Whatever a block had written since the last commit is cut off."""
    whole = run("whole", method=method)
    for stop in (3, 11, 17, 23, 29):
        seen = 0

        def count(stage: str, *_: object, stop: int = stop) -> None:
            nonlocal seen
            seen += stage == "quantize"
            if seen == stop:
                raise Killed

        with pytest.raises(Killed):
            run(method=method, progress=count)
    assert bytes_of(run(method=method)) == bytes_of(whole)


def stopped(run: Callable[..., Path], stop_after: Callable[[int | None], None], **options: Any) -> None:
    stop_after(3)
    with pytest.raises(Killed):
        run(**options)
    stop_after(None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples": 8, "seed": 7}, "samples 16 -> 8, seed 0 -> 7"),
        ({"scheme": QuantScheme(3, 32)}, "scheme w4g32 -> w3g32"),
        ({"method": "rtn"}, "method gptq -> rtn, columns {columns} -> None"),
        ({"skip": ["down_proj"]}, "skip [] -> ['down_proj']"),
    ],
)
def test_changed_options_are_named(
    run: Folders, stop_after: Callable[[int | None], None], tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    stopped(run, stop_after)
    with pytest.raises(LowbitError, match="add --restart to start over") as refusal:
        run(**options)
    told = told.format(columns=columns.name(torch.device("cpu")))
    assert f"holds a run with {told}: give what it was started with" in str(refusal.value)
    assert not hasattr(refusal.value, "kept")
    assert (tmp_path / "out.lowbit-work" / "state.json").is_file()
    run(**options, restart=True)
    assert not (tmp_path / "out.lowbit-work").exists()


def test_another_model_text_or_version_is_noticed(
    run: Callable[..., Path],
    stop_after: Callable[[int | None], None],
    tiny_model: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "mine.txt").write_text(TEXT * 4)
    options = {"model": model, "dataset": str(tmp_path / "mine.txt")}
    stopped(run, stop_after, **options)

    (tmp_path / "mine.txt").write_text(TEXT * 4 + "more")
    with pytest.raises(LowbitError, match=r"text \w+ -> \w+: give"):
        run(**options)
    (tmp_path / "mine.txt").write_text(TEXT * 4)

    before = (model / "model.safetensors").read_bytes()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match=r"model \w+ -> \w+: give"):
        run(**options)
    (model / "model.safetensors").write_bytes(before)

    versions = identity.versions()
    changed = rf"torch {versions['torch']} -> 1.0: give".replace("+", r"\+")
    with monkeypatch.context() as patch:
        patch.setattr(identity, "versions", lambda *_: versions | {"torch": "1.0"})
        with pytest.raises(LowbitError, match=changed):
            run(**options)
    run(**{**options, "model": shutil.copytree(model, tmp_path / "moved")})


def test_one_process_at_a_time(run: Callable[..., Path], tmp_path: Path) -> None:
    def second(stage: str, *_: object) -> None:
        if stage == "quantize":
            with pytest.raises(LowbitError, match=r"another process is writing .*out: wait for it"):
                run(progress=None)

    run(progress=second)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of the activations": lambda folder: flip(next(folder.glob("carried-*"))),
    "a byte of a shard": lambda folder: flip(next(folder.glob("checkpoint/part-*.safetensors"))),
    "a shard in the making": lambda folder: next(folder.glob("checkpoint/*.data")).write_bytes(b"short"),
    "no activations": lambda folder: next(folder.glob("carried-*")).unlink(),
    "no state": lambda folder: (folder / "state.json").write_text('{"lowbit_state": 1'),
    "another state": lambda folder: (folder / "state.json").write_text('{"lowbit_state": 0}'),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed(
    run: Callable[..., Path], stop_after: Callable[[int | None], None], tmp_path: Path, what: str
) -> None:
    stopped(run, stop_after)
    DAMAGE[what](tmp_path / "out.lowbit-work")
    with pytest.raises(LowbitError, match=r"damaged.*: add --restart to start over"):
        run()
    run(restart=True)


def test_a_folder_of_someone_else_is_left_alone(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out.lowbit-work").mkdir()
    (tmp_path / "out.lowbit-work" / "novel.txt").write_text("It was a dark and stormy night")
    for restart in (False, True):
        with pytest.raises(LowbitError, match="is none of lowbit's work folders"):
            run(restart=restart)
    assert [path.name for path in (tmp_path / "out.lowbit-work").iterdir()] == ["novel.txt"]


def test_a_full_disk(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    whole = run("whole")
    for place in ("lowbit.checkpoint.write_json", "lowbit.durable.write_tensors", "lowbit.beside.write_sums"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="No space left") as failure:
                run()
        assert hasattr(failure.value, "kept")
    assert bytes_of(run()) == bytes_of(whole)


@pytest.mark.parametrize("after", ["the first rename", "both"])
def test_stopped_while_the_old_one_is_exchanged(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """As `kill -9` leaves it: no handler runs, and the lock is gone."""
    whole = run("whole")
    old = bytes_of(run(scheme=QuantScheme(8, 32)))
    snapshot = tmp_path / "snapshot"
    exchange = checkpoint.put_in_place

    def die(finished: Path, output: Path) -> None:
        output.rename(finished.with_name("replaced"))
        if after == "both":
            finished.rename(output)
        shutil.copytree(finished.parent, snapshot)
        if after == "both":
            output.rename(finished)
        finished.with_name("replaced").rename(output)
        raise Killed

    monkeypatch.setattr(checkpoint, "put_in_place", die)
    with pytest.raises(Killed):
        run(overwrite=True)
    monkeypatch.setattr(checkpoint, "put_in_place", exchange)
    assert bytes_of(tmp_path / "out") == old
    shutil.rmtree(tmp_path / "out")
    if after == "both":
        (tmp_path / "out.lowbit-work" / "checkpoint").rename(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.lowbit-work")
    snapshot.rename(tmp_path / "out.lowbit-work")
    with pytest.raises(LowbitError, match="holds a run with scheme"):
        run(overwrite=True, scheme=QuantScheme(8, 32))
    report = run(overwrite=True)
    assert bytes_of(report) == bytes_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_proved_wrong_is_not_kept(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise VerificationError("not what was computed")

    monkeypatch.setattr("lowbit.road.verify", wrong)
    with pytest.raises(VerificationError):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_report_survives_json() -> None:
    from lowbit.results import Layer, Verification

    report = Report(Path("/x/y"), "w4g32", "gptq", "awq", "self: 3 x 4 tokens, seed 0")
    report.layers.append(Layer("a.b", (3, 5), "w4g32", 0.1 + 0.2, "odd"))
    report.verification = Verification("stock transformers", 3, 1e-9)
    assert Report.of_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_a_limit_is_kept_by_the_steps_it_began_with(
    run: Callable[..., Path],
    stop_after: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    method: str,
) -> None:
    """A later process has more in memory than the first one had, and would choose smaller steps."""
    used, chosen = [0], []
    init = road.Road.__init__

    def told(self: road.Road, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        chosen.append(self.budget)

    monkeypatch.setattr(road.Road, "__init__", told)
    monkeypatch.setattr("lowbit.budget.used_memory", lambda: used[0])
    limited = {"method": method, "max_memory": "0.7GB"}
    whole = bytes_of(run("whole", **limited))
    stop_after(2)
    with pytest.raises(Killed):
        run(**limited)
    assert (tmp_path / "out.lowbit-work").exists()
    stop_after(None)
    used[0] = 547_500_000
    assert bytes_of(run(**limited)) == whole
    other = bytes_of(run("other", **limited))
    first, stopped, resumed, fresh = chosen
    assert first == stopped == resumed
    assert fresh.tokens < first.tokens
    assert other.keys() == whole.keys()
