"""`lowbit bench`: speed, memory and energy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from lowbit.commands.options import AsJson, Checkpoint, Device, Native, open_console, print_json

EXAMPLES = (
    "lowbit bench qwen3-8b-w4 --reference Qwen/Qwen3-8B",
    "lowbit bench my-model-w4 --reference ./my-model --threads 1 --no-native",
)


def run(
    model: Checkpoint,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The original, measured after it.", show_default=False),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="CPU threads.", show_default=False),
    ] = None,
    device: Device = "auto",
    native: Native = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed, memory and energy, beside the original's."""
    from lowbit import speed
    from lowbit.terminal import show_speeds

    names = [model, *([reference] if reference else [])]
    found = speed.bench(
        names,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        device=device,
        native=native,
    )
    if as_json:
        print_json({name: dataclasses.asdict(one) for name, one in zip(names, found, strict=True)})
    else:
        show_speeds(open_console(False), [Path(name).name for name in names], found)
