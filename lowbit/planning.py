"""From a target to a scheme per matrix: a step of `lowbit quantize`, and all of `lowbit plan`.

A few thousand tokens are enough to price the groups (`sensitivity.py`): the choice hangs on which group
is worth ten times another, and those that are nearly alike may be exchanged at no cost.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit import ranks, sensitivity
from lowbit import source as sources
from lowbit.algorithms import BY_COLUMN
from lowbit.batches import Data, find_batches
from lowbit.effort import DEFAULT, EFFORTS
from lowbit.errors import LowbitError
from lowbit.formats import compressed_tensors
from lowbit.hardware import find_device, find_dtype
from lowbit.plan import Plan, make_plan
from lowbit.progress import Progress, silent
from lowbit.results import Report
from lowbit.scheme import QuantScheme
from lowbit.source import Source
from lowbit.target import Choice, Room, Target, choose, find_room
from lowbit.work import Work

SAMPLES, LENGTH = 16, 256
"""Rows and tokens of each that price the groups."""


def base_scheme(
    target: Target, format: str = "compressed-tensors", given: object = None, max_memory: object = None
) -> tuple[QuantScheme, bool]:
    """What a model is planned with until the target chooses, and whether its group size is open.

    Raises:
        LowbitError: the format holds one scheme only, schemes are `given` as well, or memory is promised.
    """
    target.check(format)
    if given:
        raise LowbitError("within= chooses the schemes: leave out scheme= and schemes=, or within=")
    if max_memory:
        raise LowbitError(f"--max-memory does not count what {target.option} takes: drop one of them")
    bits, group_size = target.bits, target.group_size
    grid = QuantScheme(4 if bits is None else bits, 128 if group_size is None else group_size)
    return grid, group_size is None


def first_scheme(
    within: Target | None,
    format: str,
    scheme: QuantScheme | None,
    schemes: Mapping[str, QuantScheme] | None,
    auto_group: bool,
    max_memory: object,
) -> tuple[QuantScheme, bool]:
    """The grid to plan with, and whether its group size is open; raises as `base_scheme` for a target."""
    if within is None:
        return scheme or QuantScheme(), auto_group or scheme is None
    return base_scheme(within, format, scheme or schemes, max_memory)


def sample(batches: Sequence[Tensor]) -> Tensor:
    """Rows for `spend`, int64 `[SAMPLES, LENGTH]` or less, of calibration batches `[rows, length]`."""
    rows = torch.cat(list(batches))
    pieces = rows.shape[1] // LENGTH
    if len(rows) < SAMPLES and pieces > 1:  # few rows are used to their end
        rows = rows[:, : pieces * LENGTH].reshape(-1, LENGTH)
    return rows[:SAMPLES, :LENGTH]


def spend(
    source: Source,
    plan: Plan,
    room: Room,
    rows: Tensor,
    method: str,
    device: torch.device,
    progress: Progress,
) -> Choice:
    """Price every group on `rows` for a method, choose, and give `plan` the schemes; weights are let go."""
    groups, notes = sensitivity.measure(
        source,
        plan,
        rows,
        room.schemes,
        compressed_tensors.SCALE_DTYPE,
        method in BY_COLUMN,
        device,
        progress,
    )
    if notes:  # more is skipped than the plan knew: it takes room
        room = dataclasses.replace(find_room(source, plan, room.target), bits=room.bits)
    choice = choose(groups, room)
    choice.notes = notes
    plan.schemes |= choice.by_module()
    return choice


def spend_once(
    target: Target | None,
    work: Work,
    source: Source,
    plan: Plan,
    report: Report,
    batches: Sequence[Tensor],
    data: Data,
    device: torch.device,
    progress: Progress,
) -> None:
    """Choose the schemes for `plan` where there is a target, or take up what an interrupted run had chosen.

    The groups are priced on the calibration data or, where there is none, on rows of `data`; by the first
    rank, for all.
    """
    if target is None:
        return
    kept = work.facts.get("planned")
    if kept is not None:
        plan.schemes = {name: QuantScheme(**scheme) for name, scheme in kept.items()}
        return

    def choose_all() -> tuple[dict[str, QuantScheme], dict[str, str]]:
        _spend(target, work, source, plan, report, batches, data, device, progress)
        return plan.schemes, plan.skipped

    plan.schemes, plan.skipped = ranks.first_does(choose_all)


def _spend(
    target: Target,
    work: Work,
    source: Source,
    plan: Plan,
    report: Report,
    batches: Sequence[Tensor],
    data: Data,
    device: torch.device,
    progress: Progress,
) -> None:
    started = time.monotonic()
    rows = (
        sample(batches[:-1]) if len(batches) > 1 else read_rows(source, data, progress, report.notes, device)
    )
    room = find_room(source, plan, target)
    choice = spend(source, plan, room, rows, report.method, device, progress)
    report.plan, report.notes = choice.to_dict(), report.notes + choice.notes
    report.end_stage("choosing schemes", time.monotonic() - started)
    planned = {name: dataclasses.asdict(scheme) for name, scheme in plan.schemes.items()}
    work.commit({"report": report.to_json(), "planned": planned, "skipped": plan.skipped}, {})


def preview(
    model: str | Path,
    target: Target,
    *,
    method: str | None = None,
    dataset: str | None = None,
    seed: int = 0,
    mix: bool = True,
    skip: Sequence[str] = (),
    head_bits: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Choice:
    """What `quantize` would choose within a target; nothing is written.

    Args:
        model: Hub id, with or without `@revision`, local folder, or `.gguf` file.
        target: How small the checkpoint must be.
        method: Rounding algorithm that will be used; None: that of the default effort.
        dataset: Text to price the groups on, as in `quantize`.
        seed: Seed of its rows.
        mix: Take some of them from the passages, as `quantize` does.
        skip: Patterns of modules to leave in full precision.
        head_bits: Quantize the output head too, to this many bits.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: Working precision: `auto`, `float32`, `bfloat16`.
        progress: Told about every step.

    Raises:
        LowbitError: as `quantize`.
    """
    data = Data(dataset, SAMPLES, LENGTH, seed, mix)
    where, told = find_device(device), progress or silent
    with tempfile.TemporaryDirectory() as scratch:
        source = Source(sources.find(str(model), Path(scratch)), find_dtype(dtype, where))
        scheme, auto_group = base_scheme(target)
        plan = make_plan(
            source.model, scheme, compressed_tensors, skip=skip, head_bits=head_bits, auto_group=auto_group
        )  # fmt: skip
        room = find_room(source, plan, target)
        notes: list[str] = []
        rows = read_rows(source, data, told, notes, where)
        choice = spend(source, plan, room, rows, method or EFFORTS[DEFAULT].method, where, told)
        choice.notes += notes
        shapes = {n: s for group in choice.groups for n, s in zip(group.names, group.shapes, strict=True)}
        choice.warnings = compressed_tensors.warnings(choice.by_module(), shapes)
    return choice


def read_rows(
    source: Source, data: Data, progress: Progress, notes: list[str], device: torch.device
) -> Tensor:
    """Rows for `spend` where nothing is calibrated; adds to `notes` what the user should know of them."""
    found = Report(source.folder, "", "gptq", "", "")  # of which only the notes matter
    data = dataclasses.replace(data, samples=SAMPLES, seq_len=LENGTH)
    batches, _ = find_batches(source, found, "gptq", data, progress, device=device)
    notes += found.notes
    if len(batches) < 2:
        raise LowbitError(f"--dataset {data.dataset} is too short to price anything: give more text")
    return sample(batches[:-1])
