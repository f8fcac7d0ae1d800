"""Ends runs in every way that a run can end, lets the same command go on, and compares the bytes.

    python scripts/soak.py                 # all of it, with 25 kills
    python scripts/soak.py --kills 3       # what the tests run

The model is a small random Llama, so that a run takes seconds. Each run is a child of this process, forked
after the imports. The oracle is a run in one piece; files that tell of the run itself (times, memory,
dates: README.md, report.html, lowbit_report.json, and SHA256SUMS, which vouches for them) are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(TRANSFORMERS_VERBOSITY="error")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "triton_kernels")]

import torch  # noqa: E402

from lowbit import interruption, pipeline, training, work  # noqa: E402
from lowbit.scheme import QuantScheme  # noqa: E402
from tests.tiny import TEXT, make_model  # noqa: E402

TELL_OF_THE_RUN = {"README.md", "report.html", "lowbit_report.json", "SHA256SUMS"}
KILLED = -signal.SIGKILL


class Soak:
    """One model, one command, and a run of it in one piece."""

    def __init__(self, folder: Path, effort: str) -> None:
        self.folder, self.effort = folder, effort
        self.output = folder / "out"
        self.kept = folder / f"out{work.SUFFIX}"
        self.model = make_model("llama", folder / "model")
        (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
        self.failures: list[str] = []
        started = time.monotonic()
        assert self.run(folder / "whole") == 0, "a run in one piece fails"
        self.seconds = time.monotonic() - started
        self.whole = bytes_of(folder / "whole")

    def start(self, output: Path | None = None, **options: Any) -> int:
        """Fork a run; returns its process id. `after_commit` and `progress` are called inside it."""
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            code = 70
            try:
                # Started in the background by a shell, this process would ignore SIGINT.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                interruption.listen()  # as `lowbit` itself does
                after_commit: Callable[[work.Work], None] | None = options.pop("after_commit", None)
                if after_commit:
                    notify(after_commit)
                pipeline.quantize(
                    str(self.model), QuantScheme(4, 32), output=output or self.output, effort=self.effort,
                    dataset=str(self.folder / "text.txt"), samples=40, seq_len=48, max_shard_size="60KB",
                    **options,
                )  # fmt: skip
                code = 0
            except (
                ValueError,
                OSError,
                KeyboardInterrupt,
                SystemExit,
            ) as error:  # LowbitError is a ValueError
                code = self.code_of(interruption.received() or error)
            finally:
                os._exit(code)
        return process

    def code_of(self, error: BaseException) -> int:
        """The exit code of a run that an exception ended; what a refusal says is kept."""
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, SystemExit):
            return int(error.code or 0)
        (self.folder / "error.txt").write_text(f"{error}", encoding="utf-8")
        return 2

    def run(self, output: Path | None = None, **options: Any) -> int:
        """A run to its end; returns its exit code, negative for a signal."""
        return wait(self.start(output, **options))

    def finish(self, what: str, ended: int, expected: int) -> bool:
        """Go on with what was ended, compare, remove; True where all is as it should be."""
        code = self.run()
        good = ended == expected and code == 0 and bytes_of(self.output) == self.whole
        if not good or self.kept.exists():
            said = (self.folder / "error.txt").read_text(encoding="utf-8") if code == 2 else ""
            theirs = bytes_of(self.output)
            other = [name for name in {**self.whole, **theirs} if self.whole.get(name) != theirs.get(name)]
            self.failures.append(f"{what}: ended {ended}, went on {code} {said}, different: {other}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        self.clean()
        return good

    def clean(self) -> None:
        """Nothing of the last run is left."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)


def notify(after_commit: Callable[[work.Work], None]) -> None:
    """In this process, call `after_commit` after each commit."""
    commit = work.Work.commit

    def committed(self: work.Work, *args: Any, **kwargs: Any) -> None:
        commit(self, *args, **kwargs)
        after_commit(self)

    work.Work.commit = committed  # type: ignore[method-assign]


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_if_worth(committed: work.Work) -> None:
    """Die, unless the next run would start over anyway and die here again."""
    if committed.worth:
        die()


def bytes_of(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in TELL_OF_THE_RUN}


def when_quantizing(do: Callable[[], None], step: int) -> Callable[..., None]:
    """A `progress` that calls `do` at the n-th step of the quantization."""
    seen = 0

    def progress(stage: str, *_: object) -> None:
        nonlocal seen
        seen += stage == "quantize"
        if seen == step:
            do()

    return progress


