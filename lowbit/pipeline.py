"""The road: source, calibration, algorithm, format, file. `quantize` is these steps in order.

Refusals come first: target folder, source, plan, room on the disk and the calibration data are all
checked before the first block is touched. Everything is written into a work folder beside the target and
renamed at the end, after it was read back and compared. What is done is committed there block by block
(`work.py`), and a run that finds such a folder goes on from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbit import beside, checkpoint, hub_source, identity, origin, places, planning, ranks, topology
from lowbit import effort as effort_dial
from lowbit import source as sources
from lowbit.algorithms import ALGORITHMS, BY_COLUMN, CORRECTIONS, columns
from lowbit.batches import Data, find_batches
from lowbit.budget import keep_to
from lowbit.effort import EFFORTS, LOSSES, QAT, Effort
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS
from lowbit.hardware import find_device, find_dtype
from lowbit.plan import Plan, make_plan
from lowbit.progress import Progress, silent
from lowbit.results import Report
from lowbit.road import Road
from lowbit.scheme import QuantScheme
from lowbit.source import Source
from lowbit.target import Target, require_room
from lowbit.work import Work, open_work


@torch.inference_mode(False)  # whatever the caller works in: training needs gradients
def quantize(
    model: str | Path | PreTrainedModel,
    scheme: QuantScheme | None = None,
    *,
    output: str | Path,
    effort: str = effort_dial.DEFAULT,
    method: str | None = None,
    epochs: int | None = None,
    loss: str = "original",
    format: str = "compressed-tensors",
    dataset: str | None = None,
    samples: int | None = None,
    seq_len: int = 512,
    seed: int = 0,
    mix: bool = True,
    skip: Sequence[str] = (),
    head_bits: int | None = None,
    auto_group: bool = False,
    schemes: Mapping[str, QuantScheme] | None = None,
    within: Target | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    max_memory: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify_output: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantized_by: str | None = None,
    keep_source: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Quantize a causal language model into a checkpoint that stock loaders read.

    Args:
        model: Hub id (`org/name` or `org/name@revision`, a branch, tag or commit), local folder, `.gguf`
            file, or a loaded transformers model.
        scheme: The grid; None means 4 bits, symmetric, the largest group size that fits.
        output: Folder to create.
        effort: `fast`, `balanced`, `high` or `max`: how much work goes into the model.
        method: `rtn`, `quick`, `gptq`, `awq` or `qronos`; None takes the effort's own. `qat` trains what that
            one rounds, see `lowbit.qat`.
        epochs: How often training sees its data; None takes the effort's own.
        loss: `data` lets `qat` learn the text itself instead of the original's predictions.
        format: `compressed-tensors`, `gptq` or `awq`.
        dataset: Calibration text: a hub id (`org/name:config`), a `.txt`, `.jsonl` or `.parquet`
            file, `self` to sample it from the model, or `passages`, some pages that come with lowbit. None
            takes those with `fast`, and else a public data set, or `self` where the hub can't be reached
            (the report says so).
        samples: Calibration sequences; None: 6 with `fast`, and else 128. `max` takes twice as many.
        seq_len: Tokens of each.
        seed: Seed of everything random.
        mix: Take up to one calibration row in five from the passages, so that other text than `dataset` does
            not suffer.
        skip: Patterns of modules to leave in full precision (`*.down_proj`).
        head_bits: Also quantize the output head, to this many bits.
        auto_group: Let the model decide the group size.
        schemes: Other grids for some modules, by pattern as in `skip` (`{"down_proj": QuantScheme(8)}`);
            the last that matches counts. Modules that share an input share the widest.
        within: Choose the scheme of every group of matrices so that the checkpoint is no larger than
            this and least is lost; in place of `scheme`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: Working precision: `auto`, `float32`, `bfloat16`, `float16` (which trains in bfloat16).
        max_shard_size: Size of a safetensors shard.
        max_memory: How much the process may have resident (`8GB`); refused, with the smallest value that
            would do, where that can't be kept.
        overwrite: Replace an existing checkpoint.
        restart: Discard what an interrupted run left beside `output`, in place of going on from it.
        verify_output: Read the result back and compare it before it gets its name.
        tokenizer: Only for a loaded model without a folder of its own.
        quantized_by: Who publishes the checkpoint, for the model card.
        keep_source: False: the weight files of a hub id are downloaded one at a time, and removed once
            they have been read, in place of the whole model into the hub's cache.
        progress: Told about every step.

    Returns:
        A report of every layer, of what was skipped, and of how the result was verified.

    Raises:
        LowbitError: anything the user can mend; nothing is left behind, except what was there to go on from.
        VerificationError: the written checkpoint is not what was computed; nothing is left behind.

    >>> report = quantize(tiny_model, QuantScheme(bits=4, group_size=32), output=folder / "w4",
    ...                   dataset="self", samples=8, seq_len=32)
    >>> report.scheme, report.verification.loader
    ('w4g32', 'stock transformers')
    """
    dial, method = _choose(effort, method, format, scheme, epochs, loss, dataset, samples)
    data = Data(dial.dataset, dial.samples * dial.rounding, seq_len, seed, mix)
    hub_source.check(keep_source, model, dial, within)
    scheme, auto_group = planning.first_scheme(within, format, scheme, schemes, auto_group, max_memory)
    fmt, target, told = FORMATS[format], Path(output).expanduser().resolve(), progress or silent
    shard_bytes, where = checkpoint.parse_size(max_shard_size), ranks.own_device(find_device(device))
    with open_work(target, restart) as work, ExitStack() as ends:
        places.check_target(target, _name(model), overwrite or work.is_placed(target))
        opened = _open(model, tokenizer, work.folder, find_dtype(dtype, where), keep_source, ends)
        plan = make_plan(opened.model, scheme, fmt, skip=skip, head_bits=head_bits,
                         auto_group=auto_group, schemes=schemes)  # fmt: skip
        report = Report(target, str(plan.scheme), method, format, "none", source_bytes=opened.bytes)
        work.check(ranks.alike("setting", _inputs(opened, plan, where, dial, schemes, skip, effort=effort,
            **asdict(data), method=method, format=format, head_bits=head_bits, within=within,
            max_shard_size=shard_bytes, max_memory=max_memory)))  # fmt: skip
        if work.is_placed(target):
            return Report.of_json(work.facts["report"])
        if work.facts:
            report = _going_on(work, told)
        elif ranks.is_first():
            require_room(opened, plan, within, target.parent)
        budget = keep_to(max_memory, opened, plan, method, seq_len, dial, work.facts.get("budget"))
        batches, rows = _data(work, opened, report, told, dial, data, budget.tokens, where)
        planning.spend_once(within, work, opened, plan, report, batches, data, where, told)
        road = Road(opened, plan, fmt, report, where, told, work, budget)
        road.write(shard_bytes, batches)
        return ranks.first_does(lambda: _finish(
            road, rows, dial, shard_bytes, batches, verify_output, target, model, quantized_by))  # fmt: skip


