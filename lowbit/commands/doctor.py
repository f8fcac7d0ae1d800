"""`lowbit doctor`: what works on this machine, and why the rest doesn't."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from lowbit.commands.options import AsJson, open_console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from lowbit.doctor import Diagnosis, Finding

EXAMPLES = ("lowbit doctor", "lowbit doctor --json")


def run(as_json: AsJson = False) -> None:
    """Show versions, devices, kernels and formats, and what to do about those that don't work here.

    Exit code 0: quantize, load and eval work here. 1: something that they need is missing or broken.
    """
    from lowbit.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(dataclasses.asdict(found) | {"healthy": found.healthy})
    else:
        _show(found)
    raise typer.Exit(0 if found.healthy else 1)


def _show(found: Diagnosis) -> None:
    """One table per question. Not in `terminal.py`, which needs a torch that can be imported."""
    console = open_console()
    versions = _table("versions")
    versions.add_row("", "python", f"{found.python} on {found.system}")
    for name, version in found.versions.items():
        missing = "[dim]a checkout that is not installed[/]" if name == "lowbit" else "[dim]not installed[/]"
        versions.add_row("", name, version or missing)
    devices = _table("devices")
    for device in found.devices:
        memory = f"{device.memory / 1e9:.1f} GB, {device.free / 1e9:.1f} GB free"
        devices.add_row("", device.name, f"{device.model}; {' '.join(device.features)}; {memory}")
    console.print(versions, devices)
    for title in ("kernels", "formats", "extras", "libraries"):
        findings: list[Finding] = getattr(found, title)
        table = _table(title)
        for finding in findings:
            mark = "[green]yes[/]" if finding.usable else "[red]NO[/]" if finding.needed else "[yellow]no[/]"
            table.add_row(mark, finding.name, finding.detail.replace("[", r"\["))
        if findings:
            console.print(table)
    verdict = "[green]quantize, load and eval work here" if found.healthy else "[red]not usable: see NO above"
    console.print(verdict)


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(min_width=3)
    table.add_column(min_width=20, no_wrap=True)
    table.add_column(overflow="fold")
    return table
