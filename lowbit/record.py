"""What is kept of a run beside the weights: `lowbit_report.json`.

`lowbit quantize` writes it, `lowbit eval` adds what it measured, and the page (`report.py`) and the
model card (`card.py`) are drawn from it alone, so they can be drawn again. Plain data:

    {"lowbit_report": 1, "name": ..., "base_model": hub id or null, "quantized_by": ... or null,
     "commit": the one that was read, where the model came from the hub, else null,
     "quantization": the fields of `Report` that describe the checkpoint, "run": of this run,
     "parts": what the files hold, by kind of module,
     "evaluations": [{"dataset", "seq_len", "reference", "result", "divergence", "run"}, ...],
     "tasks": [{"task", "metric", ..., "original", "limit", "fewshot", "run"}, ...]}

where a row of "tasks" has the fields of `lowbit.tasks.TaskResult`, and the key is missing where no task was
measured. Records of older versions lack "commit".

All of it may be published with the checkpoint, so local paths are cut to their last name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.hardware import peak_memory
from lowbit.places import split_revision
from lowbit.results import Report

NAME = "lowbit_report.json"
PACKAGES = ("lowbit", "torch", "transformers", "compressed-tensors", "triton", "lm_eval")
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+?)/snapshots/")
SNAPSHOT = re.compile(r"models--[\w.-]+/snapshots/([0-9a-f]{40})$")


def of_report(report: Report, model: str, parts: Sequence[Any], quantized_by: str | None) -> dict[str, Any]:
    """The record of a checkpoint that was just quantized.

    Args:
        report: What `quantize` did.
        model: What it was given: a hub id, a folder, a file.
        parts: What the written files hold (`lowbit.inspection.Part`).
        quantized_by: Who publishes it.
    """
    facts = dataclasses.asdict(report)
    facts["output"] = report.output.name
    spec, _, size = report.calibration.rpartition(": ")
    facts["calibration"] = f"{public(spec)}: {size}" if report.calibration_used else report.calibration
    facts["calibration_used"] = report.calibration_used
    return {
        "lowbit_report": 1,
        "name": report.output.name,
        "model": public(model),
        "base_model": hub_id(model),
        "quantized_by": quantized_by,
        "quantization": facts,
        "run": this_run(),
        "parts": [dataclasses.asdict(part) for part in parts],
        "evaluations": [],
    }


def of_folder(folder: Path, parts: Sequence[Any]) -> dict[str, Any]:
    """The record of a checkpoint that something else wrote."""
    empty = {"name": folder.name, "model": folder.name, "base_model": None, "quantized_by": None}
    parts = [dataclasses.asdict(part) for part in parts]
    return {"lowbit_report": 1, **empty, "quantization": None, "run": None, "parts": parts, "evaluations": []}


def add_evaluation(record: dict[str, Any], evaluation: Mapping[str, Any]) -> None:
    """Add what was measured; an earlier measurement on the same windows of the same text is replaced."""

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["dataset"], entry["seq_len"], entry["result"]["windows"], bool(entry["reference"])

    kept = [entry for entry in record["evaluations"] if key(entry) != key(evaluation)]
    record["evaluations"] = [*kept, dict(evaluation)]


def add_tasks(record: dict[str, Any], evaluation: Mapping[str, Any]) -> None:
    """Add the tasks that were measured; an earlier measurement of the same documents is replaced."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["metric"], row["limit"], row["fewshot"]

    about = {"original": evaluation["reference"], **{n: evaluation[n] for n in ("limit", "fewshot", "run")}}
    new = [{**row, **about} for row in evaluation["tasks"]]
    replaced = {key(row) for row in new}
    record["tasks"] = [row for row in record.get("tasks", []) if key(row) not in replaced] + new


def provenance(inputs: Mapping[str, Any], tokens: str) -> dict[str, Any]:
    """What `config.json` says of how a checkpoint was made: versions, options, digests; no local path."""
    told = {name: public(value) if isinstance(value, str) else value for name, value in inputs.items()}
    given = {name: value for name, value in told.items() if value not in (None, [], {}, "", "None")}
    return {**given, **({"tokens": tokens} if tokens else {})}


def load(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None where there is none.

    Raises:
        LowbitError: it is not one of ours.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["lowbit_report"] != 1:
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise LowbitError(f"{path} can't be read: remove it, a new one will be written") from None
    return record


def save(record: Mapping[str, Any], folder: Path) -> None:
    """Write the record into a folder."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def this_run() -> dict[str, Any]:
    """Command, versions, machine, date and peak memory of this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": command(),
        "versions": versions,
        "machine": f"{processor()}, {_cpus()} CPUs",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "peak_memory": peak_memory(),
    }


def command() -> str | None:
    """The command line of this process, if it is lowbit's."""
    program, *arguments = sys.argv or [""]
    if Path(program).name not in ("lowbit", "lowbit.exe", "__main__.py"):
        return None
    return shlex.join(["lowbit", *map(public, arguments)])


def public(text: str) -> str:
    """The text without what only this machine knows: a path becomes its last name.

    >>> public("/home/me/models/qwen"), public("Qwen/Qwen3-8B"), public("--output=/data/out")
    ('qwen', 'Qwen/Qwen3-8B', '--output=out')
    """
    if text.startswith("--") and "=" in text:
        option, _, value = text.partition("=")
        return f"{option}={public(value)}"
    cached = _cached(text)
    if cached:
        return cached
    path, _, rest = text.partition(":")
    if path.startswith(("/", "./", "../", "~")) or ("/" in path and Path(path).exists()):
        return Path(path).name + (f":{rest}" if rest else "")
    return text


def hub_id(model: str) -> str | None:
    """`org/name` of what comes from the hub (or from its cache), at any revision; None for what is local.

    >>> hub_id("Qwen/Qwen3-8B"), hub_id("Qwen/Qwen3-8B@main"), hub_id("./Qwen3-8B")
    ('Qwen/Qwen3-8B', 'Qwen/Qwen3-8B', None)
    """
    cached = _cached(model)
    if cached:
        return cached
    name, _ = split_revision(model)
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return name if named and not Path(name).exists() and not name.endswith(".gguf") else None


def _cached(path: str) -> str | None:
    """`org/name` of a path into the hub's cache."""
    found = HUB_CACHE.search(path)
    return f"{found[1]}/{found[2]}" if found else None


def commit_of(folder: Path) -> str | None:
    """The commit whose files a folder of the hub's cache holds; None for any other folder."""
    found = SNAPSHOT.search(folder.as_posix())
    return found[1] if found else None


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """The CPU by its maker's name, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()
