"""From format to format: an independent packer's checkpoints there and back, and what can't be carried."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import LowbitError, QuantScheme
from lowbit.conversion import convert
from lowbit.errors import VerificationError
from tests.packed import foreign, spoil
from tests.refused import snapshot

Folders = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


def dense_state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(lowbit.load(folder, packed=False).state_dict())


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = dense_state(one), dense_state(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("kind", "symmetric"), [("gptq", True), ("gptq", False), ("gptq_v2", False), ("awq", False)]
)
def test_a_strangers_checkpoint_there_and_back(
    tiny_model: Folders, tmp_path: Path, kind: str, symmetric: bool
) -> None:
    """The stranger's own words, packed by code that shares nothing with lowbit, come back bit for bit."""
    packed, dense = foreign(tiny_model("llama"), tmp_path / "stranger", kind, symmetric, act_order=False)
    result = convert(packed, tmp_path / "ct", "compressed-tensors", max_shard_size="100KB")
    assert len(list((tmp_path / "ct").glob("*.safetensors"))) > 1
    assert not result.requantized
    assert result.layers == {str(QuantScheme(4, 32, symmetric)): 21}
    assert_same_weights(tmp_path / "ct", dense)
    convert(tmp_path / "ct", tmp_path / "back", kind.replace("_", "-"))
    assert_same_tensors(tmp_path / "back", packed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_ours_to_gptq_and_back(checkpoint: Folders, tmp_path: Path, family: str) -> None:
    form = "gptq" if family == "gpt2" else "compressed-tensors"
    source = checkpoint(family, format=form)
    other = "gptq-v2" if family == "gpt2" else "gptq"
    convert(source, tmp_path / "other", other)
    assert_same_weights(tmp_path / "other", source)
    convert(tmp_path / "other", tmp_path / "back", form)
    assert_same_tensors(tmp_path / "back", source)
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "back", source)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(checkpoint: Folders, tmp_path: Path, family: str) -> None:
    source = checkpoint(family)
    convert(source, tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    assert_same_tensors(tmp_path / "back", source)
    asymmetric = checkpoint(family, QuantScheme(4, 32, False), format="awq")
    with pytest.raises(LowbitError, match=r"experts.*transformers cannot load experts in w4g32-asym"):
        convert(asymmetric, tmp_path / "no", "compressed-tensors")


def test_symmetric_weights_as_awq(checkpoint: Folders, tmp_path: Path) -> None:
    """The same grid under another name: zeros that all lie in the middle."""
    source = checkpoint("llama")
    result = convert(source, tmp_path / "awq", "awq")
    assert result.layers == {"w4g32-asym": 21}
    assert result.notes == ["awq has no symmetric scheme: zeros are stored, all in the middle"]
    assert_same_weights(tmp_path / "awq", source)


def test_sidecars_and_config(tiny_model: Folders, tmp_path: Path) -> None:
    packed, _ = foreign(tiny_model("llama"), tmp_path / "stranger", "gptq", True, act_order=False)
    (packed / "quantize_config.json").write_text('{"bits": 4}')
    (packed / "chat_template.jinja").write_text("{{ messages }}")
    convert(packed, tmp_path / "ct", "compressed-tensors")
    names = {file.name for file in (tmp_path / "ct").iterdir()}
    assert "quantize_config.json" not in names
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    } <= names
    before, after = (json.loads((f / "config.json").read_text()) for f in (packed, tmp_path / "ct"))
    assert after.pop("quantization_config")["ignore"] == ["lm_head"]
    del before["quantization_config"]
    assert after == before


