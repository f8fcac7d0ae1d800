"""The ablation: steps differ where they should, and the table is the mean over seeds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import script

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def ablation() -> Iterator[ModuleType]:
    """The script as a module; scripts stand on the path of the interpreter that runs them."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("ablation")
    sys.path.remove(str(SCRIPTS))
    for name in ("ablation", "compare_peers", "peer_runs", "peer_table"):
        sys.modules.pop(name, None)


def run(step: str, seed: int, kl: float, dtype: str = "float32") -> dict[str, Any]:
    return {
        "model": "m", "scheme": "w4g64", "step": step, "seed": seed, "cpu_seconds": 10.0 * (seed + 1),
        "settings": {"samples": 32, "seq_len": 512, "dtype": dtype},
        "texts": {"wiki": {"kl": kl, "perplexity_ratio": 1.1}},
    }  # fmt: skip


def test_a_row_is_the_mean_over_seeds_with_its_standard_error(ablation: ModuleType) -> None:
    first, second = list(ablation.STEPS)[:2]
    table = ablation.table([run(second, 0, 0.1), run(first, 0, 0.3), run(second, 1, 0.2)])
    title, _, _, _, *rows = table.splitlines()
    assert title == "**m, w4g64, 32 x 512 tokens, 2 seeds, in float32**"
    assert rows == [
        f"| {first} | 0.3000 | 1.100 | 10 |",
        f"| {second} | 0.1500 ± 0.0500 | 1.100 ± 0.000 | 15 |",  # sd 0.0707 over the root of 2
    ]


def test_one_seed_is_one(ablation: ModuleType) -> None:
    title = ablation.table([run(next(iter(ablation.STEPS)), 5, 0.1)]).splitlines()[0]
    assert title == "**m, w4g64, 32 x 512 tokens, 1 seed, in float32**"


def test_precisions_are_not_mixed(ablation: ModuleType) -> None:
    first = next(iter(ablation.STEPS))
    table = ablation.table([run(first, 0, 0.1), run(first, 1, 0.2, "bfloat16")])
    assert [line[-13:] for line in table.splitlines() if line.startswith("**")] == [
        " in float32**",
        "in bfloat16**",
    ]


def test_a_record_of_no_step_is_refused(ablation: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no step of today"):
        ablation.table([run("+ magic", 0, 0.1)])


@pytest.mark.slow
def test_steps_are_what_they_say(tiny_model: Callable[..., Path], text_file: str, tmp_path: Path) -> None:
    """GPTQ in column order with min-max ranges, and with its ranges searched: other weights."""
    results = tmp_path / "results.jsonl"
    for _ in range(2):  # the second call repeats nothing
        done = script.run(
            SCRIPTS / "ablation.py", tiny_model("llama"), "--group-size", 32, "--calibration", text_file,
            "--text", f"{text_file}:2", "--eval-seq-len", 48, "--seq-len", 48, "--samples", 4, "--seeds", 3,
            "--steps", 1, 3, "--results", results, cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.stderr
    runs = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r["scheme"] for r in runs] == ["w4g32"] * 2
    assert len({r["texts"][Path(text_file).stem]["kl"] for r in runs}) == 2
