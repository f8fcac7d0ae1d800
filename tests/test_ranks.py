"""Several processes on one model: the same checkpoint as one makes, and an end when one of them is lost.

The oracle is a run of one process. Sums over tokens are added in another order by two, so a code that lies
on the boundary between two may fall to the other side: how many do is bounded here, with products in
float32 on every machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import QuantScheme, formats, hf, ranks
from lowbit.results import Report
from lowbit.rounding import deal
from tests.test_resume import bytes_of

ROOT = Path(__file__).parents[1]
DIFFERING = 2e-3
"""Of the codes: those that fall to the other side, and those after them in a row, which make up for it."""

RUNS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "head_bits": 4},
    "qronos": {"method": "qronos"},
    "experts": {"family": "mixtral", "method": "qronos"},
    "awq": {"family": "gemma3", "method": "awq"},
    "w8a8": {"scheme": (8, -1, True, 8), "method": None},
    "rtn": {"method": "rtn", "head_bits": 8},
    "trained": {"method": "gptq", "effort": "high", "samples": 32},
}


def ranks_of(*runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each rank, one for each list of runs; see `tests.rank`."""
    command = [sys.executable, "-m", "tests.rank", json.dumps(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process multiplies as the ranks do."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


@pytest.fixture(scope="module")
def arguments(tiny_model: Callable[..., Path], text_file: str) -> Callable[..., dict[str, Any]]:
    """Arguments of one run, for `tests.rank`."""

    def of(output: Path, family: str = "llama", **own: Any) -> dict[str, Any]:
        usual = {"scheme": (4, 32), "dataset": text_file, "samples": 16, "seq_len": 48}
        return {"model": str(tiny_model(family)), "output": str(output), **usual, **own}

    return of


@pytest.fixture
def options(arguments: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The same, for an output of this test."""
    return lambda output, **own: arguments(tmp_path / output, **own)


@pytest.fixture(scope="module")
def two(
    arguments: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of every run by two ranks, and of one made again, and what became of the ranks."""
    folder = tmp_path_factory.mktemp("two")
    runs = [arguments(folder / name, **own) for name, own in RUNS.items()]
    runs.append(arguments(folder / "again", **RUNS["qronos"]))
    return folder, ranks_of(runs, runs)


@pytest.fixture
def alone(quantize: Callable[..., Report]) -> Callable[[dict[str, Any]], Report]:
    """One process makes what the arguments for a rank say."""
    return lambda given: quantize(**{**given, "scheme": QuantScheme(*given["scheme"])})


def codes_of(folder: Path) -> dict[str, torch.Tensor]:
    """All codes of a checkpoint, by layer."""
    quantization, fmt = hf.quantization_of(folder)
    assert fmt is not None
    found = {}
    for name, tensors in hf.layers(folder, fmt):
        if not isinstance(tensors, torch.Tensor):
            weight, _ = formats.read(fmt, tensors, fmt.read_config(quantization, name), quantization)
            found[name] = weight.codes
    return found


def differing(one: Path, other: Path) -> float:
    """Part of the codes that differ."""
    a, b = codes_of(one), codes_of(other)
    assert a.keys() == b.keys()
    assert a
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(codes.numel() for codes in a.values())


@pytest.mark.slow
def test_two_ranks_make_what_one_makes(
    two: tuple[Path, list[dict[str, Any]]], options: Callable[..., dict[str, Any]],
    alone: Callable[[dict[str, Any]], Report], tmp_path: Path,
) -> None:  # fmt: skip
    folder, (first, second) = two
    assert (first["code"], second["code"]) == (0, 0), first["stderr"] + second["stderr"]
    assert first["told"] == second["told"]
    for (name, own), found in zip(RUNS.items(), first["told"], strict=False):
        alone(options(name, **own))
        if name == "rtn":
            assert bytes_of(tmp_path / name) == bytes_of(folder / name)
        assert differing(tmp_path / name, folder / name) <= DIFFERING, name
        assert len(found["ranks"]) == 2
        assert found["ranks"][1]["sent"] > 0
        trained = [note for note in found["notes"] if "on the first of 2 ranks alone" in note]
        assert bool(trained) == (name == "trained")
    assert bytes_of(folder / "again") == bytes_of(folder / "qronos")
    assert not list(folder.glob("*.lowbit-work"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_others_and_the_run_goes_on(
    two: tuple[Path, list[dict[str, Any]]], options: Callable[..., dict[str, Any]],
    alone: Callable[[dict[str, Any]], Report], tmp_path: Path, victim: int,
) -> None:  # fmt: skip
    """Killed in the second block; gone on with once by two and once by one."""
    whole, own = two[0] / "qronos", RUNS["qronos"]
    dying = options("out", die=(victim, "block 2/3: carrying on"), **own)
    found = ranks_of([dying], [dying])
    left, work = found[1 - victim], tmp_path / "out.lowbit-work"
    assert (found[victim]["code"], left["code"]) == (-9, 2), left["stderr"]
    assert not (tmp_path / "out").exists()
    if victim == 1:
        assert (left["error"], left["line"], left["kept"]) == ("ConnectionError", ranks.LOST, str(work))
    else:
        assert (left["error"], left["line"]) == ("Stopped", f"rank 1: {ranks.LOST}")
    assert json.loads((work / "state.json").read_text())["facts"]["blocks"] == 1

    shutil.copytree(work, tmp_path / "other.lowbit-work")
    told = ranks_of([options("out", **own)], [options("out", **own)])
    assert [rank["code"] for rank in told] == [0, 0], told[0]["stderr"]
    alone(options("other", **own))
    assert bytes_of(tmp_path / "out") == bytes_of(whole)
    assert differing(tmp_path / "other", whole) <= DIFFERING


@pytest.mark.slow
def test_torchrun(options: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The command of the documentation: one summary, one checkpoint; a refusal is one line."""
    given = options("out")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lowbit", "quantize",
        given["model"], "--output", given["output"], "--dataset", given["dataset"], "--group-size", "32",
        "--samples", "16", "--seq-len", "48",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert "2 ranks" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = subprocess.run(
        [*command, "--overwrite", "--max-memory", "8GB"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("lowbit: ")]
    assert lines == ["lowbit: --max-memory 8GB is planned for one process: drop it, or torchrun"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_ranks_that_differ_are_refused(options: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Another seed on another machine would make one half of each."""
    told = ranks_of(*[[options("out", seed=seed)] for seed in (0, 1)])
    assert [rank["code"] for rank in told] == [2, 2]
    assert "has another seed than rank" in told[0]["line"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("costs", "ranks_", "teams"),
    [
        ([5, 1, 1, 3], 2, [[0], [1], [1], [1]]),
        ([1, 1], 3, [[0, 1, 2], [0, 1, 2]]),
        ([2, 7], 1, [[0], [0]]),
        ([30, 7, 4, 2], 2, [[0, 1], [0], [1], [1]]),
        ([1, 1, 1], 3, [[0], [1], [2]]),
    ],
)
def test_work_is_dealt_by_cost(
    monkeypatch: pytest.MonkeyPatch, costs: list[float], ranks_: int, teams: list[list[int]]
) -> None:
    monkeypatch.setattr(ranks, "size", lambda: ranks_)
    assert deal(costs) == teams


def test_one_process_hands_itself_what_it_has() -> None:
    tensor = torch.ones(3)
    assert ranks.handed([tensor], 0, tensor.device)[0] is tensor
    assert ranks.told("x") == "x"
    assert ranks.gathered(2) == [2]
    assert list(ranks.share(3)) == [0, 1, 2]
    ranks.add(tensor, [0])
    assert tensor.tolist() == [1, 1, 1]
    assert ranks.first_does(lambda: "done") == "done"
