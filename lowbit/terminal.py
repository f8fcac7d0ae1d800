"""What the user sees: one progress bar, one summary. Nothing is computed here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lowbit import interruption
from lowbit.comparison import Comparison
from lowbit.evaluate import Result
from lowbit.inspection import Inspection
from lowbit.progress import Progress as ProgressCallback
from lowbit.push import Upload
from lowbit.report import grouped
from lowbit.results import Conversion, Report
from lowbit.speed import Speed
from lowbit.target import Choice
from lowbit.tasks import TaskResult

WORST = 5
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """A bar with step, ETA and what is going on; plain lines now and then where there is no terminal."""
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    ]
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int, detail: str) -> None:
            interruption.check()
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, detail=detail)
            bar.update(tasks[stage], completed=done, total=total, detail=detail)

        yield show


def _plain_lines(console: Console) -> ProgressCallback:
    last = time.monotonic()

    def show(stage: str, done: int, total: int, detail: str) -> None:
        nonlocal last
        interruption.check()
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{stage} {done}/{total}  {detail}", markup=False, highlight=False, soft_wrap=True)

    return show


def show_report(console: Console, report: Report, peak_memory: int) -> None:
    """The summary at the end of `lowbit quantize`."""
    measured = "output" if report.calibration_used else "weight"
    worst = sorted(report.layers, key=lambda layer: layer.error, reverse=True)[:WORST]
    table = Table(
        "worst layers", "shape", "scheme", f"relative {measured} error", box=None, title_justify="left"
    )
    for layer in worst:
        table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", layer.scheme, f"{layer.error:.2e}")
    console.print(table)
    console.print()
    facts = {
        "quantized": f"{len(report.layers)} layers to {report.scheme} by {report.method}",
        **({"target": f"{report.plan['budget']}; used {report.plan['achieved']}"} if report.plan else {}),
        "calibrated on": report.calibration,
        **({"corrected": _corrected(report)} if _corrected(report) else {}),
        "size": f"{_size(report.source_bytes)} -> {_size(report.output_bytes)}",
        "verified": _verification(report),
        "time": f"{report.seconds['all']:.0f} s ({report.cpu_seconds:.0f} CPU s)",
        **({"shared by": _ranks(report)} if report.ranks else {}),
        "peak memory": _size(peak_memory),
        "written to": f"{report.output} ({report.format})",
    }
    _facts(console, facts)
    for name, reason in grouped(report.skipped.items()):
        _line(console, "[dim]full precision[/]", f"{name}: {reason}")
    for note in _collapsed_notes(report.notes):
        _line(console, "[yellow]note[/]", note)
    for warning in report.warnings:
        _line(console, "[yellow]engines[/]", warning)


def show_choice(console: Console, choice: Choice) -> None:
    """What a target chose: blocks in rows, groups of matrices in columns."""
    labels = choice.labels()
    columns = list(dict.fromkeys(label for _, label in labels))
    cells = dict(zip(labels, map(str, choice.schemes), strict=True))
    table = Table("block", *columns, box=None)
    for block in dict.fromkeys(block for block, _ in labels):
        row = [cells.get((block, label), "") for label in columns]
        table.add_row("all" if block is None else str(block), *row)
    console.print(table)
    console.print()
    facts = {"target": str(choice.room.target), "used": choice.to_dict()["achieved"]}
    facts["estimated KL"] = f"{choice.kl:.4f} nats per token"
    best = choice.uniform()
    facts["one scheme"] = f"{best[0]} for all would be {best[1]:.4f}" if best else "none for all fits"
    _facts(console, facts)
    for note in _collapsed_notes(choice.notes):
        _line(console, "[yellow]note[/]", note)
    for warning in choice.warnings:
        _line(console, "[yellow]engines[/]", warning)


def _line(console: Console, label: str, text: str) -> None:
    console.print(f"  {label}  {escape(text)}", highlight=False, soft_wrap=True)


def _corrected(report: Report) -> str:
    """How much of what layers had to make up for they do, as far as held-out tokens confirm it."""
    factors = [layer.corrected for layer in report.layers if layer.corrected is not None]
    if not factors:
        return ""
    mean = sum(factors) / len(factors)
    return f"{len(factors)} layers for the ones before, by {mean:.0%} of the fit on average"


def _ranks(report: Report) -> str:
    seconds = " + ".join(f"{rank['seconds']:.0f}" for rank in report.ranks)
    sent = _size(int(sum(rank["sent"] for rank in report.ranks)))
    return f"{len(report.ranks)} ranks, {seconds} CPU s; {sent} sent"


def _verification(report: Report) -> str:
    if report.verification is None:
        return "no (--no-verify)"
    found = report.verification
    same = f"{found.weights} weights equal to the bit, logits within {found.kl:.1e} nats"
    return f"read back by {found.loader}: {same}"


def show_conversion(console: Console, result: Conversion) -> None:
    """The summary at the end of `lowbit convert`."""
    exact = sum(result.layers.values()) - len(result.requantized)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(result.layers.items()))
    _facts(
        console,
        {
            "converted": f"{result.source_format} -> {result.format}: {kinds}",
            "exact": f"{exact} layers with the same codes, scales and zeros"
            + (f"; {len(result.requantized)} were ROUNDED AGAIN (--lossy)" if result.requantized else ""),
            "size": f"{_size(result.source_bytes)} -> {_size(result.output_bytes)}",
            "verified": "read back, every tensor as in the source",
            "time": f"{result.seconds:.0f} s",
            "written to": str(result.output),
        },
    )
    for name, reason in grouped(result.requantized.items()):
        _line(console, "[red]rounded again[/]", f"{name}: {reason}")
    for note in result.notes:
        _line(console, "[yellow]note[/]", note)
    for warning in result.warnings:
        _line(console, "[yellow]engines[/]", warning)


def show_result(console: Console, result: Result, notes: Sequence[str] = ()) -> None:
    """The result of `lowbit eval`, and what became of the checkpoint's report."""
    facts = {"perplexity": _with_error(result.perplexity, result.perplexity_se, 3)}
    if result.kl is not None:
        facts |= {
            "of the original": _with_error(result.reference_perplexity, result.reference_perplexity_se, 3),
            "ratio (paired)": _with_error(result.perplexity_ratio, result.perplexity_ratio_se, 4),
            "KL divergence": _with_error(result.kl, result.kl_se, 4) + " nats per token",
            "same top token": _with_error(result.top1_agreement, result.top1_agreement_se, 4),
        }
    facts["measured on"] = (
        f"{result.tokens} tokens in {result.windows} windows, in {result.dtype}, {result.seconds:.0f} s"
    )
    _facts(console, facts)
    for note in notes:
        _line(console, "[dim]report[/]", note)


