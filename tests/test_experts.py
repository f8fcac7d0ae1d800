"""Mixtures of experts stay packed: against the dense model, through every format, saved as read."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowbit
from lowbit import LowbitError, QuantScheme, speed
from lowbit.experts import QuantExperts
from tests.packed import CLEAR, IDS, TOLERANCE, assert_saved_as_read, foreign, logits, spoil

W4, W4_ASYMMETRIC = QuantScheme(4, 32), QuantScheme(4, 32, False)
CASES: list[tuple[str, QuantScheme, dict[str, Any]]] = [
    ("mixtral", W4, {}),
    ("mixtral", QuantScheme(8, 32), {}),
    ("mixtral", QuantScheme(2, 16), {}),
    ("mixtral", W4_ASYMMETRIC, {"format": "gptq"}),
    ("mixtral", W4_ASYMMETRIC, {"format": "awq"}),
    ("qwen3_moe", W4, {}),
    ("qwen3_moe", W4, {"format": "gptq"}),
    ("deepseek_v3", W4, {}),
]


def experts_of(model: nn.Module) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def per_token(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).square().mean(-1).sqrt().flatten()


@torch.no_grad()
def assert_same_mixture(packed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Experts with the same routing; logits and greedy text, where no near tie sends a token elsewhere.

    A difference in the last bit of a hidden state can turn a router's choice around. That moves one token's
    logits by far more than the rounding of weights does, in any two implementations of a mixture.
    """
    generator = torch.Generator().manual_seed(0)
    for module in experts_of(packed):
        name = next(name for name, found in packed.named_modules() if found is module)
        x = torch.randn(40, 64, generator=generator).bfloat16()
        index = torch.rand(40, module.num_experts, generator=generator).topk(2).indices
        weights = torch.rand(40, 2, generator=generator)
        for rows in (1, 40):
            arguments = x[:rows], index[:rows], weights[:rows]
            found, expected = module(*arguments), dense.get_submodule(name)(*arguments)
            assert found.dtype == expected.dtype
            assert (per_token(found, expected) / expected.float().std()).max() < 0.02
    for rows in (1, 40):
        far = per_token(logits(packed, rows), logits(dense, rows)) > TOLERANCE
        assert far.float().mean() < 0.12  # a router's near tie sends a token to another expert
    text = packed.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=None)  # type: ignore
    expected = dense(text[:, :-1]).logits[0, 7:].float()
    lead = expected.topk(2).values
    clear = lead[:, 0] - lead[:, 1] > CLEAR
    assert clear.any()
    assert torch.equal(text[0, 8:][clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize(("family", "scheme", "options"), CASES, ids=str)
def test_stays_packed_and_saves_what_it_read(
    checkpoint: Callable[..., Path], tmp_path: Path, family: str, scheme: QuantScheme, options: dict[str, Any]
) -> None:
    folder = checkpoint(family, scheme, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lowbit.load(folder)
    assert len(experts_of(model)) == (2 if family == "deepseek_v3" else 3)
    assert_same_mixture(model, lowbit.load(folder, packed=False))
    assert_saved_as_read(model, folder, tmp_path / "again")
    assert torch.equal(logits(lowbit.load(tmp_path / "again")), logits(model))


def test_enable_keeps_experts_packed(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("mixtral", W4)
    with lowbit.enable():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(experts_of(model)) == 3
    assert torch.equal(logits(model), logits(lowbit.load(folder)))


def test_no_dense_expert_is_alive(checkpoint: Callable[..., Path]) -> None:
    """Neither in the model nor anywhere else in the process, before and after a forward."""
    folder = checkpoint("mixtral", W4)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, Tensor)}
    model = lowbit.load(folder)
    logits(model)
    gc.collect()
    smallest = 4 * 64 * 128  # a stack of down projections, of any dtype
    stacks = [
        thing.shape
        for thing in gc.get_objects()
        if isinstance(thing, Tensor) and id(thing) not in before and thing.is_floating_point()
        and thing.device.type != "meta" and thing.numel() >= smallest
    ]  # fmt: skip
    assert stacks == []
    weights = sum(p.numel() for p in lowbit.load(folder, packed=False).model.layers.parameters())
    dense_embedding = 352 * 64 * 2
    assert speed.weight_bytes(model) - dense_embedding < 0.75 * weights  # 4 bits, and 32 for each group of 32
    bias = sum(operand.nbytes for module in experts_of(model) for operand in module.operands)
    assert bias < 0.7 * 3 * 4 * 3 * 64 * 128


def test_act_order_of_every_expert(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Each expert's columns have an order of their own; the two matrices with one input may differ."""
    folder, dense = foreign(tiny_model("qwen3_moe"), tmp_path, "gptq", False, True)
    model = lowbit.load(folder)
    assert len(experts_of(model)) == 3
    assert_same_mixture(model, AutoModelForCausalLM.from_pretrained(dense).eval())
    assert_saved_as_read(model, folder, tmp_path / "again")


def test_offloaded_to_disk(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("mixtral", W4)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    with lowbit.enable():
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, offload_folder=str(tmp_path / "offload")
        ).eval()
    kept, offloaded, _ = experts_of(model)
    assert kept.operands
    assert not offloaded.operands
    assert torch.equal(logits(model), logits(lowbit.load(folder)))


def test_gradients_pass_through(checkpoint: Callable[..., Path]) -> None:
    """What an adapter below the experts needs: the gradient of the activations, as the dense model's."""
    folder = checkpoint("mixtral", W4)
    found = []
    for packed in (True, False):
        experts = lowbit.load(folder, packed=packed, dtype=torch.float32).model.layers[0].mlp.experts
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        index = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2], [0, 1]])
        experts(
            x, index, torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
        ).square().sum().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).abs().max() < 0.01 * found[1].abs().max()


