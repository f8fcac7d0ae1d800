"""`lowbit inspect`: what is in a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lowbit.commands.options import AsJson, open_console, print_json

EXAMPLES = (
    "lowbit inspect qwen3-8b-w4",
    "lowbit inspect qwen3-8b-w4 --verify",
    "lowbit inspect qwen3-8b-w4 --json",
)


def run(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with the checkpoint's SHA256SUMS first.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the scheme, bits per weight and size of every part of a checkpoint."""
    from lowbit.beside import verify_sums
    from lowbit.inspection import inspect
    from lowbit.terminal import show_inspection

    verified = verify_sums(folder) if verify else None
    result = inspect(folder)
    if as_json:
        found = dataclasses.asdict(result) | {"bits_per_weight": result.bits_per_weight()}
        print_json(found if verified is None else found | {"verified_files": verified})
        return
    console = open_console(False)
    show_inspection(console, result)
    if verified is not None:
        console.print(f"{verified} files are as SHA256SUMS has them")
