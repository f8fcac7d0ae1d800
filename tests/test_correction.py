"""What a matrix lacks: which matrices write is known from the architecture, and sums are done by hand."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from lowbit import QuantScheme, correction
from lowbit.algorithms import CORRECTIONS
from lowbit.blocks import BlockQuantizer
from lowbit.calibration import Moment, find_groups
from lowbit.formats import FORMATS
from lowbit.plan import Plan, make_plan
from lowbit.results import Report
from lowbit.source import Source
from lowbit.stream import Stream
from lowbit.terminal import show_report

W3 = QuantScheme(3, 32)
# Gemma 3 normalizes what attention and MLP give before it is added: nothing there writes.
WRITERS = {
    "llama": {"o_proj", "down_proj"},
    "qwen2": {"o_proj", "down_proj"},
    "phi3": {"o_proj", "down_proj"},
    "phi": {"dense", "fc2"},
    "gpt2": {"c_proj"},
    "opt": {"out_proj", "fc2"},
    "gemma3": set(),
    "mixtral": {"o_proj"},
}


def opened(folder: Path, batches: int = 1) -> tuple[Source, Plan, Stream]:
    source = Source(folder, torch.float32)
    format = "gptq" if "Conv1D" in str(source.model) else "compressed-tensors"
    plan = make_plan(source.model, W3, FORMATS[format])
    source.load(source.keys_outside([plan.path]), torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    ids = list(torch.randint(3, 90, (batches, 2, 24), generator=random))
    return source, plan, Stream(source.model, plan.blocks, ids)


def summary(report: Report) -> str:
    """What `lowbit quantize` prints in the end."""
    text = io.StringIO()
    show_report(Console(file=text, width=200), report, 0)
    return text.getvalue()


@pytest.mark.parametrize("family", WRITERS)
def test_matrices_that_write_are_found(family: str, tiny_model: Callable[..., Path]) -> None:
    source, plan, stream = opened(tiny_model(family))
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    stages = correction.stages(find_groups(plan.matrices(0), lambda: stream.run(0, 0)))
    writers = correction.find_writers(stream, 0, 0, stages)
    names = {number: stages[number][0].matrices[0].module_name for number in writers}
    found = {names[number].rpartition(".")[2]: factor for number, factor in writers.items()}
    assert set(found) == WRITERS[family]
    assert all(factor == pytest.approx(1, abs=1e-4) for factor in found.values())


def test_a_residual_multiplier_is_found(tiny_model: Callable[..., Path]) -> None:
    """As in Granite: the block adds a fraction of what its matrices give."""
    source, plan, stream = opened(tiny_model("llama"))
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    mlp = plan.blocks[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: 0.25 * whole(x)  # type: ignore[method-assign]
    stages = correction.stages(find_groups(plan.matrices(0), lambda: stream.run(0, 0)))
    expected = {1: pytest.approx(1, abs=1e-4), 3: pytest.approx(0.25, abs=1e-4)}
    assert correction.find_writers(stream, 0, 0, stages) == expected


def test_the_sum_behind_a_matrix(tiny_model: Callable[..., Path]) -> None:
    source, plan, stream = opened(tiny_model("llama"))
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    block = plan.blocks[0]
    read: list[Tensor] = []
    attention: list[Tensor] = []
    block.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    block.self_attn.o_proj.register_forward_hook(lambda module, args, y: attention.append(y))
    stages = correction.stages(find_groups(plan.matrices(0), lambda: stream.run(0, 0)))
    (o_proj,) = stages[1][0].matrices
    seen, carried = correction.sum_behind(stream, 0, 0, stages[1:])
    assert torch.equal(carried, read[-1] + attention[-1])
    assert torch.allclose(seen[o_proj] @ o_proj.weight.T, attention[-1], atol=1e-5)
    gate = stages[2][0].matrices[0]
    assert torch.allclose(seen[gate], block.post_attention_layernorm(carried), atol=1e-5)


def test_what_is_carried_on_is_mended(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last block, on the calibration tokens, the original is nearer than with no correction."""

    def distance() -> float:
        source, plan, stream = opened(folder, 9)
        tokens = stream.batches
        stream = Stream(source.model, plan.blocks, [*tokens, tokens[0][:1], *tokens])
        cpu, told = torch.device("cpu"), lambda *told: None
        for _ in BlockQuantizer(source, plan, stream, "qronos", torch.bfloat16, cpu, told):
            pass
        hidden = [stream.hidden[number] for number in range(19)]
        own, twins = torch.cat(hidden[:9]), torch.cat(hidden[10:])  # type: ignore[arg-type]
        return float((own - twins).square().mean() / twins.square().mean())

    folder = tiny_model("llama")
    mended = distance()
    monkeypatch.setitem(CORRECTIONS, "qronos", lambda weight, *told: (weight, 0.0))
    assert mended < 0.9 * distance()


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_every_token_is_counted_once(
    family: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where attention and MLP stand side by side (phi), two matrices that write follow each other."""
    source, plan, stream = opened(tiny_model(family), 3)
    tokens = stream.batches
    stream = Stream(source.model, plan.blocks, [*tokens, tokens[0][:1], *tokens])
    counted = []
    release = Moment.release
    monkeypatch.setattr(Moment, "release", lambda self: (counted.append(self.tokens), release(self))[1])
    quantizer = BlockQuantizer(
        source, plan, stream, "qronos", torch.bfloat16, torch.device("cpu"), lambda *told: None
    )
    next(iter(quantizer))
    assert set(counted) == {3 * 48}


def test_the_summary_says_how_much_is_corrected(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[float] = []
    correct = CORRECTIONS["qronos"]

    def told(*args: Any) -> tuple[Tensor, float]:
        weight, factor = correct(*args)
        factors.append(factor)
        return weight, factor

    monkeypatch.setitem(CORRECTIONS, "qronos", told)
    report = quantize(tiny_model("llama"), method="qronos", samples=32)
    found = {layer.name.rpartition(".")[2] for layer in report.layers if layer.corrected is not None}
    assert found == WRITERS["llama"]
    assert [layer.corrected for layer in report.layers if layer.corrected is not None] == factors
    mean = sum(factors) / len(factors)
    line = f"{len(factors)} layers for the ones before, by {mean:.0%} of the fit"
    assert line in summary(Report.of_json(report.to_json()))
    other = quantize(tiny_model("llama"), output=report.output.parent / "gptq", method="gptq")
    assert "for the ones before" not in summary(other)