def _going_on(work: Work, told: Progress) -> Report:
    """The report of the run that was interrupted, as far as it got."""
    told("resume", 1, 1, f"going on from {work.folder}")
    return Report.of_json(work.facts["report"])


def _finish(
    road: Road,
    rows: Tensor | None,
    dial: Effort,
    shard_bytes: int,
    batches: Sequence[Tensor],
    verify_output: bool,
    target: Path,
    model: str | Path | PreTrainedModel,
    quantized_by: str | None,
) -> Report:
    """Train and read back as asked, describe the checkpoint and give it its name."""
    road.refine(rows, dial, shard_bytes, batches[-1])
    if verify_output:
        road.verify(batches[-1])
    work, report, folder = road.work, road.report, road.source.folder
    report.seconds["all"], report.cpu_seconds = work.seconds(), work.cpu_seconds()
    beside.after_quantize(work.checkpoint, report, _name(model), folder, quantized_by, road.inputs())
    work.commit({"report": report.to_json()}, {})
    checkpoint.put_in_place(work.checkpoint, target)
    return report


def _inputs(
    opened: Source,
    plan: Plan,
    device: torch.device,
    dial: Effort,
    schemes: Mapping[str, QuantScheme] | None,
    skip: Sequence[str],
    **options: Any,
) -> dict[str, Any]:
    """What the bytes of the result depend on."""
    return {
        **options,
        "within": repr(options["within"]),
        "skip": list(skip),
        "scheme": str(plan.scheme),
        "schemes": {at: str(scheme) for at, scheme in (schemes or {}).items()},
        "model": opened.identity(),
        "text": identity.of_text(dial.dataset),
        "epochs": dial.epochs,
        "weights": dial.weights,
        "loss": dial.loss,
        "dtype": str(opened.dtype),
        "device": device.type,
        "columns": columns.name(device) if options["method"] in BY_COLUMN else None,
        **identity.versions(*(["triton"] if device.type == "cuda" else [])),
    }


