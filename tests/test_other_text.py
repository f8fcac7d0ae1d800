"""The script that judges rounding on other texts: what it prints is what rounding and moments say by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests import script

ROOT = Path(__file__).parents[1]


def test_every_variant_is_judged_on_every_text(
    tiny_model: Callable[..., Path], text_file: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(Path(text_file).read_text())))
    done = script.run(
        ROOT / "scripts" / "other_text.py", tiny_model("llama"), "--calibration", text_file,
        "--text", text_file, other, "--blocks", 0, 1, "--bits", 3, "--group-size", 32, "--seq-len", 48,
        "--samples", 12, "--rows", 8,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    head, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert head == ["damp", "trust", "text", "text", "other"]
    figures = {(row[0], row[1]): [float(value) for value in row[2:]] for row in rows}
    assert len(figures) == 10
    assert all(0 < values[0] < 1 for values in figures.values())  # GPTQ beats nearest where it looks
    # The less it looks, the more it loses there.
    assert figures["0.03", "1"][0] < figures["1", "1"][0]
    assert figures["0.1", "0.9"][0] < figures["0.1", "0.6"][0]


def test_a_few_tokens_do_not_decide() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from other_text import lost, usual
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    x = torch.ones(6, 4)
    x[3] = 100
    assert usual(x).shape == (4, 4)  # without the first and the huge one
    assert lost(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.diag(torch.tensor([3.0, 5.0]))) == 23
