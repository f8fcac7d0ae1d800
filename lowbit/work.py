"""The work folder of a run: what a later one needs to go on where it stopped.

It lies beside the output, so that the result is renamed and never copied:

    OUTPUT.lowbit-work/
        lock            held by the process that works here; the system takes it back when that ends
        state.json      the last commit
        NAME-N.safetensors   tensors of that commit: token ids, carried activations, an optimizer's state
        checkpoint/     the result in the making
        source/         the model, where it had to be converted, or its files that come and go with
                        --drop-source; made again by every run

A commit is a new `state.json`: everything that it rests on is on the disk before, is named in it with size
and SHA-256, and is removed only after the next one. So whatever ends a run, and whenever, there is one
whole state to go on from, and what was written since is cut off.

A run that is refused leaves nothing, and so does one that was stopped before anything was worth keeping.
Once something is, the folder stays. `inputs` are what the result depends on; a run with others is refused
with the difference, for it would make one half of each.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from lowbit import durable, ranks
from lowbit.errors import LowbitError, VerificationError

SUFFIX = ".lowbit-work"
VERSION = 1
REPLACED = "replaced"
_SHOWN = 24  # characters of a value in a refusal


class Work:
    """An open work folder.

    Attributes:
        folder: Where it is.
        facts: What the last commit says; empty where there is none.
        inputs: What the result depends on, by name; see `check`.
        worth: Would something be lost with the folder?
        checked: Was the run found to be the one that the folder holds?
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: dict[str, Any] = {}
        self._state = _read_state(folder / "state.json")
        self.facts: dict[str, Any] = self._state.get("facts", {})
        self.worth = bool(self._state.get("worth"))
        self.checked = False
        self._opened = time.monotonic(), time.process_time()

    @property
    def checkpoint(self) -> Path:
        """Folder of the result in the making."""
        return self.folder / str(self.facts.get("result", "checkpoint"))

    def is_placed(self, output: Path) -> bool:
        """Did the run end between the exchange of the finished folder and the removal of this one?"""
        return "result" in self.facts and not self.checkpoint.exists() and output.exists()

    def check_files(self) -> None:
        """Compare the files of the last commit with what was written; raises `LowbitError` if they differ."""
        for entry in self._state.get("tensors", {}).values():
            durable.check(self.folder / entry["file"], entry["size"], entry["sha256"])

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Go on only with what the run was started with.

        Args:
            inputs: Options, versions and digests that the result depends on: plain JSON values.

        Raises:
            LowbitError: some differ from those of the last commit.
        """
        self.inputs = json.loads(json.dumps(inputs))
        if self.facts:
            before = self._state["inputs"]
            names = [name for name in {**before, **self.inputs} if before.get(name) != self.inputs.get(name)]
            changes = [f"{name} {_shown(before, name)} -> {_shown(self.inputs, name)}" for name in names]
            if changes:
                raise LowbitError(
                    f"{self.folder} holds a run with {', '.join(changes)}: give what it was started with, "
                    "or add --restart to start over"
                )
        self.checked = True

    def commit(
        self, facts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], worth: bool = True
    ) -> None:
        """Make this the state to go on from.

        Args:
            facts: Added to those of the last commit, or in place of theirs: plain JSON values.
            tensors: Groups of tensors, each in place of the last one of its name; an empty one is removed.
            worth: False while a new run would be as far in no time.
        """
        number = self._state.get("commit", 0) + 1
        kept = dict(self._state.get("tensors", {}))
        for group, members in tensors.items():
            kept.pop(group, None)
            if members:
                file = f"{group}-{number}.safetensors"
                kept[group] = {"file": file, **durable.write_tensors(self.folder / file, members)}
        self.facts = {**self.facts, **facts}
        self.worth = worth or self.worth
        self._state = {
            "lowbit_state": VERSION, "commit": number, "worth": self.worth, "inputs": self.inputs,
            "seconds": self.seconds(), "cpu_seconds": self.cpu_seconds(), "facts": self.facts,
            "tensors": kept,
        }  # fmt: skip
        self._opened = time.monotonic(), time.process_time()
        durable.write_json(self.folder / "state.json", self._state)
        self.tidy()

    def each(self, group: str) -> Iterator[Tensor]:
        """The tensors of a group, one at a time in memory."""
        entry = self._state.get("tensors", {}).get(group)
        if entry:
            yield from (tensor for _, tensor in durable.each_tensor(self.folder / entry["file"]))

    def load(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group; none where it was not committed."""
        entry = self._state.get("tensors", {}).get(group)
        return durable.read_tensors(self.folder / entry["file"]) if entry else {}

    def tidy(self) -> None:
        """Remove what the last commit does not rest on."""
        named = {entry["file"] for entry in self._state.get("tensors", {}).values()}
        for path in self.folder.iterdir():
            if path.suffix == ".safetensors" and path.name not in named:
                path.unlink()

    def seconds(self) -> float:
        """Wall seconds of the run, the parts before an interruption included."""
        return float(self._state.get("seconds", 0)) + time.monotonic() - self._opened[0]

    def cpu_seconds(self) -> float:
        """The same of the processes' CPU time."""
        return float(self._state.get("cpu_seconds", 0)) + time.process_time() - self._opened[1]


