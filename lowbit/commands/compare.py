"""`lowbit compare`: several checkpoints on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lowbit.commands.options import AsJson, Device, open_console, print_json

EXAMPLES = (
    "lowbit compare qwen3-8b-w4 qwen3-8b-w3 model.Q4_K_M.gguf --reference Qwen/Qwen3-8B",
    "lowbit compare ours theirs --reference ./my-model --dataset held-out.txt --windows 16 --json",
)


def run(
    models: Annotated[
        list[str], typer.Argument(help="Folders, hub ids or .gguf files of one model.", show_default=False)
    ],
    reference: Annotated[str, typer.Option(help="The original of all of them.", show_default=False)],
    dataset: Annotated[
        str,
        typer.Option(
            help="Text: wikitext2, c4, ptb, a hub id (org/name:config:split), or a .txt, .jsonl or .parquet "
            "file."
        ),
    ] = "wikitext2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("compare.html"),
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 2048,
    windows: Annotated[
        Optional[int],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(min=1, help="How many windows; all of the text by default.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision: auto (each one's own; float32 where bfloat16 is slow), bfloat16, float32."
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Put several checkpoints on one page: size against KL divergence from the original."""
    from lowbit.comparison import compare_checkpoints
    from lowbit.comparison_page import render
    from lowbit.errors import LowbitError
    from lowbit.hardware import find_device
    from lowbit.terminal import progress_bar, show_comparison

    console, where = open_console(as_json), find_device(device)
    if output.suffix != ".html" or not output.parent.is_dir():
        raise LowbitError(f"--output {output} is no page in an existing folder: name it like compare.html")
    with progress_bar(console) as progress:
        found = compare_checkpoints(
            models,
            reference,
            dataset,
            seq_len=seq_len,
            windows=windows,
            device=where,
            dtype=dtype,
            progress=progress,
        )
    output.write_text(render(found), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
    else:
        show_comparison(console, found, output)
