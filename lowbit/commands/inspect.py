"""`lowbit inspect`: what is in a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lowbit.commands.options import AsJson, open_console, print_json

EXAMPLES = (
    "lowbit inspect qwen3-8b-w4",
    "lowbit inspect qwen3-8b-w4 --json",
)


def run(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show the scheme, bits per weight and size of every part of a checkpoint."""
    from lowbit.inspection import inspect
    from lowbit.terminal import show_inspection

    result = inspect(folder)
    if as_json:
        print_json(dataclasses.asdict(result) | {"bits_per_weight": result.bits_per_weight()})
    else:
        show_inspection(open_console(False), result)
