"""`lowbit eval`: what quantization cost, on text or on tasks with right answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lowbit.commands.options import AsJson, Checkpoint, Device, open_console, print_json
from lowbit.errors import LowbitError

EXAMPLES = (
    "lowbit eval qwen3-8b-w4 --reference Qwen/Qwen3-8B",
    "lowbit eval qwen3-8b-w4 --reference Qwen/Qwen3-8B --tasks arc_easy,hellaswag",
    "lowbit eval my-model-w4 --dataset held-out.txt --seq-len 1024 --windows 32 --json",
)


DEFAULT = "wikitext2"


def run(
    model: Checkpoint,
    reference: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(help="The original, to measure what quantization changed.", show_default=False),
    ] = None,
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Text: wikitext2 (the default), c4, ptb, a hub id (org/name:config:split), or a .txt, "
            ".jsonl or .parquet file.",
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 2048,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="How many windows; all of the text by default.", show_default=False),
    ] = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Tasks of lm-evaluation-harness, in place of a text: arc_easy,hellaswag,...",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --tasks: the first so many documents of each.", show_default=False),
    ] = None,
    fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="With --tasks: examples before a question.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --tasks: questions asked together.")] = 1,
    include_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --tasks: a folder with tasks of your own.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision: auto (the checkpoint's; float32 where bfloat16 is slow), bfloat16 or float32."
        ),
    ] = "auto",
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Add the result to the checkpoint's report and card.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and what quantization changed: KL divergence, top-1 agreement, answers to tasks."""
    from lowbit import beside
    from lowbit.hardware import evaluation_dtype, find_device

    where = find_device(device)
    precision = evaluation_dtype(dtype, where)
    if tasks is not None and (dataset is not None or windows is not None):
        raise LowbitError("--tasks stands in place of a text: drop --dataset and --windows, or run twice")
    if tasks is None and (limit, fewshot, include_path) != (None, None, None):
        raise LowbitError("--limit, --fewshot and --include-path belong to --tasks: name some tasks")
    common = (model, reference, where, precision, as_json)
    if tasks is None:
        shown, kept, show = _on_text(dataset or DEFAULT, seq_len, windows, *common)
    else:
        names = [name for name in tasks.split(",") if name]
        options = {"limit": limit, "fewshot": fewshot, "batch_size": batch_size, "include_path": include_path}
        shown, kept, show = _on_tasks(names, options, *common)
    notes = beside.after_eval(Path(model), kept | {"reference": reference}) if report else []
    if as_json:
        print_json(shown)
    else:
        show(open_console(), notes)


Measured = tuple[dict[str, Any], dict[str, Any], Callable[..., None]]
"""What `--json` prints, what the record keeps, and what fills the terminal."""


def _on_text(
    dataset: str,
    seq_len: int,
    windows: int | None,
    model: str,
    reference: str | None,
    device: Any,
    dtype: Any,
    as_json: bool,
) -> Measured:
    from lowbit import hf
    from lowbit.dataset import full_name
    from lowbit.divergence import Divergence
    from lowbit.evaluate import perplexity
    from lowbit.terminal import progress_bar, show_result

    divergence = Divergence()
    with progress_bar(open_console(as_json)) as progress:
        original = hf.load(reference, packed=False, dtype=dtype, device=device) if reference else None
        loaded = hf.load(model, packed=False, dtype=dtype, device=device)
        tokenizer = hf.load_tokenizer(model)
        result = perplexity(
            loaded,
            dataset,
            tokenizer,
            reference=original,
            seq_len=seq_len,
            windows=windows,
            progress=lambda done, total: progress("evaluate", done, total, "windows"),
            divergence=divergence,
        )
    kept = {
        "dataset": full_name(dataset),
        "seq_len": seq_len,
        "result": result.to_dict(),
        "divergence": divergence.to_dict(tokenizer) if reference else None,
    }
    return result.to_dict(), kept, lambda console, notes: show_result(console, result, notes)


def _on_tasks(
    names: list[str],
    options: dict[str, Any],
    model: str,
    reference: str | None,
    device: Any,
    dtype: Any,
    as_json: bool,
) -> Measured:
    from lowbit.tasks import measure
    from lowbit.terminal import progress_bar, show_tasks

    with progress_bar(open_console(as_json)) as progress:
        results = measure(
            model,
            names,
            reference=reference,
            dtype=dtype,
            device=device,
            progress=lambda which, done, total: progress(Path(which).name, done, total, "answers"),
            **options,
        )
    rows = [result.to_dict() for result in results]
    kept = {"tasks": rows, "limit": options["limit"], "fewshot": options["fewshot"]}
    return {"tasks": rows}, kept, lambda console, notes: show_tasks(console, results, notes)
