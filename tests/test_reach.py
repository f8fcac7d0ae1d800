"""Tokens weighed by what reads them: which matrices later tokens read is known from the architecture."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit import QuantScheme, reach
from lowbit.calibration import Group, find_groups, observe
from lowbit.formats import FORMATS
from lowbit.plan import Plan, make_plan
from lowbit.source import Source
from lowbit.stream import Stream

Folders = Callable[..., Path]
LENGTH = 24
READ_LATER = {  # the first matrix of each group that keys or values are made of
    "llama": {"q_proj"},
    "qwen2": {"q_proj"},
    "phi3": {"qkv_proj"},
    "phi": {"q_proj"},
    "gpt2": {"c_attn"},
    "opt": {"k_proj", "q_proj", "v_proj"},
    "gemma3": {"q_proj"},
    "mixtral": {"q_proj"},
}


def opened(folder: Path) -> tuple[Source, Plan, Stream]:
    source = Source(folder, torch.float32)
    format = "gptq" if "Conv1D" in str(source.model) else "compressed-tensors"
    plan = make_plan(source.model, QuantScheme(4, 32), FORMATS[format])
    source.load(source.keys_outside([plan.path]), torch.device("cpu"))
    source.load(source.keys_under([f"{plan.path}.0"]), torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, shape, generator=random) for shape in ((3, LENGTH), (1, 7))]
    return source, plan, Stream(source.model, plan.blocks, ids)


def weighed_groups(plan: Plan, stream: Stream) -> list[Group]:
    groups = find_groups(plan.matrices(0), lambda: stream.run(0, 1))
    reach.weigh(stream, 0, 1, groups)
    return groups


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("length", [2, 24, 512, 4096])
def test_places_count_for_one_on_average(length: int) -> None:
    weights = reach.places(length).double()
    assert float(weights.mean()) == pytest.approx(1, rel=1e-6)
    assert float(weights[0]) == pytest.approx(reach.FIRST * length)
    ratio = weights[2:] / weights[1:-1]
    place = torch.arange(2, length, dtype=torch.float64)
    assert torch.allclose(ratio, ((place + 1) / place) ** -reach.DECAY, rtol=1e-5)


@pytest.mark.parametrize("family", READ_LATER)
def test_what_later_tokens_read_is_found(family: str, tiny_model: Folders) -> None:
    _, plan, stream = opened(tiny_model(family))
    found = {last(g.matrices[0].module_name) for g in weighed_groups(plan, stream) if g.weights is not None}
    assert found <= READ_LATER[family]
    assert found


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second one reads flat rows
def test_a_weighed_moment_is_the_weighed_mean(family: str, tiny_model: Folders) -> None:
    source, plan, stream = opened(tiny_model(family))
    groups = weighed_groups(plan, stream)
    kept: dict[str, Tensor] = {}
    hooks = []
    for name, module in source.model.named_modules():
        if name in {group.matrices[0].module_name for group in groups}:

            def keep(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                kept[name] = args[0].detach().reshape(3, LENGTH, -1).double()

            hooks.append(module.register_forward_pre_hook(keep))
    with observe(groups):
        stream.run(0, 0)
    for hook in hooks:
        hook.remove()
    for group in groups:
        x = kept[group.matrices[0].module_name]
        weights = torch.ones(LENGTH) if group.weights is None else reach.places(LENGTH)
        wanted = torch.einsum("rti,rtj,t->ij", x, x, weights.double()) / (3 * LENGTH)
        assert torch.allclose(group.moment.mean().double(), wanted, rtol=1e-4, atol=1e-6)
    assert len({group.weights is None for group in groups}) == 2


def test_an_output_of_other_tokens_has_no_places() -> None:
    """A matrix over pooled tokens: nothing is put in its output's place, so nothing seems to read it."""
    for output in (torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(40, 4)):
        assert torch.equal(reach._changed(output, 2, 10), output)
    for output in (torch.randn(2, 10, 4), torch.randn(20, 4), torch.randn(10, 2, 4).transpose(0, 1)):
        found = reach._changed(output, 2, 10)
        assert found.shape == output.shape
        changed = (found != output).view(2, 10, 4).any(-1)
        assert changed[:, 0].all()
        assert not changed[:, 1:].any()


def test_what_a_writer_lacks_is_weighed_as_its_input_is() -> None:
    """Least squares on weighed tokens: inputs and gaps must be weighed alike."""
    x, gap = torch.randn(2, 3, 4), torch.randn(6, 5)
    group = Group(x)
    group.weights = torch.tensor([4.0, 1.0, 0.25])
    group.lacks(x, gap, held_out=False)
    assert group.drift is not None
    wanted = torch.einsum("rto,rti,t->oi", gap.view(2, 3, 5), x, group.weights)
    assert torch.allclose(group.drift.total, wanted, atol=1e-5)


def test_the_table_of_places(
    tiny_model: Folders, text_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    script = importlib.import_module("token_places")
    share, *means = script.by_place(torch.tensor([[6.0, 3.0, 1.0, 1.0, 1.0]]), (1, 2, 5))
    assert (share, means) == (0.5, [2.0, pytest.approx(2 / 3)])
    words = ["--calibration", text_file, "--samples", "2", "--seq-len", "16"]
    monkeypatch.setattr(sys, "argv", ["token_places.py", str(tiny_model("llama")), *words])
    script.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| matrices | share of the first | 2 to 2 | 3 to 5 | 6 to 11 | 12 to 16 |"
    found = {row.split(" | ")[0][2:]: float(row.split(" | ")[1]) for row in rows}
    assert list(found) == list(script.MATRICES)
    assert found["q"] == 0 < found["v"] < 1  # a softmax over a single key has no slope
