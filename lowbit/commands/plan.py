"""`lowbit plan`: what a target would choose, before anything is quantized."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lowbit.commands.options import (
    AsJson,
    Device,
    Model,
    TargetBpw,
    TargetSize,
    open_console,
    print_json,
    target_of,
)
from lowbit.errors import LowbitError

EXAMPLES = (
    "lowbit plan Qwen/Qwen3-8B --target-size 5.5GB",
    "lowbit plan ./my-model --target-bpw 4.25 --json",
)


def run(
    model: Model,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="The fewest bits that may be used. Default: 4, or less where the target asks for it.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        str, typer.Option(help="The only group size; auto: 32, 64, 128 and the whole row.")
    ] = "auto",
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Text to measure on, as for lowbit quantize.", show_default=False),
    ] = None,
    mix: Annotated[bool, typer.Option("--mix/--no-mix", help="As for lowbit quantize.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")] = 0,
    skip: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Modules to leave alone, as a pattern; repeatable.", show_default=False),
    ] = None,
    head_bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Quantize the output head too, to this many bits.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Working precision: auto, bfloat16, float16 or float32.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show which bits and group sizes a target would choose; writes nothing."""
    from lowbit.planning import preview
    from lowbit.terminal import progress_bar, show_choice

    target = target_of(target_bpw, target_size, bits, group_size)
    if target is None:
        raise LowbitError("lowbit plan needs a target: give --target-bpw 4.25 or --target-size 3.9GB")
    console = open_console(as_json)
    with progress_bar(console) as progress:
        choice = preview(
            model,
            target,
            dataset=dataset,
            seed=seed,
            mix=mix,
            skip=skip or (),
            head_bits=head_bits,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if as_json:
        print_json(choice.to_dict() | {"notes": choice.notes, "warnings": choice.warnings})
    else:
        show_choice(console, choice)
