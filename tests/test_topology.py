"""What is found in a block, by structure alone, against a table that a person wrote for every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from lowbit import topology
from lowbit.calibration import Group, find_groups
from lowbit.errors import LowbitError
from lowbit.source import Source
from lowbit.stream import Stream
from lowbit.topology import Fold, Matrix
from tests.tiny import FAMILIES, VOCAB, make_config

CPU = torch.device("cpu")
Folders = Callable[..., Path]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_GROUPS = [QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)]
LLAMA_FOLDS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm",
               "mlp.down_proj": "mlp.up_proj"}  # fmt: skip
MOE_GROUPS = [QKV, ("self_attn.o_proj",)] + [
    (f"mlp.experts.{part}.{expert}",) for expert in range(4) for part in ("gate_up_proj", "down_proj")
]


@dataclass(frozen=True)
class Expected:
    """`folds`: first consumer -> producer. `rows`: how many of the producer's last rows take part."""

    path: str
    groups: list[tuple[str, ...]]
    folds: dict[str, str]
    kind: str = "Linear"
    offset: float = 0.0


LLAMA = Expected("model.layers", LLAMA_GROUPS, LLAMA_FOLDS)
MOE = Expected("model.layers", MOE_GROUPS, {"self_attn.q_proj": "input_layernorm"})
TABLE = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma3": Expected(
        "model.layers",
        LLAMA_GROUPS,
        LLAMA_FOLDS | {"mlp.gate_proj": "pre_feedforward_layernorm"},
        offset=1.0,
    ),
    "phi3": Expected(
        "model.layers",
        [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
        {
            "self_attn.qkv_proj": "input_layernorm",
            "mlp.gate_up_proj": "post_attention_layernorm",
            "mlp.down_proj": "mlp.gate_up_proj",
        },
    ),
    "phi": Expected(  # attention and MLP side by side, behind one norm
        "model.layers",
        [(*QKV, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)],
        {"self_attn.q_proj": "input_layernorm"},
    ),
    "gpt2": Expected(  # GELU stands between c_fc and mlp.c_proj
        "transformer.h",
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2"},
        kind="Conv1D",
    ),
    "opt": Expected(  # ReLU lets positive factors through, and every head has values of its own
        "model.decoder.layers",
        [QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
        {
            "self_attn.q_proj": "self_attn_layer_norm",
            "self_attn.out_proj": "self_attn.v_proj",
            "fc1": "final_layer_norm",
            "fc2": "fc1",
        },
    ),
    "mixtral": MOE,
    "qwen3_moe": MOE,
}


class LoadedBlock:
    """Block number `number` of a tiny model with its weights, and a way to run it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, number: int = 1) -> None:
        self.source = Source(folder, dtype)
        self.path, blocks = topology.decoder_blocks(self.source.model)
        self.prefix = f"{self.path}.{number}"
        self.source.load(self.source.keys_outside([self.path]), CPU)
        ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
        stream = Stream(self.source.model, blocks, [ids])
        for before in range(number):
            self.source.load(self.source.keys_under([f"{self.path}.{before}"]), CPU)
            list(stream.advance(before))
        self.source.load(self.source.keys_under([self.prefix]), CPU)
        self.block = blocks[number]
        self.run: Callable[[], Tensor] = lambda: stream.run(number, 0)
        self.matrices = topology.matrices(self.block, self.prefix)
        self.groups: list[Group] = find_groups(self.matrices, self.run)

    def folds(self) -> list[Fold]:
        return topology.find_folds(self.block, [(g.matrices, g.others) for g in self.groups], self.run)

    def name_of(self, part: nn.Module | Matrix) -> str:
        if isinstance(part, Matrix):
            return part.module_name.removeprefix(f"{self.prefix}.")
        return next(name for name, module in self.block.named_modules() if module is part)

    def named_folds(self) -> dict[str, str]:
        return {self.name_of(f.consumers[0]): self.name_of(f.producer) for f in self.folds()}


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_and_groups(tiny_model: Folders, family: str) -> None:
    expected, loaded = TABLE[family], LoadedBlock(tiny_model(family))
    assert loaded.path == expected.path
    groups = [tuple(loaded.name_of(m) for m in group.matrices) for group in loaded.groups]
    assert sorted(groups) == sorted(expected.groups)
    assert {loaded.name_of(m) for m in loaded.matrices} == {
        name for group in expected.groups for name in group
    }
    for matrix in loaded.matrices:
        assert matrix.kind == ("Expert" if "experts" in matrix.name else expected.kind)
        assert matrix.shape == tuple(matrix.weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds(tiny_model: Folders, family: str, dtype: torch.dtype) -> None:
    expected, loaded = TABLE[family], LoadedBlock(tiny_model(family), dtype)
    before = {name: p.clone() for name, p in loaded.block.named_parameters()}
    folds = loaded.folds()
    assert {loaded.name_of(f.consumers[0]): loaded.name_of(f.producer) for f in folds} == expected.folds
    for fold in folds:
        assert fold.offset == (0.0 if isinstance(fold.producer, Matrix) else expected.offset)
    for name, parameter in loaded.block.named_parameters():  # trying leaves no trace
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_folds_keep_the_function(tiny_model: Folders, family: str) -> None:
    """All folds of a block together, with factors that are no powers of two."""
    loaded = LoadedBlock(tiny_model(family))
    folds, before = loaded.folds(), loaded.run()
    generator = torch.Generator().manual_seed(1)
    for fold in folds:
        scales = torch.exp(torch.randn(fold.consumers[0].shape[1], generator=generator).clamp(-2, 2))
        reads = fold.consumers[0].weight.clone()
        fold.apply(scales)
        assert torch.allclose(fold.consumers[0].weight, reads * scales)  # it did something
    after = loaded.run()
    assert (after - before).norm() <= 2e-6 * before.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_half_a_fold_changes_the_function(tiny_model: Folders, family: str) -> None:
    """The oracle above has teeth: consumers alone, a forgotten bias or offset, move the output."""
    loaded = LoadedBlock(tiny_model(family))
    fold, before = loaded.folds()[0], loaded.run()
    scales = torch.rand(fold.consumers[0].shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    fold.scale_consumers(scales)
    assert (loaded.run() - before).norm() > 1e-2 * before.norm()
    fold.scale_producer(scales)
    assert (loaded.run() - before).norm() <= 2e-6 * before.norm()


@pytest.mark.parametrize(
    ("family", "consumer", "producer"),
    [
        ("llama", "mlp.down_proj", "mlp.gate_proj"),  # SiLU is not linear
        ("llama", "self_attn.o_proj", "self_attn.q_proj"),
        ("llama", "mlp.gate_proj", "input_layernorm"),
        ("gpt2", "mlp.c_proj", "mlp.c_fc"),  # nor is GELU
        ("opt", "self_attn.out_proj", "self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("share", [1.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_fold_is_rejected(
    tiny_model: Folders, family: str, consumer: str, producer: str, share: float, dtype: torch.dtype
) -> None:
    """Also where the block adds next to nothing to its input, as blocks of trained models do."""
    loaded = LoadedBlock(tiny_model(family), dtype)
    by_name = {loaded.name_of(m): m for m in loaded.matrices}
    for name in (
        "self_attn.o_proj",
        "mlp.down_proj",
        "attn.c_proj",
        "mlp.c_proj",
        "self_attn.out_proj",
        "fc2",
    ):
        if name in by_name:
            by_name[name].weight.mul_(share)
    modules = dict(loaded.block.named_modules())
    group = next(g for g in loaded.groups if loaded.name_of(g.matrices[0]) == consumer)
    fold = Fold(tuple(group.matrices), tuple(group.others), by_name.get(producer) or modules[producer])
    scales = 2.0 ** torch.randint(-1, 2, (group.matrices[0].shape[1],)).float()
    assert not topology._preserves(fold, scales, loaded.run(), loaded.run)
    assert loaded.named_folds() == TABLE[family].folds


def test_massive_activations_hide_no_wrong_fold(tiny_model: Folders) -> None:
    """One channel of one token a thousand times the rest, and written by this very block."""
    loaded = LoadedBlock(tiny_model("llama"), torch.bfloat16)
    loaded.block.mlp.gate_proj.weight.data.mul_(4)  # where SiLU is nearly linear for half of the channels
    loaded.block.mlp.down_proj.weight.data[7].mul_(3000)
    assert loaded.named_folds() == LLAMA_FOLDS


def test_a_router_takes_part_in_the_fold_of_its_input() -> None:
    """A reader that is not quantized must follow, or its logits change."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(32)
            self.up = nn.Linear(32, 48, bias=False)
            self.router = nn.Parameter(torch.randn(2, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            share = torch.nn.functional.linear(x, self.router).softmax(-1)
            return self.up(x) * share[..., :1]

    torch.manual_seed(0)
    block = Routed().requires_grad_(False)
    x = torch.randn(1, 20, 32)
    [group] = find_groups(topology.matrices(block, "block"), lambda: block(x))
    assert [m.name for m in group.matrices] == ["block.up.weight"]
    assert len(group.others) == 1
    before = block(x)
    [fold] = topology.find_folds(block, [(group.matrices, group.others)], lambda: block(x))
    fold.apply(torch.rand(32) + 0.5)
    torch.testing.assert_close(block(x), before)
    # Without it there is nothing to find.
    assert topology.find_folds(block, [(group.matrices, [])], lambda: block(x)) == []


def test_a_model_without_blocks_is_refused() -> None:
    model = LlamaForCausalLM(make_config("llama"))
    model.model.layers = nn.ModuleList()
    with pytest.raises(LowbitError, match="LlamaForCausalLM has no list of decoder blocks"):
        topology.decoder_blocks(model)


def test_other_matrices_are_all_the_rest(tiny_model: Folders) -> None:
    for family in FAMILIES:
        source = Source(tiny_model(family), torch.float32)
        path, blocks = topology.decoder_blocks(source.model)
        known = {m.name for n, b in enumerate(blocks) for m in topology.matrices(b, f"{path}.{n}")}
        rest = set(topology.other_matrices(source.model, known))
        every = {name for name, p in source.model.named_parameters() if p.ndim > 1}
        assert rest | known == every
        assert not rest & known


def test_a_norm_that_reads_a_gate_does_not_add_one() -> None:
    """It can't be asked with one tensor, and its weight is as it was."""
    norm = Qwen3NextRMSNormGated(16)
    torch.nn.init.uniform_(norm.weight)
    before = norm.weight.clone()
    assert topology.norm_offset(norm) == 0.0
    assert torch.equal(norm.weight, before)
    doubled, (x, gate) = copy.deepcopy(norm), torch.randn(2, 3, 16)
    doubled.weight.data *= 2
    assert torch.allclose(doubled(x, gate), 2 * norm(x, gate))
