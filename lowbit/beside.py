"""What a run leaves beside the weights: the record, the page and the model card.

The record (`lowbit_report.json`) is the truth; page and card are drawn from it. Loaders pass over all
three. Only folders that hold a quantized checkpoint are written to: measuring an original model
leaves its folder as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit import card, durable, record, report, untrusted
from lowbit.errors import LowbitError
from lowbit.inspection import inspect
from lowbit.results import Report

DESCRIBING = (card.NAME, record.NAME, report.NAME)
"""Files that are written anew when something was measured."""

SUMS = "SHA256SUMS"


def after_quantize(
    folder: Path,
    done: Report,
    model: str,
    source: Path,
    quantized_by: str | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Describe a checkpoint that was just written.

    Args:
        folder: Where its files are (not yet under their final name).
        done: What `quantize` did.
        model: What it was given: a hub id, a folder, a file.
        source: The folder that was quantized, for the licence and languages in its card, and for its commit
            where it is the hub's cache's.
        quantized_by: Who publishes it.
        inputs: What its bytes depend on: options, versions, digests of model and text.
    """
    for name in (*DESCRIBING, SUMS):  # a run that ended in here had begun them
        (folder / name).unlink(missing_ok=True)
    kept = record.of_report(done, model, inspect(folder).parts, quantized_by)
    kept["commit"] = record.commit_of(source)
    kept["source"] = card.source_metadata(source)
    kept["inputs"] = {
        name: record.public(v) if isinstance(v, str) else v for name, v in (inputs or {}).items()
    }
    report.write(kept, folder)
    card.write(kept, folder)
    record.save(kept, folder)  # last: it holds the digest of the card
    write_sums(folder)


def after_eval(folder: Path, evaluation: Mapping[str, Any]) -> list[str]:
    """Add a measurement to what describes a checkpoint.

    Args:
        folder: A checkpoint folder, ours or another tool's.
        evaluation: `reference`, and `dataset`, `seq_len`, `result` and `divergence` of a text, or `tasks`,
            `limit` and `fewshot` of tasks.

    Returns:
        What the user should know: which files were written, and which were left alone and why.
    """
    if not is_quantized(folder):
        return []
    try:
        own(folder)
        kept = record.load(folder) or record.of_folder(folder, inspect(folder).parts)
    except LowbitError as error:
        return [f"no report: {error}"]
    except OSError as error:
        return [_unwritable(folder, error)]
    kept["name"] = folder.resolve().name
    named = [name for name in ("dataset", "reference") if evaluation.get(name)]
    public = {name: record.public(str(evaluation[name])) for name in named}
    add = record.add_tasks if "tasks" in evaluation else record.add_evaluation
    add(kept, {**evaluation, **public, "run": record.this_run()})
    try:
        report.write(kept, folder)
        note = card.write(kept, folder)
        record.save(kept, folder)
        renew_sums(folder)
    except OSError as error:
        return [_unwritable(folder, error)]
    return [f"{folder / report.NAME}", *([note] if note else [])]


def _unwritable(folder: Path, error: OSError) -> str:
    return f"no report: {folder} can't be written ({error.strerror})"


def own(folder: Path) -> None:
    """Make the files that are written anew the folder's own, where they are links (`durable.part_from`).

    Raises:
        LowbitError: a link leads out of the folder.
    """
    for name in (*DESCRIBING, SUMS):
        durable.part_from(folder, name)


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS`, which `sha256sum --check` and `lowbit inspect --verify` read."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.as_posix() for path in files if path.name != SUMS)
    lines = [f"{durable.sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: Path) -> int:
    """Compare the files of a folder with its `SHA256SUMS`; returns how many there are.

    Raises:
        LowbitError: there is none, it lacks the configuration or a weight file, it names a file outside, or a
            file is missing or was changed.
    """
    path = untrusted.inside(folder, SUMS)
    if not path.is_file():
        raise LowbitError(f"{folder} has no {SUMS}: lowbit quantize and lowbit convert write one")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = [line.partition("  ")[::2] for line in lines]
    names = [name for _, name in listed]
    if "" in names:
        raise LowbitError(f"{path}: line {names.index('') + 1} is cut short: copy the checkpoint again")
    weights = [file.relative_to(folder).as_posix() for file in untrusted.weight_files(folder)]
    for name in ("config.json", *weights):  # of a list that was cut, all that is left holds
        if name not in names:
            raise LowbitError(f"{path} does not list {name}: copy the checkpoint again")
    for known, name in listed:
        file = untrusted.inside(folder, name)
        if not file.is_file() or durable.sha256(file) != known:
            raise LowbitError(f"{file} is missing or not what was written: copy the checkpoint again")
    return len(lines)


def renew_sums(folder: Path) -> None:
    """Where the folder has a `SHA256SUMS`, renew the lines of the files that describe the checkpoint.

    The lines of the weights stay: what they vouch for is what was written once.
    """
    path = folder / SUMS
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("  ")[2] not in DESCRIBING]
    new = [f"{durable.sha256(folder / name)}  {name}" for name in DESCRIBING if (folder / name).is_file()]
    both = sorted([*kept, *new], key=lambda line: line.partition("  ")[2])
    path.write_text("".join(f"{line}\n" for line in both), encoding="utf-8")


def is_quantized(folder: Path) -> bool:
    """Does the folder hold a checkpoint with a quantization of its own?"""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))