def test_act_order_is_carried_where_it_can_be(tiny_model: Folders, tmp_path: Path) -> None:
    packed, dense = foreign(tiny_model("llama"), tmp_path / "stranger", "gptq", False, act_order=True)
    result = convert(packed, tmp_path / "v2", "gptq-v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["desc_act"]
    assert result.notes == ["groups are scattered over the columns (act-order), as in the source"]
    assert_same_weights(tmp_path / "v2", dense)
    convert(tmp_path / "v2", tmp_path / "back", "gptq")
    assert_same_tensors(tmp_path / "back", packed)


def refusal(tmp_path: Path, source: Path, format: str) -> str:
    before = snapshot(tmp_path)
    with pytest.raises(LowbitError) as error:
        convert(source, tmp_path / "deep" / "out", format)
    assert snapshot(tmp_path) == before, "something was left behind"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_act_order_is_refused_elsewhere(tiny_model: Folders, tmp_path: Path) -> None:
    packed, dense = foreign(tiny_model("llama"), tmp_path / "stranger", "gptq", True, act_order=True)
    line = refusal(tmp_path, packed, "compressed-tensors")
    assert "_proj: groups are scattered over the columns (act-order), which compressed-tensors" in line
    result = convert(packed, tmp_path / "ct", "compressed-tensors", lossy=True)
    assert len(result.requantized) == 21
    assert set(result.requantized.values()) == {
        "groups are scattered over the columns (act-order), which compressed-tensors can't hold"
    }
    name = "model.layers.1.mlp.down_proj.weight"
    rounded, original = dense_state(tmp_path / "ct")[name].float(), dense_state(dense)[name].float()
    error = (rounded - original).norm() / original.norm()
    assert 0.01 < error < 0.2  # rounded again, and columns in their own order


def test_only_what_must_is_rounded_again(checkpoint: Folders, tmp_path: Path) -> None:
    tiny = "model.layers.0.mlp.up_proj"

    def shrink(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        tensors[f"{tiny}.weight_scale"] *= 2.0**-20  # below what float16 holds with eight bits

    source = spoil(checkpoint("llama"), tmp_path / "source", shrink)
    line = refusal(tmp_path, source, "gptq")
    assert line.startswith(f"{tiny}: a scale of ")
    assert line.endswith(
        "is not exact in float16: use --format compressed-tensors, or --lossy to quantize again"
    )
    result = convert(source, tmp_path / "gptq", "gptq", lossy=True)
    assert list(result.requantized) == [tiny]


def test_a_zero_of_0(tiny_model: Folders, tmp_path: Path) -> None:
    packed, _ = foreign(tiny_model("llama"), tmp_path / "stranger", "gptq_v2", False, act_order=False)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.qzeros"
    tensors[name] &= ~0xF  # the first zero of every word
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    assert "cannot store a zero of 0: use --format gptq-v2" in refusal(tmp_path, packed, "gptq")
    convert(packed, tmp_path / "awq", "awq")
    assert_same_weights(tmp_path / "awq", packed)


@pytest.mark.parametrize(
    ("scheme", "format", "expected"),
    [
        (QuantScheme(8, 32), "awq", "awq holds 4 bits only, got bits=8"),
        (QuantScheme(3, 32), "zip", "format='zip' is unknown: use one of"),
    ],
)
def test_refusals(
    checkpoint: Folders, tmp_path: Path, scheme: QuantScheme, format: str, expected: str
) -> None:
    assert expected in refusal(tmp_path, checkpoint("llama", scheme), format)


def test_eight_bits_to_awq_with_lossy(checkpoint: Folders, tmp_path: Path) -> None:
    result = convert(checkpoint("llama", QuantScheme(8, 32)), tmp_path / "awq", "awq", lossy=True)
    assert len(result.requantized) == 21
    assert set(result.requantized.values()) == {"codes of 8 bits can't be carried over to 4 bits"}


def test_rounded_activations_are_not_lost(checkpoint: Folders, tmp_path: Path) -> None:
    source = checkpoint("llama", QuantScheme(8, -1, activation_bits=8))
    assert "gptq knows no rounded activations, got w8a8" in refusal(tmp_path, source, "gptq")
    convert(source, tmp_path / "again", "compressed-tensors")
    assert_same_tensors(tmp_path / "again", source)


def test_what_is_not_quantized(tiny_model: Folders, tmp_path: Path) -> None:
    assert "is not quantized: use lowbit quantize" in refusal(tmp_path, tiny_model("llama"), "gptq")
    source = shutil.copytree(tiny_model("llama"), tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    assert "is quantized as fp8, which lowbit can't read" in refusal(tmp_path, source, "gptq")


def test_a_layer_across_two_files(checkpoint: Folders, tmp_path: Path) -> None:
    source = checkpoint("llama", max_shard_size="3KB")
    files = defaultdict(set)
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                files[key.rpartition(".")[0]].add(file)
    assert any(len(found) > 1 for found in files.values())
    convert(source, tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    assert_same_tensors(tmp_path / "back", source)


def test_a_wrong_byte_is_found(checkpoint: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.formats import gptq

    honest = gptq.pack

    def pack(weight: Any) -> dict[str, torch.Tensor]:
        tensors = honest(weight)
        tensors["qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(gptq, "pack", pack)
    source, before = checkpoint("llama"), snapshot(tmp_path)
    with pytest.raises(VerificationError, match=r"_proj read back from .* differs from the source's"):
        convert(source, tmp_path / "out", "gptq")
    assert snapshot(tmp_path) == before