def show_tasks(console: Console, results: Sequence[TaskResult], notes: Sequence[str] = ()) -> None:
    """The result of `lowbit eval --tasks`, and what became of the checkpoint's report."""
    table = Table(
        "task", "metric", "documents", "value", "original", "difference", "lost/gained", "p", box=None
    )
    for row in results:
        compared = [""] * 4
        if row.difference is not None:
            uneven = [""] * 2 if row.p_value is None else [f"{row.lost}/{row.gained}", f"{row.p_value:.2g}"]
            compared = [
                _with_error(row.reference, row.reference_se, 4),
                _with_error(row.difference, row.difference_se, 4),
                *uneven,
            ]
        value = _with_error(row.value, row.value_se, 4)
        table.add_row(escape(row.task), escape(row.metric), str(row.documents), value, *compared)
    console.print(table)
    console.print(f"  [dim]measured in {results[0].dtype}")
    if results[0].difference is not None:
        console.print("  [dim]± of the difference: paired over documents; p: McNemar's exact test")
    for note in notes:
        _line(console, "[dim]report[/]", note)


def show_comparison(console: Console, found: Comparison, page: Path) -> None:
    """The result of `lowbit compare`, best first."""
    table = Table(
        "checkpoint", "stored as", "size", "bits/weight", "KL, nats", "ratio", "same top token", box=None
    )
    for model in sorted(found.models, key=lambda model: model.result.kl or 0.0):
        result = model.result
        table.add_row(
            escape(model.name),
            model.scheme,
            _size(model.bytes),
            f"{model.bits_per_weight:.2f}",
            _with_error(result.kl, result.kl_se, 4),
            _with_error(result.perplexity_ratio, result.perplexity_ratio_se, 4),
            _with_error(result.top1_agreement, result.top1_agreement_se, 4),
        )
    console.print(table)
    console.print()
    measured = f"{found.windows} windows of {found.seq_len} tokens of {found.dataset}"
    measured += ", in " + " and ".join(sorted({str(model.result.dtype) for model in found.models}))
    _facts(console, {"original": found.reference, "measured on": measured, "page": str(page)})


