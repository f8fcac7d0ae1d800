"""`lowbit push`: a checkpoint to the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lowbit.commands.options import AsJson, open_console, print_json

EXAMPLES = (
    "lowbit push qwen3-8b-w4 my-org/qwen3-8b-w4 --dry-run",
    "lowbit push qwen3-8b-w4 my-org/qwen3-8b-w4 --private",
)


def run(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: org/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would go; needs no network.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint with its model card and report to the Hugging Face Hub."""
    from lowbit.push import push
    from lowbit.terminal import show_upload

    done = push(folder, repo_id, private=private, dry_run=dry_run)
    if as_json:
        print_json(dataclasses.asdict(done) | {"bytes": done.bytes})
    else:
        show_upload(open_console(), done)
