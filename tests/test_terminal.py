"""The summary of a run: every layer that was left out is in it, on as few lines as can be."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lowbit import QuantScheme, report, terminal
from lowbit.formats import FORMATS
from lowbit.plan import make_plan
from lowbit.results import Report
from lowbit.source import Source


def test_every_skipped_layer_is_shown(tiny_model: Callable[..., Path]) -> None:
    """Some layers of a kind have one reason, and some another."""
    model = Source(tiny_model("llama"), torch.float32).model
    skip = ["*mlp*", "model.layers.0.*"]
    plan = make_plan(model, QuantScheme(4, 32), FORMATS["compressed-tensors"], skip=skip)
    text, done = io.StringIO(), Report(Path("out"), "w4g32", "rtn", "compressed-tensors", "none")
    done.skipped, done.seconds = plan.skipped, {"all": 1.0}
    terminal.show_report(Console(file=text, width=200), done, 0)
    lines = [
        line.split("full precision  ")[1] for line in text.getvalue().splitlines() if "full precision" in line
    ]
    counts = [int(found[1]) if (found := re.search(r"\(x(\d+)\)", line)) else 1 for line in lines]
    assert sum(counts) == len(plan.skipped) == 15
    assert "model.layers.0.mlp.up_proj: --skip model.layers.0.*" in lines
    assert "model.layers.*.mlp.up_proj (x2): --skip *mlp*" in lines


@pytest.mark.parametrize(
    ("blocks", "experts", "shown"),
    [
        ([3], [5], "model.layers.3.experts.5.up: --skip a"),
        ([3], [5, 6], "model.layers.3.experts.*.up (x2): --skip a"),
        ([3, 4], [5], "model.layers.*.experts.5.up (x2): --skip a"),
        ([3, 4], [5, 6], "model.layers.*.experts.*.up (x4): --skip a"),
    ],
)
def test_a_number_that_is_the_same_in_all_is_written(
    blocks: list[int], experts: list[int], shown: str
) -> None:
    names = [f"model.layers.{block}.experts.{expert}.up" for block in blocks for expert in experts]
    assert [": ".join(line) for line in report.grouped((name, "--skip a") for name in names)] == [shown]
