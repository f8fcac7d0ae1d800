"""A block cut in two gives the bytes of a block run whole, and is cut only where that is so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit import correction, pair, road
from lowbit.blocks import UNCUT
from lowbit.calibration import find_groups
from lowbit.carried import Carried
from lowbit.halves import Halves, find_halves
from lowbit.pair import Pair
from lowbit.results import Report
from lowbit.stream import Stream
from tests.test_correction import opened

# Attention and MLP read one norm in phi; in gemma3 nothing writes; OPT's fc1 and fc2 lie in the block itself.
HALVES = {
    "llama": ("self_attn", "mlp", True, True),
    "qwen2": ("self_attn", "mlp", True, True),
    "phi3": ("self_attn", "mlp", True, True),
    "gpt2": ("attn", "mlp", True, True),
    "opt": ("self_attn", None, True, False),
    "mixtral": ("self_attn", None, True, False),
    "phi": None,
}


def cut_of(folder: Path) -> tuple[str, str | None, bool, bool] | None:
    """Names of the halves of the first block, and is the result of each that of its last matrix?"""
    source, plan, stream = opened(folder)
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    stages = correction.stages(find_groups(plan.matrices(0), lambda: stream.run(0, 0)))
    writers = correction.find_writers(stream, 0, 0, stages)
    cut = find_halves(stream, 0, 0, stages, min(writers))
    names = {module: name for name, module in plan.blocks[0].named_modules()}
    if cut is None:
        return None
    tail = names[cut.tail.module] if cut.tail else None
    return names[cut.head.module], tail, cut.head_direct, cut.tail_direct


@pytest.mark.parametrize("family", HALVES)
def test_halves_are_found(family: str, tiny_model: Callable[..., Path]) -> None:
    assert cut_of(tiny_model(family)) == HALVES[family]


def test_the_sum_stands_in_for_the_input(tiny_model: Callable[..., Path]) -> None:
    """On tokens that it was not tried on; and the head's weights do not matter any more."""
    source, plan, stream = opened(tiny_model("llama"), 2)
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    block = plan.blocks[0]
    stages = correction.stages(find_groups(plan.matrices(0), lambda: stream.run(0, 0)))
    cut = find_halves(stream, 0, 0, stages, 1)
    assert isinstance(cut, Halves)
    whole, gate = stream.run(0, 1), stages[2][0].matrices[0]
    read: list[Tensor] = []
    block.mlp.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    stream.run(0, 1)
    seen, carried = cut.sum_behind(stream, 0, 1, stages[1:])
    assert torch.equal(seen[gate], read[0])
    for parameter in block.self_attn.parameters():
        if parameter is not block.self_attn.o_proj.weight:
            parameter.data.fill_(torch.nan)
    known = seen[stages[1][0].matrices[0]]
    assert torch.equal(cut.sum_behind(stream, 0, 1, stages[1:], known)[1], carried)
    with cut.head.silent():
        assert torch.equal(stream.run(0, 1, read=carried), whole)
    assert stream.run(0, 1).isnan().all()


def test_a_tail_that_is_refused_is_not_run(tiny_model: Callable[..., Path]) -> None:
    """An MLP that changes its input first reads something else than its first matrices do."""
    source, plan, stream = opened(tiny_model("llama"), 2)
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    mlp = plan.blocks[0].mlp
    usual = type(mlp)
    mlp.__class__ = type("Scaled", (usual,), {"forward": lambda self, x: usual.forward(self, x * 2)})
    stages = correction.stages(find_groups(plan.matrices(0), lambda: stream.run(0, 0)))
    cut = find_halves(stream, 0, 0, stages, 1)
    assert cut is not None
    assert (cut.tail, cut.head_direct, cut.tail_direct) == (None, True, False)


@pytest.mark.parametrize(
    ("family", "method", "blocks"),
    [("llama", "qronos", 0), ("mixtral", "qronos", 0), ("phi", "qronos", 3), ("gemma3", "qronos", 4),
     ("phi", "gptq", 0)],
)  # fmt: skip
def test_blocks_that_ran_whole_are_named_once(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path], family: str, method: str, blocks: int
) -> None:
    """Where that takes longer: where nothing is corrected, every block runs whole."""
    report = quantize(tiny_model(family), method=method, verify_output=False)
    told = [note for note in report.notes if note.startswith(UNCUT)]
    assert told == ([f"{UNCUT} (x{blocks})"] if blocks else [])


def test_a_block_without_a_second_half_has_nothing_to_cut(tiny_model: Callable[..., Path]) -> None:
    source, plan, stream = opened(tiny_model("llama"), 2)
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    matrices = plan.matrices(0)
    groups = find_groups(matrices, lambda: stream.run(0, 0))
    parts = groups, groups[:1], groups[2:]  # all, what reads alone, an MLP alone
    assert not any(Pair(stream, 0, 0, [], matrices, part).uncut for part in parts)


@pytest.mark.parametrize(
    ("family", "limit", "kept"),
    [*((family, limit, 2**30) for family in ("llama", "gpt2", "opt", "mixtral") for limit in (None, 0)),
     ("llama", None, 30_000)],
)  # fmt: skip
def test_no_byte_depends_on_it(
    quantize: Callable[..., Report],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    limit: int | None,
    kept: int,
) -> None:
    """Nor on whether what a writer read is kept, which it is not where memory is limited."""
    monkeypatch.setattr(pair, "KEPT_BYTES", kept)
    monkeypatch.setattr(road, "Carried", lambda count, in_memory, folder: Carried(count, limit, folder))
    options = {"method": "qronos", "samples": 12, **({"format": "gptq"} if family == "gpt2" else {})}
    found: list[Halves | None] = []

    def counted(*args: object) -> Halves | None:
        found.append(find_halves(*args))  # type: ignore[arg-type]
        return found[-1]

    direct: list[int] = []
    output_behind = Halves.output_behind

    def noted(self: Halves, stream: Stream, block: int, batch: int, *rest: Tensor) -> Tensor:
        if len(rest) == 2:  # not where a block is tried
            direct.append(batch)
        return output_behind(self, stream, block, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Halves, "output_behind", noted)
    monkeypatch.setattr(pair, "find_halves", counted)
    cut = quantize(tiny_model(family, blocks=2), output=tmp_path / "cut", **options)
    assert found
    assert all(found)
    batches = 12 * 2 if limit is None and family in ("llama", "gpt2") else 0
    assert len(direct) == batches if kept > 30_000 else 0 < len(direct) < batches
    monkeypatch.setattr(pair, "find_halves", lambda *args: None)
    whole = quantize(tiny_model(family, blocks=2), output=tmp_path / "whole", **options)
    one, other = (load_file(report.output / "model.safetensors") for report in (cut, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
