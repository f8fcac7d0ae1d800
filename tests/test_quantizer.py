"""Checkpoints stay packed: every format, ours and an independent packer's, against the dense model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.quantizers import auto

import lowbit
from lowbit import LowbitError, QuantScheme
from lowbit.nn import QuantLinear
from lowbit.quantized import QuantizedWeight
from lowbit.quantizer import quant_layers
from tests.formats import reference
from tests.formats.samples import random_weight

IDS = torch.randint(3, 350, (2, 40), generator=torch.Generator().manual_seed(0))
# Root mean square over logits whose standard deviation is about one. Weights are rounded to bfloat16 in
# the dense model and not in the packed one, and sums in another order: about 0.02. A matrix
# read wrongly moves logits by 0.2 and more.
TOLERANCE = 0.05
CLEAR = 0.3  # a lead of the best token that such an error can't turn around


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint(family, scheme, format, **options)`: quantized by lowbit, made once."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", scheme: QuantScheme | None = None, **options: Any) -> Path:
        scheme = scheme or QuantScheme(4, 32)
        tied = options.pop("tied", None)
        key = f"{family} {scheme} {tied} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("packed") / "checkpoint"
            source = tiny_model(family, tied=tied)
            lowbit.quantize(str(source), scheme, output=folder, method="rtn", verify_output=False, **options)
            made[key] = folder
        return made[key]

    return make


@torch.no_grad()
def logits(model: PreTrainedModel, rows: int = 40) -> Tensor:
    found: Tensor = model(IDS[:, :rows]).logits.float()
    return found


@torch.no_grad()
def assert_same_model(packed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Logits of one token (the four-bit kernel), of many (dequantized tiles), and along greedy text."""
    for rows in (1, 40):
        assert distance(logits(packed, rows), logits(dense, rows)) < TOLERANCE
    answer = packed.generate(
        IDS[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    expected = dense(answer.sequences[:, :-1]).logits[0, 7:].float()
    found = torch.cat(answer.logits).float()
    assert distance(found, expected) < TOLERANCE
    margin = expected.topk(2).values
    clear = margin[:, 0] - margin[:, 1] > CLEAR
    assert clear.any()
    assert torch.equal(answer.sequences[0, 8:][clear], expected.argmax(-1)[clear])


def distance(found: Tensor, expected: Tensor) -> float:
    return (found - expected).square().mean().sqrt().item()


def assert_saved_as_read(model: PreTrainedModel, folder: Path, target: Path) -> None:
    model.save_pretrained(target)
    saved, read = load_file(target / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == read.keys()
    for name, tensor in read.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (target, folder)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


CASES = [
    ("llama", QuantScheme(4, 32), {}),
    ("llama", QuantScheme(4, 32, False), {}),
    ("llama", QuantScheme(4, -1), {}),
    ("llama", QuantScheme(8, 32), {}),
    ("llama", QuantScheme(3, 32), {}),
    ("llama", QuantScheme(2, 16), {}),
    ("qwen2", QuantScheme(4, 32), {"head_bits": 8, "tied": True}),
    ("qwen2", QuantScheme(4, 32), {"head_bits": 8, "tied": False}),
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
    assert not any(
        isinstance(module, nn.Linear) for name, module in model.named_modules() if "layers." in name
    )
    assert_same_model(model, lowbit.load(folder, packed=False))
    assert_saved_as_read(model, folder, tmp_path / "again")
    again = lowbit.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def rewrite(folder: Path, target: Path, layers: dict[str, dict[str, Any]], config: dict[str, Any]) -> Path:
    """A copy of the dense checkpoint `folder` with other tensors for some of its layers."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name, parts in layers.items():
        del tensors[f"{name}.weight"]
        for suffix, value in parts.items():
            value = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            tensors[f"{name}.{suffix}"] = value.to(torch.int32) if suffix.startswith("q") else value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    settings["quantization_config"] = config
    (target / "config.json").write_text(json.dumps(settings))
    return target


def foreign(folder: Path, target: Path, kind: str, symmetric: bool, act_order: bool) -> tuple[Path, Path]:
    """A checkpoint by the independent packer, and the dense model that it stands for."""
    bits, group = 4, 32
    generator = torch.Generator().manual_seed(1)
    dense_tensors, layers = load_file(folder / "model.safetensors"), {}
    for seed, name in enumerate(sorted(dense_tensors)):
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = dense_tensors[name].shape
        sample = random_weight(QuantScheme(bits, group, symmetric), (rows, columns), torch.float16, seed)
        scales = (sample.scales / 50).half()
        group_of = torch.arange(columns, dtype=torch.int32) // group
        if act_order:
            group_of = group_of[torch.randperm(columns, generator=generator)]
        zeros = sample.zeros.double()[:, group_of.long()]
        dense = (sample.codes.double() - zeros) * scales.double()[:, group_of.long()]
        dense_tensors[name] = dense.bfloat16()
        codes, zeros = sample.codes.numpy().astype(np.int64), sample.zeros.numpy().astype(np.int64)
        packed = (
            reference.awq(codes, zeros)
            if kind == "awq"
            else reference.gptq(codes, zeros, bits, kind == "gptq")
        )
        parts = {"qweight": packed[0], "qzeros": packed[1], "scales": scales.T}
        if kind != "awq":
            parts["g_idx"] = group_of
        layers[name.removesuffix(".weight")] = parts
    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
                              "desc_act": act_order, "checkpoint_format": kind}  # fmt: skip
    if kind == "awq":
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
        }
    shutil.copytree(folder, target / "dense")
    save_file(dense_tensors, target / "dense" / "model.safetensors", {"format": "pt"})
    return rewrite(folder, target / "packed", layers, config), target / "dense"


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


def test_experts_are_dequantized_and_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("mixtral", "qwen3_moe"):
        folder = checkpoint(family, QuantScheme(4, 32))
        with pytest.warns(UserWarning, match="merged parameters .*experts.* dequantized"):
            model = lowbit.load(folder)
        assert quant_layers(model)
        assert distance(logits(model), logits(lowbit.load(folder, packed=False))) < TOLERANCE
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / family)


def test_compiles_as_one_graph(checkpoint: Callable[..., Path]) -> None:
    model = lowbit.load(checkpoint("llama", QuantScheme(4, 32)))
    layer = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 1, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), model.model.layers[0].mlp(x))


def test_dequantize_gives_the_dense_model(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2", QuantScheme(4, 32))
    model = lowbit.load(folder).dequantize()
    assert not quant_layers(model)
    assert torch.equal(logits(model), logits(lowbit.load(folder, packed=False)))


def test_float16_checkpoint_runs_in_bfloat16_on_a_cpu(checkpoint: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="float16 is slow on a CPU"):
        model = lowbit.load(checkpoint(), dtype=torch.float16)
    assert logits(model).isfinite().all()
    assert model.lm_head.weight.dtype == torch.bfloat16


def spoil(folder: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


UP = "model.layers.1.mlp.up_proj"


def _lose(suffix: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def spoiled(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config
        del tensors[f"{UP}.{suffix}"]

    return spoiled


def _set(
    suffix: str, change: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def spoiled(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config
        tensors[f"{UP}.{suffix}"] = change(tensors[f"{UP}.{suffix}"]).contiguous()

    return spoiled


def _weights(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, config: config["config_groups"]["group_0"]["weights"].update(changes)


BAD = {
    "no scale": (_lose("weight_scale"), "up_proj.*weight_scale"),
    "no shape": (_lose("weight_shape"), "up_proj.*weight_shape"),
    "short scale": (_set("weight_scale", lambda t: t[:-1]), "up_proj.*scales"),
    "short codes": (_set("weight_packed", lambda t: t[:, :-1]), "up_proj.*weight_packed"),
    "codes of another dtype": (_set("weight_packed", lambda t: t.long()), "up_proj.*int32"),
    "another shape": (_set("weight_shape", lambda t: t.flip(0)), "up_proj"),
    "other bits": (_weights(num_bits=8), "weight_packed"),
    "unknown bits": (_weights(num_bits=5), "bits=5"),
    "other group": (_weights(group_size=64), "scales"),
    "asymmetric without zeros": (_weights(symmetric=False), "weight_zero_point"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_in_one_line(
    checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    change, message = BAD[case]
    folder = spoil(checkpoint("llama", QuantScheme(4, 32)), tmp_path / "bad", change)
    with pytest.raises(LowbitError, match=message) as caught:
        lowbit.load(folder)
    assert "\n" not in str(caught.value)


def test_missing_dense_weight_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    gone = "model.layers.1.input_layernorm.weight"
    folder = spoil(checkpoint(), tmp_path / "bad", lambda tensors, _: tensors.__delitem__(gone))
    with pytest.raises(LowbitError, match=f"lacks {gone}"):
        lowbit.load(folder)


def test_uneven_g_idx_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = foreign(tiny_model("qwen2"), tmp_path, "gptq", True, True)
    bad = spoil(folder, tmp_path / "bad", _set("g_idx", lambda t: torch.zeros_like(t)))
    with pytest.raises(LowbitError, match=r"up_proj.*g_idx does not spread 64 columns"):
        lowbit.load(bad)


def test_loading_in_a_fresh_process_needs_no_gpu_code(checkpoint: Callable[..., Path]) -> None:
    code = (
        "import sys, lowbit; model = lowbit.load(sys.argv[1]); "
        "print(*(name for name in ('triton', 'lowbit_kernels', 'compressed_tensors') if name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(checkpoint())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "lowbit_kernels" not in done.stdout


def test_weight_of_a_layer(checkpoint: Callable[..., Path]) -> None:
    layer = lowbit.load(checkpoint()).model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    weight, order = layer.read()
    assert isinstance(weight, QuantizedWeight)
    assert order is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = layer.to(torch.float32)  # what `.float()` on a model does
    assert moved.weight_scale.dtype == torch.bfloat16
