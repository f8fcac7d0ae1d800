"""Checkpoints stay packed: every format, ours and an independent packer's, against the dense model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, pipeline
from transformers.quantizers import auto

import lowbit
from lowbit import QuantScheme
from lowbit.quantizer import quant_layers
from tests.packed import (
    TOLERANCE,
    assert_same_model,
    assert_saved_as_read,
    distance,
    foreign,
    logits,
)

MIXED = {
    "down_proj": QuantScheme(8, -1),
    "layers.0.mlp.*_proj": QuantScheme(3, 16),
    "o_proj": QuantScheme(4, 64),
}
CASES = [
    ("llama", QuantScheme(4, 32), {}),
    ("llama", QuantScheme(4, 32, False), {}),
    ("llama", QuantScheme(4, -1), {}),
    ("llama", QuantScheme(8, 32), {}),
    ("llama", QuantScheme(3, 32), {}),
    ("llama", QuantScheme(2, 16), {}),
    ("qwen2", QuantScheme(4, 32), {"head_bits": 8, "tied": True}),
    ("qwen2", QuantScheme(4, 32), {"head_bits": 8, "tied": False}),
    ("llama", QuantScheme(4, 32), {"schemes": MIXED}),
    ("gemma3", QuantScheme(4, 32), {}),
    ("phi3", QuantScheme(4, 64), {}),
    ("llama", QuantScheme(4, 32), {"format": "gptq"}),
    ("llama", QuantScheme(4, 32, False), {"format": "gptq"}),
    ("llama", QuantScheme(8, 32), {"format": "gptq"}),
    ("gpt2", QuantScheme(4, 32), {"format": "gptq"}),
    ("opt", QuantScheme(4, 32), {"format": "gptq"}),
    ("llama", QuantScheme(4, 32, False), {"format": "awq"}),
]


@pytest.mark.parametrize(("family", "scheme", "options"), CASES, ids=lambda value: str(value))
def test_stays_packed_and_saves_what_it_read(
    checkpoint: Callable[..., Path], tmp_path: Path, family: str, scheme: QuantScheme, options: dict[str, Any]
) -> None:
    folder = checkpoint(family, scheme, **options)
    model = lowbit.load(folder)
    layers = quant_layers(model)
    assert len(layers) == len({name for name in load_file(folder / "model.safetensors") if "scale" in name})
    assert not any(type(module) is nn.Linear for name, module in model.named_modules() if "layers." in name)
    assert_same_model(model, lowbit.load(folder, packed=False))
    assert_saved_as_read(model, folder, tmp_path / "again")
    again = lowbit.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


FOREIGN = [
    (kind, symmetric, act_order)
    for kind in ("gptq", "gptq_v2")
    for symmetric in (True, False)
    for act_order in (False, True)
] + [("awq", False, False)]


@pytest.mark.parametrize(("kind", "symmetric", "act_order"), FOREIGN)
def test_checkpoints_of_other_tools(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, symmetric: bool, act_order: bool
) -> None:
    folder, dense = foreign(tiny_model("qwen2"), tmp_path, kind, symmetric, act_order)
    expected = AutoModelForCausalLM.from_pretrained(dense).eval()
    model = lowbit.load(folder)
    assert_same_model(model, expected)
    assert_saved_as_read(model, folder, tmp_path / "again")
    assert torch.equal(logits(lowbit.load(folder, packed=False)), logits(expected))


def test_enable_is_undone(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", QuantScheme(4, 32))
    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with lowbit.enable(), lowbit.enable():
        text = pipeline("text-generation", model=str(folder))
        assert len(quant_layers(text.model)) == 21
        assert text("The river", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith(
            "The river"
        )
    assert before == (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not quant_layers(again)
    assert torch.equal(logits(stock), logits(again))
    switch = lowbit.enable()
    assert quant_layers(AutoModelForCausalLM.from_pretrained(folder))
    switch.disable()
    assert before[0] == auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def test_load_changes_nothing_for_others(checkpoint: Callable[..., Path]) -> None:
    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    lowbit.load(checkpoint())
    assert before == auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def test_what_lowbit_cannot_read_goes_where_it_went(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    with lowbit.enable():
        found = auto.AutoQuantizationConfig.from_dict(config)
    assert type(found).__name__ == "CompressedTensorsConfig"


def test_offloaded_to_disk(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama", QuantScheme(4, 32))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    with lowbit.enable():
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, offload_folder=str(tmp_path / "offload")
        ).eval()
    offloaded = model.model.layers[1].mlp.up_proj
    assert offloaded.operand is None
    assert offloaded.weight_packed.device.type == "meta"
    assert model.model.layers[0].mlp.up_proj.operand is not None
    assert distance(logits(model), logits(lowbit.load(folder))) < TOLERANCE


def test_float16_checkpoint_runs_in_bfloat16_on_a_cpu(checkpoint: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="float16 is slow on a CPU"):
        model = lowbit.load(checkpoint(), dtype=torch.float16)
    assert logits(model).isfinite().all()
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_loading_in_a_fresh_process_needs_no_gpu_code(checkpoint: Callable[..., Path]) -> None:
    code = (
        "import sys, lowbit; model = lowbit.load(sys.argv[1]); "
        "print(*(name for name in ('triton', 'lowbit_kernels', 'compressed_tensors') if name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(checkpoint())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "lowbit_kernels" not in done.stdout
