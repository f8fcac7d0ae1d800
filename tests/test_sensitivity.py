"""What a group costs: gradients against one backward pass over the whole model, prices against the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit import QuantScheme, grid, hf
from lowbit.algorithms import gptq
from lowbit.calibration import find_groups
from lowbit.dataset import pack_tokens
from lowbit.formats import FORMATS, compressed_tensors
from lowbit.plan import make_plan
from lowbit.sensitivity import Sensitivity, Traffic, _carried, _upstream, measure
from lowbit.source import Source
from lowbit.stream import Stream
from tests.tiny import TEXT

CPU = torch.device("cpu")
W4, W8, ROW = QuantScheme(4, 32), QuantScheme(8, 32), QuantScheme(4, -1)


@pytest.fixture(scope="module")
def rows(tiny_model: Callable[..., Path]) -> Tensor:
    return pack_tokens([TEXT * 4], hf.load_tokenizer(tiny_model("llama")), 12, 64, 0)


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "phi3"])
def test_block_by_block_is_one_backward_pass(
    tiny_model: Callable[..., Path], rows: Tensor, family: str
) -> None:
    """The squares of every layer's gradient are those of autograd on the whole model, same draws."""
    folder, rows = tiny_model(family), rows[:3, :40]
    model, random = whole(folder), torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def remember(name: str, gradient: Tensor) -> None:
        found[name] = found.get(name, torch.zeros(1)) + gradient.flatten(0, -2).square().sum(0)

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            module.register_forward_hook(
                lambda m, i, out, name=name: out.register_hook(lambda g: remember(name, g)) and None
            )
    for row in rows:
        logits = model(row[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()

    source = Source(folder, torch.float32)
    plan = make_plan(source.model, W4, FORMATS["gptq"])
    stream = Stream(source.model, plan.blocks, [row[None] for row in rows])
    source.load(source.keys_outside([]), CPU)
    source.model.requires_grad_(False)
    inputs = []
    for number in range(len(plan.blocks)):
        inputs.append(list(stream.hidden))
        list(stream.advance(number))
    upstream, seen = _upstream(stream, CPU), 0
    for number in reversed(range(len(plan.blocks))):
        stream.hidden = _carried(inputs.pop())
        groups = find_groups(plan.matrices(number), lambda n=number: stream.run(n, 0))
        with Traffic(groups, False) as traffic:
            for batch, gradient in enumerate(upstream):
                upstream[batch] = stream.backward(number, batch, gradient)
        for matrix, squares in traffic.gradients.items():
            assert traffic.tokens[matrix] == rows.numel()
            torch.testing.assert_close(squares, found[matrix.module_name], rtol=2e-3, atol=1e-6)
            seen += 1
    assert seen == len(found)
    assert all(parameter.grad is None for parameter in source.model.parameters())


@torch.no_grad()
def real_kl(model: PreTrainedModel, group: Sensitivity, scheme: QuantScheme, ids: Tensor) -> float:
    """The divergence of the model with one group rounded to nearest."""
    before = model(ids).logits.log_softmax(-1)
    kept = {name: model.get_submodule(name).weight.data for name in group.names}
    for name, weight in kept.items():
        scales, zeros = grid.find_params(weight, scheme, torch.bfloat16)
        codes = grid.quantize(weight, scales, zeros, scheme)
        model.get_submodule(name).weight.data = grid.dequantize(codes, scales, zeros, scheme)
    after = model(ids).logits.log_softmax(-1)
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight
    return float((before.exp() * (before - after)).sum(-1).mean())


def prices(
    folder: Path, rows: Tensor, *schemes: QuantScheme, compensated: bool = False, skip: tuple[str, ...] = ()
) -> list[Sensitivity]:
    source = Source(folder, torch.float32)
    plan = make_plan(source.model, W4, compressed_tensors, skip=skip)
    groups, _ = measure(
        source, plan, rows, lambda width: list(schemes), torch.bfloat16, compensated, CPU, lambda *told: None
    )
    assert all(parameter.is_meta for parameter in source.model.parameters())
    return groups


def test_the_price_is_near_the_truth(tiny_model: Callable[..., Path], rows: Tensor) -> None:
    groups, model = prices(tiny_model("llama"), rows, W4, W8, ROW), whole(tiny_model("llama"))
    assert [len(group.names) for group in groups] == 3 * [3, 1, 2, 1]
    for scheme in (W4, ROW):
        real = torch.tensor([real_kl(model, group, scheme, rows) for group in groups])
        told = torch.tensor([group.kl[scheme] for group in groups])
        ranks = torch.stack([real.argsort().argsort(), told.argsort().argsort()]).float()
        assert torch.corrcoef(ranks)[0, 1] > 0.8
        assert 0.5 < told.sum() / real.sum() < 2
    for group in groups:  # 16 times finer, and 256 times less lost
        assert group.kl[W4] / group.kl[W8] == pytest.approx(256, rel=0.3)
        assert group.kl[ROW] > group.kl[W4]


def test_compensation_makes_all_of_it_cheaper(tiny_model: Callable[..., Path], rows: Tensor) -> None:
    plain = prices(tiny_model("llama"), rows, W4)
    cheaper = prices(tiny_model("llama"), rows, W4, compensated=True)
    for one, other in zip(plain, cheaper, strict=True):
        assert one.names == other.names
        assert 0 < other.kl[W4] < 1.2 * one.kl[W4]  # damping adds a little


def test_experts_are_one_choice(tiny_model: Callable[..., Path], rows: Tensor) -> None:
    groups = prices(tiny_model("mixtral"), rows, W4)
    (experts,) = [group for group in groups if "experts" in group.names[0]]
    assert len(experts.names) == 3 * 4 * 2
    assert experts.kl[W4] > 0
    assert [len(group.names) for group in groups if group is not experts] == 3 * [3, 1]


def test_what_is_skipped_has_no_price(tiny_model: Callable[..., Path], rows: Tensor) -> None:
    groups = prices(tiny_model("llama"), rows, W4, skip=("k_proj", "layers.1.*"))
    assert [group.names[0].removeprefix("model.layers.") for group in groups] == [
        f"{block}.{name}"
        for block in (0, 2)
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]


def test_residuals_are_the_variances_that_columns_leave(rows: Tensor) -> None:
    """Of independent columns nothing is predicted; of equal ones only the first to be rounded pays."""
    independent = torch.diag(torch.tensor([4.0, 1.0, 2.0]))
    found = gptq.residuals(independent, 10**9, damp=0.0, trust=1.0)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    hessian = random.T @ random / 500
    found = gptq.residuals(hessian, 500, damp=0.0, trust=1.0)
    assert found is not None
    order = hessian.diagonal().argsort(descending=True).tolist()
    for position, column in enumerate(order):
        later = order[position + 1 :]
        target, others = random[:, [column]], random[:, later]
        left = target - others @ torch.linalg.lstsq(others, target).solution if later else target
        unbiased = float(left.square().sum()) / (500 - len(later))
        assert float(found[column]) == pytest.approx(unbiased, rel=1e-3)
