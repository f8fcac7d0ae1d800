"""`lowbit eval`: what quantization cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lowbit.commands.options import AsJson, Device, Model, open_console, print_json

EXAMPLES = (
    "lowbit eval qwen3-8b-w4 --reference Qwen/Qwen3-8B",
    "lowbit eval my-model-w4 --dataset held-out.txt --seq-len 1024 --windows 32 --json",
)


def run(
    model: Model,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The original, to measure KL divergence and top-1 agreement.", show_default=False),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Text: hub id (org/name:config:split) or a .txt, .jsonl or .parquet file.")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 2048,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="How many windows; all of the text by default.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Precision: auto (the checkpoint's), bfloat16 or float32.")
    ] = "auto",
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Add the result to the checkpoint's report and card.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and what quantization changed: KL divergence and top-1 agreement."""
    from lowbit import beside, hf
    from lowbit.divergence import Divergence
    from lowbit.evaluate import perplexity
    from lowbit.hardware import find_device, find_dtype
    from lowbit.terminal import progress_bar, show_result

    console, where = open_console(as_json), find_device(device)
    divergence = Divergence()
    precision = dtype if dtype == "auto" else find_dtype(dtype, where)
    with progress_bar(console) as progress:
        original = hf.load(reference, packed=False, dtype=precision, device=where) if reference else None
        loaded, tokenizer = (
            hf.load(model, packed=False, dtype=precision, device=where),
            hf.load_tokenizer(model),
        )
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
    notes = []
    if report:
        notes = beside.after_eval(
            Path(model),
            {
                "dataset": dataset,
                "seq_len": seq_len,
                "reference": reference,
                "result": result.to_dict(),
                "divergence": divergence.to_dict(tokenizer) if reference else None,
            },
        )
    if as_json:
        print_json(result.to_dict())
    else:
        show_result(console, result, notes)