def _data(
    work: Work,
    opened: Source,
    report: Report,
    told: Progress,
    dial: Effort,
    data: Data,
    at_once: int | None,
    device: torch.device,
) -> tuple[list[Tensor], Tensor | None]:
    """`find_batches`, or what a run that was interrupted had found; by the first rank, for all."""
    _check_trainable(opened, dial)

    def find() -> tuple[list[Tensor], Tensor | None]:
        kept = work.load("data")
        if kept:
            rows = kept.pop("rows", None)
            return [kept[name] for name in sorted(kept)], rows
        started = time.monotonic()
        extra = dial.training * dial.samples
        batches, rows = find_batches(
            opened, report, report.method, data, told, extra, at_once, device, dial.samples
        )
        report.tokens = identity.of_tokens(batches[:-1]) if len(batches) > 1 else ""
        report.end_stage("calibration data", time.monotonic() - started)
        found = {f"{number:06}": batch for number, batch in enumerate(batches)}
        long = report.calibration.startswith("self")  # the model wrote it itself
        found |= {} if rows is None else {"rows": rows}
        work.commit({"report": report.to_json()}, {"data": found}, worth=long)
        return batches, rows

    return ranks.first_does(find)


def _choose(
    effort: str,
    method: str | None,
    format: str,
    scheme: QuantScheme | None,
    epochs: int | None,
    loss: str,
    dataset: str | None,
    samples: int | None,
) -> tuple[Effort, str]:
    """What an effort stands for, on the data asked for, and the method; refuses what does not go together."""
    if effort not in EFFORTS:
        raise LowbitError(f"effort={effort!r} is unknown: use one of {list(EFFORTS)}")
    dial, rounded_inputs = EFFORTS[effort], scheme is not None and scheme.activation_bits is not None
    if rounded_inputs and method == QAT:
        raise LowbitError(f"method={method!r} trains for exact activations, not {scheme}: use gptq")
    if rounded_inputs and dial.training:
        raise LowbitError(f"effort={effort!r} trains for exact activations, not {scheme}: use balanced")
    if method not in (None, dial.method):  # an effort's data are for its own method
        usual = EFFORTS[effort_dial.DEFAULT]
        dial = dial._replace(dataset=usual.dataset, samples=usual.samples)
    dial = _with_training(dial, method, epochs, loss)
    method = None if method == QAT else method
    method = method or ("gptq" if rounded_inputs and dial.method in CORRECTIONS else dial.method)
    if method not in ALGORITHMS:
        raise LowbitError(f"method={method!r} is unknown: use one of {sorted([*ALGORITHMS, QAT])}")
    if method not in ("rtn", "quick", "gptq") and rounded_inputs:
        raise LowbitError(f"method={method!r} knows no rounded activations ({scheme}): use gptq or rtn")
    if format not in FORMATS:
        raise LowbitError(f"format={format!r} is unknown: use one of {sorted(FORMATS)}")
    return _with_data(dial, dataset, samples), method


def _with_data(dial: Effort, dataset: str | None, samples: int | None) -> Effort:
    """The dial on the data that was asked for, and where none was, on its own."""
    dataset = dial.dataset if dataset is None else dataset
    return dial._replace(dataset=dataset, samples=dial.samples if samples is None else samples)


def _with_training(dial: Effort, method: str | None, epochs: int | None, loss: str) -> Effort:
    """The dial with what was asked of training; refused where nothing is trained."""
    if loss not in LOSSES:
        raise LowbitError(f"loss={loss!r} is unknown: use one of {list(LOSSES)}")
    if loss == "data" and method != QAT:
        raise LowbitError("loss='data' trains the weights: add method='qat'")
    if method == QAT:
        dial = dial._replace(
            epochs=max(1, dial.epochs), training=max(1, dial.training), weights=True, loss=loss
        )
    if epochs is None:
        return dial
    if not dial.training:
        raise LowbitError(f"epochs={epochs} needs training: use effort='high', 'max' or method='qat'")
    if epochs < 1:
        raise LowbitError(f"epochs={epochs} trains nothing: use 1 or more")
    return dial._replace(epochs=epochs)


def _check_trainable(source: Source, dial: Effort) -> None:
    """Refuse before the first block what `distill` would refuse after the last."""
    _, blocks = topology.decoder_blocks(source.model)
    if dial.weights and not any(isinstance(module, torch.nn.Linear) for module in blocks.modules()):
        name = type(source.model).__name__
        raise LowbitError(f"{name} has no linear layer that can be trained: use --method gptq")


def _name(model: str | Path | PreTrainedModel) -> str:
    return str(getattr(model, "name_or_path", model))


def _open(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    scratch: Path,
    dtype: torch.dtype,
    keep_source: bool,
    ends: ExitStack,
) -> Source:
    """The source behind `model`: what is in memory is saved first, what is fetched goes with `ends`."""
    if not keep_source:
        fetched = hub_source.HubSource(str(model), scratch / "source", dtype)
        ends.callback(fetched.release)
        return fetched
    if isinstance(model, PreTrainedModel):
        return Source(ranks.first_does(lambda: origin.from_memory(model, tokenizer, scratch)), dtype)
    return Source(ranks.first_does(lambda: sources.find(str(model), scratch)), dtype)
