"""Options, outputs and interruptions: one line that names the fix, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowbit
from lowbit import cli, interruption, planning
from lowbit.errors import LowbitError
from lowbit.shard import Shard
from tests.refused import Refused
from tests.tiny import TEXT

Folders = Callable[..., Path]
ROOT = Path(__file__).parents[1]


# --- the options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--group-size", 48], "--group-size 48 does not divide all of in_features=[64, 128]: "
         "use one of [64, 32, 16, -1] or auto"),
        (["--group-size", 128], "use one of [64, 32, 16, -1] or auto"),
        (["--group-size", 5], "group_size=5 is not supported: use 32, 64, 128, or -1 for the whole row"),
        (["--group-size", 0], "group_size=0 is not supported"),
        (["--group-size", "many"], "--group-size 'many' is not a number: use 128, 64, 32, -1 or auto"),
        (["--bits", 5], "bits=5 is not supported: use one of (2, 3, 4, 8)"),
        (["--bits", "four"], "Invalid value for '--bits'"),
        (["--head-bits", 7], "bits=7 is not supported: use one of (2, 3, 4, 8)"),
        (["--device", "gpu"], "--device gpu can't be used here"),
        (["--device", "meta"], "--device meta can't be used here"),
        (["--device", "cuda:99"], "--device cuda:99 can't be used here"),
        (["--dtype", "int8"], "--dtype int8 is not supported: use auto, bfloat16"),
        (["--dtype", "fast"], "--dtype fast is not supported: use auto, bfloat16"),
        (["--max-shard-size", "big"], "'big' is not a size: write it like 5GB or 300MB"),
        (["--max-shard-size", "0"], "'0' is not a size"),
        (["--max-shard-size", "9" * 400], "9999...' is more than any disk holds: write it like 5GB or 300MB"),
        (["--seed", 99999999999999999999], "9223372036854775807"),
        (["--seed", -1], "Invalid value for '--seed'"),
        (["--skip", "no_such_proj"], "--skip 'no_such_proj' matches no linear layer: names look like"),
        (["--skip", "*"], "no linear layer left to quantize: see --skip"),
        (["--format", "awq"], "awq holds no symmetric scheme, got w4g64: use --asymmetric"),
        (["--format", "zip"], "Invalid value for '--format'"),
        (["--samples", 0], "Invalid value for '--samples'"),
        (["--no-such-option"], "No such option"),
    ],
)  # fmt: skip
def test_options(refused: Refused, tiny_model: Folders, options: list[object], expected: str) -> None:
    assert expected in refused(tiny_model("llama"), *options)


def test_a_format_that_does_not_hold_the_model(refused: Refused, tiny_model: Folders) -> None:
    line = refused(tiny_model("gpt2"), "--group-size", 64)
    assert line == "transformer.h.0.attn.c_attn: compressed-tensors knows no Conv1D layers: use --format gptq"


# --- the output


def test_an_output_that_is_taken(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    refused.output.mkdir(parents=True)
    (refused.output / "config.json").write_text("{}")
    line = refused(tiny_model("llama"))
    assert line == f"{refused.output} exists and is not empty: choose another or add --overwrite"


def test_an_output_that_is_no_checkpoint(refused: Refused, tiny_model: Folders) -> None:
    refused.output.mkdir(parents=True)
    (refused.output / "thesis.tex").write_text("ten years")
    line = refused(tiny_model("llama"), "--overwrite")
    assert line == f"{refused.output} holds something else than a model: choose another folder"


def test_an_output_that_is_a_file(refused: Refused, tiny_model: Folders) -> None:
    refused.output.parent.mkdir()
    refused.output.write_text("")
    assert refused(tiny_model("llama"), "--overwrite") == f"{refused.output} is a file: choose a folder"


def test_an_output_that_is_the_model(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    refused.output = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    line = refused(refused.output, "--overwrite")
    assert line == f"{refused.output} is the model itself: choose another folder"


def test_an_output_that_holds_the_model(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("llama"), tmp_path / "all" / "model")
    (tmp_path / "all" / "config.json").write_text("{}")
    refused.output = tmp_path / "all"
    assert "the model itself: choose another folder" in refused(model, "--overwrite")


def test_an_output_that_cannot_be_written(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused.output = tmp_path / "file" / "out"
    line = refused(tiny_model("llama"))
    assert line.startswith(f"{refused.output} can't be written (")
    assert line.endswith("choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_folder_of_others(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    refused.output = tmp_path / "theirs" / "out"
    assert "can't be written (Permission denied)" in refused(tiny_model("llama"))


def test_a_disk_without_room(refused: Refused, tiny_model: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    line = refused(tiny_model("llama"))
    assert "0.00 GB free and 0.05 GB are needed: free some space or choose another place" in line


def test_a_disk_that_fills_up(refused: Refused, tiny_model: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a block is done; later there is something to keep, see test_resume.py."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbit.shard.Shard.add", full)
    assert "No space left on device" in refused(tiny_model("llama"))


# --- interruptions, in processes of their own


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lowbit", *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_in_the_middle(
    tiny_model: Folders, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Sent while blocks are being quantized: the scratch folder is there, and then it is not."""
    (tmp_path / "text.txt").write_text(TEXT * 200)
    process = start("quantize", tiny_model("llama"), "-o", tmp_path / "deep" / "out", "--dataset",
                    tmp_path / "text.txt", "--samples", 800, "--seq-len", 256)  # fmt: skip
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    while process.poll() is None and not list(tmp_path.glob("deep/out.lowbit-work/checkpoint")):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, err = process.communicate()
    watchdog.cancel()
    assert process.returncode == code, err
    assert err == ("lowbit: interrupted: nothing was left behind\n" if code == 130 else "")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_beside_a_thread_that_never_ends(number: signal.Signals, code: int) -> None:
    """A pool that is interrupted while it starts a thread forgets it, and Python waits for it for ever."""
    program = f"""
import signal, threading
from lowbit import cli
threading.Thread(target=threading.Event().wait).start()
cli.app = lambda **_: signal.raise_signal({number:d})
cli.main()
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == code
    assert ended.stderr == ("lowbit: interrupted: nothing was left behind\n" if code == 130 else "")


def test_an_interruption_inside_a_destructor_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", interruption._deliver_again)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        Interrupted()
        time.sleep(10)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("error", [ValueError("not a tensor"), LowbitError("get a sound copy"), None])
def test_an_interruption_that_a_library_swallows(
    tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: Exception | None, number: signal.Signals, code: int,
) -> None:  # fmt: skip
    """Compiled code drops the exception, and goes on (None) or reports an error of its own."""
    add = Shard.add

    def swallow(*arguments: Any, **named: Any) -> Any:
        with suppress(KeyboardInterrupt, SystemExit):
            signal.raise_signal(number)
        if error is not None:
            raise error
        return add(*arguments, **named)

    monkeypatch.setattr(Shard, "add", swallow)
    monkeypatch.setattr(interruption, "_received", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    output = tmp_path / "out"
    command = ["lowbit", "quantize", str(tiny_model("llama")), "-o", str(output), "--method", "rtn"]
    monkeypatch.setattr(sys, "argv", command)
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended.value.code == code
    assert not output.exists()


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    process = start("quantize", tmp_path / "model", "-o", tmp_path / "out")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert (
        err == f"lowbit: {tmp_path / 'model'} has no config.json: give the folder of a Hugging Face model\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the other commands


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["eval", "/no/such/folder"],
            "/no/such/folder does not exist: give a folder or a hub id (org/name)",
        ),
        (["eval", "{model}", "--dataset", "missing.txt"], "missing.txt: no such file"),
        (["plan", "{model}", "--target-bpw", "4.4", "--seed", 2**63], "Invalid value for '--seed'"),
        (["eval", "{model}", "--dtype", "fast"], "--dtype fast is not supported"),
        (["eval", "{model}", "--device", "gpu"], "--device gpu can't be used here"),
        (["eval", "{model}", "--dataset", "{text}", "--seq-len", 2048], "2048"),
        (["eval", "{model}", "--reference", "/no/such"], "/no/such does not exist"),
        (["inspect", "/no/such/folder"], "/no/such/folder is not a folder: give the folder of a checkpoint"),
    ],
)
def test_other_commands(
    tiny_model: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[object],
    expected: str,
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    filled = [str(a).format(model=tiny_model("llama"), text=tmp_path / "text.txt") for a in arguments]
    monkeypatch.setattr(sys, "argv", ["lowbit", *filled])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    signal.signal(signal.SIGTERM, handler)
    out, err = capfd.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("seed", [-1, 2**63, 10**20])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_seed_that_no_generator_takes(tiny_model: Folders, tmp_path: Path, seed: int, method: str) -> None:
    line = f"--seed {seed} can't be used: give one from 0 to 9223372036854775807"
    with pytest.raises(LowbitError, match=line):
        lowbit.quantize(tiny_model("llama"), output=tmp_path / "out", method=method, seed=seed)
    with pytest.raises(LowbitError, match=line):
        planning.preview(tiny_model("llama"), lowbit.Target(4.4), method=method, seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_python_callers_catch_a_value_error(tiny_model: Folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown"):
        lowbit.quantize(tiny_model("llama"), output=tmp_path / "out", method="magic")
    assert list(tmp_path.iterdir()) == []