def show_upload(console: Console, upload: Upload) -> None:
    """The result of `lowbit push`: the files, and where they are."""
    table = Table("file", "size", box=None)
    for name, size in upload.files:
        table.add_row(escape(name), _size(size))
    console.print(table)
    console.print()
    where = upload.url or f"{upload.repo_id} (--dry-run: nothing was sent)"
    _facts(console, {"files": f"{len(upload.files)}, {_size(upload.bytes)}", "repository": where})


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def show_speeds(console: Console, names: list[str], speeds: list[Speed]) -> None:
    """The result of `lowbit bench`, one column per model."""
    table = Table("", *names, box=None)
    rows: dict[str, Callable[[Speed], float]] = {
        "decode, tokens/s": lambda speed: speed.decode,
        "decode, tokens/CPU s": lambda speed: speed.decode_cpu,
        "prefill, tokens/s": lambda speed: speed.prefill,
        "prefill, tokens/CPU s": lambda speed: speed.prefill_cpu,
        "weights, MB": lambda speed: speed.weight_bytes / 1e6,
        "peak memory, MB": lambda speed: speed.peak_memory / 1e6,
    }
    for title, value in rows.items():
        cells = [f"{value(speed):.1f}" for speed in speeds]
        cells[:-1] = [
            f"{c} ({value(s) / value(speeds[-1]):.2f}x)" for c, s in zip(cells, speeds[:-1], strict=False)
        ]
        table.add_row(title, *cells)
    energy = [speed.joules_per_token for speed in speeds]
    unknown = "no counter to read"
    table.add_row("energy, J/token", *(unknown if joules is None else f"{joules:.2f}" for joules in energy))
    table.add_row("kernels", *(speed.kernels for speed in speeds))
    console.print(table)
    for lacking in {speed.lacking for speed in speeds if speed.lacking}:
        console.print(f"[dim]{escape(lacking)}", soft_wrap=True)


def show_inspection(console: Console, inspection: Inspection) -> None:
    """The result of `lowbit inspect`."""
    table = Table("module", "count", "scheme", "weights", "bits/weight", "size", box=None)
    for part in inspection.parts:
        style = None if part.quantized else "dim"
        row = (part.name, str(part.modules), part.scheme, f"{part.weights / 1e6:.2f} M",
               f"{part.bits_per_weight:.2f}", _size(part.bytes))  # fmt: skip
        table.add_row(*row, style=style)
    console.print(table)
    console.print()
    _facts(
        console,
        {
            "quantization": inspection.method,
            "bits per weight": f"{inspection.bits_per_weight(True):.2f} quantized, "
            f"{inspection.bits_per_weight():.2f} over all",
            "size on disk": _size(inspection.file_bytes),
        },
    )


def _facts(console: Console, facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(f"  {name}", escape(value))
    console.print(table, highlight=False)


def _collapsed_notes(notes: list[str]) -> list[str]:
    """Notes that differ only in numbers of blocks, once each."""
    return [note for note, _ in grouped((note, "") for note in notes)]


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
