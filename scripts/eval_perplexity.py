#!/usr/bin/env python
"""Perplexity of a checkpoint, and its divergence from the original, on a text.

python scripts/eval_perplexity.py out/smollm2-w4 --reference HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from lowbit.errors import LowbitError
from lowbit.evaluate import Result, perplexity


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    text: Annotated[
        str, typer.Option(help="A .txt, .jsonl or .parquet file, or org/name:config:split of the hub.")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    reference: Annotated[str | None, typer.Option(help="The original model.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Evaluate the first so many windows only.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
) -> None:
    """Evaluate MODEL on a text."""
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("evaluating", total=None)
            result = perplexity(
                model,
                text,
                reference=reference,
                seq_len=seq_len,
                windows=windows,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except LowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    print("\n".join(lines(result)))
    if output:
        output.write_text(
            json.dumps({"model": model, "text": text, "seq_len": seq_len, **result.to_dict()}, indent=2)
        )


def lines(result: Result) -> list[str]:
    """The result for a reader, one figure to a line."""

    def figure(name: str, value: float, error: float | None, digits: int) -> str:
        spread = "" if error is None else f" ± {error:.{digits}f}"
        return f"{name:<22}{value:.{digits}f}{spread}"

    found = [figure("perplexity", result.perplexity, result.perplexity_se, 3)]
    for name, digits in (
        ("reference_perplexity", 3),
        ("perplexity_ratio", 5),
        ("kl", 5),
        ("top1_agreement", 4),
    ):
        value = getattr(result, name)
        if value is not None:
            found.append(figure(name.replace("_", " "), value, getattr(result, f"{name}_se"), digits))
    return [*found, f"{'tokens':<22}{result.tokens} in {result.windows} windows, {result.seconds:.1f} s"]


if __name__ == "__main__":
    typer.run(main)
