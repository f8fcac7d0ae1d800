"""What commands share: the options that many take, and where their output goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lowbit.errors import LowbitError
from lowbit.places import check_source

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit.target import Target


FOLDER = "a folder or a hub id (org/name)"


def _there(model: str) -> str:
    """Refuse a path that is none at once."""
    check_source(model)
    return model


def _loadable(model: str) -> str:
    """Refuse a file at once, too: `lowbit compare` alone makes a model of one to measure it."""
    check_source(model, FOLDER)
    path = Path(model).expanduser()
    if path.is_file():
        also = "; lowbit compare reads .gguf files" if path.suffix == ".gguf" else ""
        raise LowbitError(f"{model} is a file: give {FOLDER}{also}")
    return model


Model = Annotated[
    str,
    typer.Argument(
        help="Hub id (org/name or org/name@revision), local folder, or .gguf file.",
        show_default=False,
        callback=_there,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Hub id (org/name or org/name@revision), or local folder.",
        show_default=False,
        callback=_loadable,
    ),
]
"""A model as `lowbit.hf.load` takes it, which loads no `.gguf` file."""
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Native = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--native/--no-native",
        help="On a CPU: kernels in C, compiled once by your compiler (AVX-512 VNNI), or torch's own. "
        "Default: C where that works.",
        show_default=False,
    ),
]
TargetBpw = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        help="Choose bits and group size per layer, for so many bits per quantized weight.",
        show_default=False,
    ),
]
TargetSize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="The same, for weight files of this size (3.9GB), embeddings included.", show_default=False
    ),
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


def target_of(
    bits_per_weight: float | None, size: str | None, bits: int | None, group_size: str
) -> Target | None:
    """The target that the options name; None where there is none.

    Raises:
        LowbitError: both kinds at once, or what `Target` refuses.
    """
    if bits_per_weight is None and size is None:
        return None
    from lowbit.checkpoint import parse_size
    from lowbit.target import Target

    group = None if group_size == "auto" else group_size_of(group_size)
    return Target(bits_per_weight, None if size is None else parse_size(size), bits, group)


def group_size_of(text: str) -> int:
    """A group size.

    Raises:
        LowbitError: it is no number.
    """
    try:
        return int(text)
    except ValueError:
        raise LowbitError(f"--group-size {text!r} is not a number: use 128, 64, 32, -1 or auto") from None
