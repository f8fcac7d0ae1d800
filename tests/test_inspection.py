"""Bits and bytes of a checkpoint, against arithmetic done by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lowbit
from lowbit import QuantScheme
from lowbit.errors import LowbitError
from lowbit.inspection import Inspection, Part, inspect

Folders = Callable[..., Path]
LLAMA = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
         "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
         "mlp.down_proj": (64, 128)}  # fmt: skip


def parts_of(inspection: Inspection) -> dict[str, Part]:
    return {part.name: part for part in inspection.parts}


@pytest.mark.parametrize(
    ("name", "bits", "group", "symmetric"),
    [
        ("compressed-tensors", 4, 32, True),
        ("compressed-tensors", 4, 32, False),
        ("compressed-tensors", 3, 64, True),
        ("compressed-tensors", 8, -1, True),
        ("gptq", 4, 32, True),
        ("gptq", 2, 64, False),
        ("awq", 4, 32, False),
    ],
)
def test_bits_per_weight(
    tiny_model: Folders, tmp_path: Path, name: str, bits: int, group: int, symmetric: bool
) -> None:
    scheme = QuantScheme(bits, group, symmetric)
    lowbit.quantize(tiny_model("llama"), scheme, output=tmp_path / "out", method="rtn", format=name)
    found = inspect(tmp_path / "out")
    assert found.method == name
    parts = parts_of(found)
    for module, (out, width) in LLAMA.items():
        part = parts[f"model.layers.*.{module}"]
        groups = 1 if group == -1 else width // group
        expected = out * width * bits + out * groups * 16  # codes and scales
        if name == "compressed-tensors":
            expected += 2 * 64 + (0 if symmetric else 32 * -(-out * bits // 32) * groups)  # the shape
        else:
            expected += out * groups * bits + (width * 32 if name == "gptq" else 0)  # zeros, g_idx
        assert (part.modules, part.weights, part.quantized) == (3, 3 * out * width, True)
        assert part.scheme == str(scheme)
        assert 8 * part.bytes == 3 * expected
        assert part.bits_per_weight == pytest.approx(expected / (out * width))
    quantized = [parts[f"model.layers.*.{module}"] for module in LLAMA]
    assert found.bits_per_weight(quantized_only=True) == pytest.approx(
        8 * sum(p.bytes for p in quantized) / sum(p.weights for p in quantized)
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(p.bytes for p in found.parts) == sum(t.nbytes for t in tensors.values())
    assert found.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert parts["model.embed_tokens"].scheme == "bf16"
    assert parts["model.embed_tokens"].bits_per_weight == 16
    assert not parts["model.embed_tokens"].quantized
    everything = sum(out * width for out, width in LLAMA.values()) * 3 + sum(
        p.weights for p in found.parts if not p.quantized
    )
    assert found.bits_per_weight() == pytest.approx(8 * sum(p.bytes for p in found.parts) / everything)


def test_quantized_parts_come_first(tiny_model: Folders, tmp_path: Path) -> None:
    lowbit.quantize(
        tiny_model("mixtral"), QuantScheme(4, 32), output=tmp_path / "out", method="rtn", head_bits=8
    )
    found = inspect(tmp_path / "out")
    flags = [part.quantized for part in found.parts]
    assert flags == sorted(flags, reverse=True)
    parts = parts_of(found)
    assert parts["lm_head"].scheme == "w8g32"
    assert parts["model.layers.*.block_sparse_moe.experts.*.w1"].modules == 12
    assert parts["model.layers.*.block_sparse_moe.gate"].scheme == "bf16"


def test_shards_are_counted_together(tiny_model: Folders, tmp_path: Path) -> None:
    for name, size in (("one", "5GB"), ("many", "50KB")):
        lowbit.quantize(
            tiny_model("llama"), QuantScheme(4, 32), output=tmp_path / name, method="rtn", max_shard_size=size
        )
    one, many = inspect(tmp_path / "one"), inspect(tmp_path / "many")
    assert set(one.parts) == set(many.parts)
    assert len(one.parts) == len(many.parts)


def test_a_plain_model(tiny_model: Folders) -> None:
    found = inspect(tiny_model("llama"))
    assert found.method == "none"
    assert found.bits_per_weight() == 16
    assert found.bits_per_weight(quantized_only=True) == 0
    assert not any(part.quantized for part in found.parts)


def test_refusals(tiny_model: Folders, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="is not a folder: give the folder of a checkpoint"):
        inspect(tmp_path / "nothing")
    empty = shutil.copytree(
        tiny_model("llama"), tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(LowbitError, match=r"has no \*\.safetensors"):
        inspect(empty)
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match="is quantized as fp8, which lowbit can't read"):
        inspect(folder)
    cut = shutil.copytree(tiny_model("llama"), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(LowbitError, match=r"model\.safetensors can.t be read"):
        inspect(cut)