def test_compiles_as_one_graph(checkpoint: Callable[..., Path]) -> None:
    experts = lowbit.load(checkpoint("mixtral", W4)).model.layers[0].mlp.experts
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    arguments = torch.randn(3, 64).bfloat16(), torch.tensor([[0, 1], [2, 1], [3, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), experts(*arguments))


def test_dequantize_gives_the_dense_model(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("mixtral", W4)
    model = lowbit.load(folder).dequantize()
    assert not experts_of(model)
    assert torch.equal(logits(model), logits(lowbit.load(folder, packed=False)))


def test_a_state_dict_loaded_later_is_prepared(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("mixtral", W4)
    model = lowbit.load(folder)
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if ".experts." in name and "packed" in name:
            parameter.data.zero_()
    for module in experts_of(model):
        module.prepare()
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("wrong", [-1, 4, 10**12])
def test_a_row_that_goes_to_no_expert_is_refused(checkpoint: Callable[..., Path], wrong: int) -> None:
    experts = experts_of(lowbit.load(checkpoint("mixtral", W4)))[0]
    index = torch.tensor([[0, 3], [2, wrong]])
    with pytest.raises(LowbitError, match=f"^a row goes to expert {wrong}: give numbers from 0 to 3$"):
        experts(torch.randn(2, 64).bfloat16(), index, torch.rand(2, 2))


def test_a_missing_expert_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", W4)
    gone = "model.layers.1.mlp.experts.2.up_proj."

    def lose(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config
        for name in [name for name in tensors if name.startswith(gone)]:
            del tensors[name]

    bad = spoil(folder, tmp_path / "bad", lose)
    assert len(load_file(bad / "model.safetensors")) < len(load_file(folder / "model.safetensors"))
    with pytest.raises(LowbitError, match=r"layers\.1\.mlp\.experts\.2\.up_proj is not packed"):
        lowbit.load(bad)


def test_what_it_does_not_know_is_dequantized_and_named(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts with something more, here a bias: dense, with a warning, and not to be saved."""
    monkeypatch.setattr("lowbit.placement._can_stand_in", lambda module, parts: False)
    for family in ("mixtral", "qwen3_moe"):
        folder = checkpoint(family, W4)
        with pytest.warns(UserWarning, match="merged parameters .*experts.* dequantized"):
            model = lowbit.load(folder)
        assert not experts_of(model)
        far = per_token(logits(model), logits(lowbit.load(folder, packed=False))) > TOLERANCE
        assert far.float().mean() < 0.12  # a router's near tie sends a token to another expert
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / family)
