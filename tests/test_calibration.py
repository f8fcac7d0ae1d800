"""What is remembered of a layer's input, against the plain product in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowbit import topology
from lowbit.calibration import find_groups, observe
from lowbit.hardware import bfloat16_products
from lowbit.moments import Moment, tile_of
from lowbit.results import Report
from tests.test_topology import LoadedBlock
from tests.tiny import FAMILIES, VOCAB

Folders = Callable[..., Path]


def second_moment(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 128, 168, 640, 1288])
def test_moment_is_the_mean_outer_product(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    mean = torch.randn(width, generator=generator)
    parts = [(torch.randn(shape, generator=generator) + mean).to(dtype)
             for shape in [(3, 5, width), (1, width), (2, 7, width)]]  # fmt: skip
    moment = Moment(width, torch.device("cpu"))
    for part in parts:
        moment.add(part)
    expected = second_moment(torch.cat([part.reshape(-1, width) for part in parts]))
    found = moment.mean()
    assert moment.tokens == 30
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert (found.double() - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(moment.mean(), found)  # asking does not change the answer


@pytest.mark.parametrize(("width", "tile"), [(64, 128), (576, 128), (896, 192), (4864, 1024), (11008, 2240)])
def test_three_fifths_of_a_moment_are_computed(width: int, tile: int) -> None:
    assert tile_of(width) == tile
    computed = sum(min(tile, width - start) * (width - start) for start in range(0, width, tile))
    assert width <= tile or computed / width**2 == pytest.approx(0.6, abs=0.02)


def test_moment_follows_a_fold() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scales = torch.randn(50, 40, generator=generator), torch.rand(40, generator=generator) + 0.5
    moment = Moment(40, torch.device("cpu"))
    moment.add(x)
    moment.rescale(scales)
    torch.testing.assert_close(
        moment.mean().double(), second_moment(x.double() / scales), rtol=1e-5, atol=1e-6
    )


def test_moment_of_nothing_is_zero() -> None:
    assert not Moment(8, torch.device("cpu")).mean().any()


def test_matrix_units_are_left_as_they_were() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with bfloat16_products():
        pass
    with pytest.raises(KeyError), bfloat16_products():
        raise KeyError
    for dtype in (torch.float32, torch.bfloat16):
        Moment(8, torch.device("cpu")).add(torch.ones(2, 8, dtype=dtype))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_equal_those_of_forward_hooks(tiny_model: Folders, family: str) -> None:
    """The inputs that hooks on the modules of the plain, whole model see."""
    folder = tiny_model(family)
    loaded = LoadedBlock(folder)
    with observe(loaded.groups):
        for _ in range(2):  # twice the same tokens: the same mean
            loaded.run()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(
                lambda _m, args, name=name: inputs.update({name: args[0].detach()})
            )
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
    hooked = 0
    for group in loaded.groups:
        for matrix in group.matrices:
            if matrix.kind == "Expert":
                continue
            hooked += 1
            expected = second_moment(inputs[matrix.module_name])
            assert group.moment.tokens == 2 * ids.numel()
            assert (group.moment.mean() - expected).norm() <= 1e-5 * expected.norm()
    assert hooked == sum(m.kind != "Expert" for m in loaded.matrices)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_count_only_the_tokens_routed_to_them(tiny_model: Folders, family: str) -> None:
    loaded = LoadedBlock(tiny_model(family))
    routed: list[Tensor] = []
    inputs: list[Tensor] = []
    experts = loaded.block.mlp.experts

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())
        routed.append(args[1])  # [tokens, experts per token]

    handle = experts.register_forward_pre_hook(hook)
    with observe(loaded.groups):
        loaded.run()
    handle.remove()
    [x], [chosen] = inputs, routed
    counts = []
    for group in loaded.groups:
        matrix = group.matrices[0]
        if matrix.kind == "Expert":
            mine = (chosen == matrix.index).any(-1)
            counts.append(group.moment.tokens)
            assert group.moment.tokens == int(mine.sum())
            if matrix.attribute == "gate_up_proj" and mine.any():
                torch.testing.assert_close(
                    group.moment.mean().double(), second_moment(x[mine]), rtol=1e-4, atol=1e-5
                )
    assert sum(counts) == 2 * 2 * len(x)  # two matrices, two experts per token
    assert len(set(counts)) > 1  # the oracle would not see a count of all tokens otherwise


def test_an_expert_that_no_token_reached_is_a_group_of_its_own(tiny_model: Folders) -> None:
    loaded = LoadedBlock(tiny_model("mixtral"))
    loaded.block.mlp.gate.weight.data.zero_()  # ties go to the first two experts
    reached: set[int] = set()
    handle = loaded.block.mlp.experts.register_forward_pre_hook(
        lambda _m, args: reached.update(args[1].unique().tolist())
    )
    groups = find_groups(loaded.matrices, loaded.run)
    handle.remove()
    assert reached < {0, 1, 2, 3}
    assert {m for g in groups for m in g.matrices} == set(loaded.matrices)
    assert all(len(g.matrices) == 1 for g in groups if g.matrices[0].kind == "Expert")
    with observe(groups):
        loaded.run()
    for group in groups:
        if group.matrices[0].index is not None and group.matrices[0].index not in reached:
            assert group.moment.tokens == 0


def test_observing_leaves_no_trace(tiny_model: Folders) -> None:
    loaded = LoadedBlock(tiny_model("llama"))
    before = loaded.run()
    attributes = {name: set(vars(module)) for name, module in loaded.block.named_modules()}
    with observe(loaded.groups):
        assert torch.equal(loaded.run(), before)
    with pytest.raises(KeyError), observe(loaded.groups):
        raise KeyError
    assert _get_current_function_mode_stack() == []
    tokens = [group.moment.tokens for group in loaded.groups]
    assert torch.equal(loaded.run(), before)
    assert [group.moment.tokens for group in loaded.groups] == tokens
    assert {name: set(vars(module)) for name, module in loaded.block.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.block.modules())


def test_equal_tensors_are_not_one_input() -> None:
    """Two inputs of equal values, and one whose memory is used again, are inputs of their own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(16, 16, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.clone())
            y = y + self.second(x.clone())
            return y + self.third(x[:, :1].expand_as(x))

    block = Block().requires_grad_(False)
    groups = find_groups(topology.matrices(block, "b"), lambda: block(torch.ones(2, 5, 16)))
    assert [[m.name for m in g.matrices] for g in groups] == [
        ["b.first.weight"],
        ["b.second.weight"],
        ["b.third.weight"],
    ]


@pytest.mark.parametrize("method", ["gptq", "qronos", "awq"])
@pytest.mark.parametrize(("skip", "inputs"), [("layers.1.*", 8), ("down_proj", 9)])
def test_what_is_skipped_is_not_observed(
    quantize: Callable[..., Report],
    tiny_model: Folders,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    skip: str,
    inputs: int,
) -> None:
    """Of three blocks with four inputs each. That activations are carried over it right is read back."""
    seen: set[int] = set()
    add = Moment.add

    def counted(self: Moment, x: Tensor) -> None:
        seen.add(id(self))
        kept.append(self)
        add(self, x)

    kept: list[Moment] = []  # or ids are used again
    monkeypatch.setattr(Moment, "add", counted)
    report = quantize(tiny_model("llama"), method=method, skip=[skip], samples=32)
    assert report.verification is not None
    corrected = method == "qronos" and skip == "down_proj"  # a writer is looked at to mend what it can
    assert len(seen) == inputs + (3 if corrected else 0)
