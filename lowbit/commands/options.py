"""What commands share: the options that many take, and where their output goes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or .gguf file.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Native = Annotated[
    bool,
    typer.Option("--native", help="On a CPU: kernels in C, compiled once by your compiler (AVX-512 VNNI)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def open_console(as_json: bool = False) -> Console:
    """Tables go to stdout; with --json stdout is the object's alone and progress goes to stderr."""
    from rich.console import Console

    # The stream of now: a library that is made to hold its tongue meanwhile does not silence us.
    return Console(file=sys.stderr) if as_json else Console()


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(content, indent=2, default=str))
