"""`lowbit tune`: kernel tiles for the shapes of a checkpoint, timed on the GPU at hand."""

from __future__ import annotations

import dataclasses

from lowbit.commands.options import AsJson, Checkpoint, Device, open_console, print_json

EXAMPLES = ("lowbit tune qwen3-8b-w4", "lowbit tune my-org/my-model-w4 --device cuda:1 --json")


def run(model: Checkpoint, device: Device = "auto", as_json: AsJson = False) -> None:
    """Time the kernels' tiles for a checkpoint's shapes on this GPU, and keep the best for all later runs.

    Optional: shipped tiles are used where nothing was timed. Hopper's were timed on an H200, the others
    counted in compiled code.
    """
    from rich.table import Table

    from lowbit.terminal import progress_bar
    from lowbit.tiles import tune

    console = open_console(as_json)
    with progress_bar(console) as progress:
        found, left, path = tune(model, device, progress)
    if as_json:
        print_json({"tiles": [dataclasses.asdict(one) for one in found], "left": left, "file": str(path)})
        return
    table = Table("product", "rows", "shipped, us", "best, us", "", box=None)
    for one in found:
        gain = f"{one.shipped / one.best:.2f}x" if one.replaced else "[dim]kept"
        table.add_row(one.name, str(one.rows), f"{one.shipped:.1f}", f"{one.best:.1f}", gain)
    console.print(table)
    for note in [*left, *dict.fromkeys(reason for one in found for reason in one.dropped)]:
        console.print(f"not timed: {note}", style="dim", markup=False, soft_wrap=True)
    replaced = sum(one.replaced for one in found)
    console.print(f"{replaced} of {len(found)} tiles replaced; kept in {path}", soft_wrap=True, markup=False)