@contextmanager
def open_work(output: Path, restart: bool = False) -> Iterator[Work]:
    """The work folder of `output`, locked; removed at the end, or kept where one can go on from it.

    An exception that leaves the folder behind has it as its attribute `kept`. Ranks other than the first
    only look at what is there.

    Raises:
        LowbitError: it can't be made, another process works in it, or it is damaged or not ours.
    """
    folder = output.with_name(output.name + SUFFIX)
    if not ranks.is_first():
        ranks.told(None)
        work = Work(folder)
        ranks.gathered(None)
        yield work
        return
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        with _locked(folder, output):
            work = _begin(folder, output, restart)
            ranks.told(None)  # the others look at it now
            ranks.gathered(None)
            resumed = bool(work.facts)
            try:
                yield work
            except BaseException as error:
                if not _stays(work, error, resumed):
                    shutil.rmtree(folder, ignore_errors=True)
                elif work.checked:
                    error.kept = folder  # type: ignore[attr-defined]
                raise
            _remove(folder)
    except BaseException:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "lock").is_file():
            raise LowbitError(f"{folder} is none of lowbit's work folders: move it or choose another output")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise LowbitError(f"another process is writing {output}: wait for it or choose another") from None
    except OSError as error:
        raise LowbitError(f"{output} can't be written ({error.strerror}): choose another folder") from None
    try:
        if not (folder / "lock").is_file():  # its last owner has just removed it
            raise LowbitError(f"another process has just written {output}: look at it, or choose another")
        yield
    finally:
        lock.release()


def _begin(folder: Path, output: Path, restart: bool) -> Work:
    """What is there to go on from, with everything else removed."""
    aside = folder / REPLACED
    if aside.exists() and output.exists():  # ended between the exchange and its cleaning up
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():  # ended within the exchange
        aside.rename(output)
    work = None if restart else Work(folder)
    if work is None or not work.worth:
        for path in folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Work(folder)
    if not work.is_placed(output):
        work.check_files()
        work.tidy()
    shutil.rmtree(folder / "source", ignore_errors=True)
    return work


def _remove(folder: Path) -> None:
    """Remove the folder of a finished run, what says that it is finished last."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in ("lock", "state.json"):
            path.unlink()
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _stays(work: Work, error: BaseException, resumed: bool) -> bool:
    """Is the folder kept? Not after a refusal, unless there was something in it before."""
    if isinstance(error, VerificationError):
        return False
    return work.worth and (resumed or not isinstance(error, LowbitError))


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["lowbit_state"] != VERSION:
            raise KeyError
        parts = [state[name] for name in ("inputs", "facts", "tensors")]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LowbitError(f"{path} is damaged or of another version: add --restart to start over") from None
    return state


def _shown(values: Mapping[str, Any], name: str) -> str:
    """A value in a refusal, cut where it is long."""
    text = str(values.get(name, "none"))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
