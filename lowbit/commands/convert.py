"""`lowbit convert`: a quantized checkpoint in another format."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from lowbit.commands.options import AsJson, open_console, print_json

EXAMPLES = (
    "lowbit convert org/model-GPTQ my-model --format compressed-tensors",
    "lowbit convert my-model-w4 my-model-w4.gguf",
    "lowbit convert my-model-w8 my-model-awq --format awq --lossy",
)


class Target(str, Enum):
    """Formats that can be written."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    gptq_v2 = "gptq-v2"
    awq = "awq"
    gguf = "gguf"


def run(
    source: Annotated[
        str, typer.Argument(help="Hub id or folder of a quantized checkpoint, anyone's.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(help="Folder to create, or a file that ends in .gguf.", show_default=False)
    ],
    format: Annotated[
        Optional[Target],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(help="Format on disk; gguf where the output ends in .gguf.", show_default=False),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Round again what the format can't hold exactly.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Size of a safetensors shard.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Move a quantized model to another format, with the same codes, scales and zeros."""
    from lowbit.conversion import convert
    from lowbit.terminal import progress_bar, show_conversion

    console = open_console(as_json)
    with progress_bar(console) as progress:
        result = convert(
            source,
            output,
            format and format.value,
            lossy=lossy,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        show_conversion(console, result)