def random_kills(soak: Soak, count: int, seed: int) -> str:
    """`kill -9` at random moments between the first and the last second of a run."""
    moments, done, identical, resumed = random.Random(seed), 0, 0, 0
    while done < count:
        process = soak.start()
        time.sleep(moments.uniform(0, soak.seconds))
        os.kill(process, signal.SIGKILL)
        if (ended := wait(process)) == 0:  # it was faster: another try
            soak.clean()
            continue
        done += 1
        resumed += (soak.kept / "state.json").is_file()
        identical += soak.finish(f"kill {done}", ended, KILLED)
    return f"{done} kills, {identical} byte-identical; {resumed} found a commit to go on from"


def kill_at_every_commit(soak: Soak) -> str:
    """One run, killed right after each of its commits."""
    stops = 0
    ended = KILLED
    while ended == KILLED:
        ended = soak.run(after_commit=die_if_worth)
        stops += 1
        state = json.loads((soak.kept / "state.json").read_text(encoding="utf-8"))
        if "all" in state["facts"]["report"]["seconds"]:  # only the renaming was left
            break
    identical = soak.finish("every commit", ended, KILLED)
    return f"{stops} commits, each followed by a kill: {'byte-identical' if identical else 'DIFFERENT'}"


def signals(soak: Soak) -> str:
    """SIGINT and SIGTERM in the third block: the exit code, and the way on."""
    identical = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = soak.run(progress=when_quantizing(lambda n=number: os.kill(os.getpid(), n), 40))
        identical += soak.finish(number.name, process, code)
    return f"SIGINT, SIGTERM: exit codes 130, 143; {identical} of 2 byte-identical"


def full_disk(soak: Soak) -> str:
    """A small tmpfs that something else fills while blocks are written, and that is then emptied."""
    place = soak.folder / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        return "full disk: skipped, mounting a tmpfs needs root (and CAP_SYS_ADMIN in a container)"
    outside, soak.output, soak.kept = soak.output, place / "out", place / f"out{work.SUFFIX}"
    ballast = place / "ballast"

    def fill() -> None:
        with ballast.open("wb") as file:
            while True:
                try:
                    file.write(bytes(4096))
                    file.flush()
                except OSError:
                    return

    try:
        ended = soak.run(progress=when_quantizing(fill, 40))
        said = (soak.folder / "error.txt").read_text(encoding="utf-8")
        ballast.unlink()
        identical = soak.finish("full disk", ended, 2)
    finally:
        soak.output, soak.kept = outside, soak.folder / f"out{work.SUFFIX}"
        subprocess.run(["umount", str(place)], check=True)
    return f"full disk: {said!r}, then {'byte-identical' if identical else 'DIFFERENT'}"


def damage(soak: Soak) -> str:
    """Sources and kept files, cut short or with a byte changed: refused, nothing lost, then the way on."""
    refused = tried = 0

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)

    soak.run(progress=when_quantizing(die, 40))
    kept = [path for path in sorted(soak.kept.rglob("*")) if path.is_file() and path.name != "lock"]
    weights = soak.model / "model.safetensors"
    for path, harm in [(weights, cut), *((path, harm) for path in kept for harm in (cut, flip))]:
        before = path.read_bytes()
        harm(path)
        tried += 1
        refused += soak.run() == 2 and path.stat().st_size > 0
        path.write_bytes(before)
    identical = soak.finish("damage", KILLED, KILLED)
    if refused != tried:
        soak.failures.append(f"damage: {tried - refused} of {tried} went unnoticed")
    return (
        f"{tried} damaged files, {refused} refused; mended, {'byte-identical' if identical else 'DIFFERENT'}"
    )


@contextmanager
def small_model(effort: str) -> Iterator[Soak]:
    with tempfile.TemporaryDirectory(prefix="lowbit-soak-") as folder:
        (Path(folder) / "model").mkdir()
        yield Soak(Path(folder), effort)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--effort", default="high", help="of the runs; high trains scales, too")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    training.KEEP_SECONDS = 0.0  # keep the state of every step
    with small_model(given.effort) as soak:
        print(f"a run in one piece: {soak.seconds:.1f} s, {len(soak.whole)} files")
        for row in (
            lambda: random_kills(soak, given.kills, given.seed),
            lambda: kill_at_every_commit(soak),
            lambda: signals(soak),
            lambda: full_disk(soak),
            lambda: damage(soak),
        ):
            print(row(), flush=True)
    print("all as in one piece" if not soak.failures else f"{len(soak.failures)} failed")
    return bool(soak.failures)


if __name__ == "__main__":
    sys.exit(main())
