"""The layout against compressed-tensors itself, and against stock transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.algorithms import rtn
from lowbit.errors import LowbitError
from lowbit.formats import compressed_tensors as ct
from lowbit.scheme import SUPPORTED_BITS, QuantScheme
from tests.formats.samples import random_weight

W4, W8, W4ASYM = QuantScheme(4, 32), QuantScheme(8, 32), QuantScheme(4, 32, False)
SCHEMES = [QuantScheme(*grid) for grid in itertools.product(SUPPORTED_BITS, (32, 128, -1), (True, False))]


def library_scheme(scheme: QuantScheme) -> QuantizationScheme:
    config = ct.quantization_config({"model.layers.0.mlp.up_proj": scheme}, [])
    return QuantizationScheme.model_validate(config["config_groups"]["group_0"])


def test_bytes_written_by_hand() -> None:
    scheme = QuantScheme(4, -1, symmetric=False)
    weight = random_weight(scheme, (2, 9), torch.bfloat16)
    weight.codes.copy_(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [15, 14, 13, 12, 11, 10, 9, 8, 7]]))
    weight.zeros.copy_(torch.tensor([[1], [15]]))
    tensors = ct.pack(weight)
    assert list(tensors) == ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"]
    assert (tensors["weight_packed"].long() & 0xFFFFFFFF).tolist() == [[0x76543210, 0x8], [0x89ABCDEF, 0x7]]
    assert tensors["weight_zero_point"].tolist() == [[0xF1]]
    assert tensors["weight_shape"].tolist() == [2, 9]
    assert tensors["weight_shape"].dtype == torch.int64
    assert tensors["weight_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(32, 128), (33, 384), (5, 256)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_library_s_helpers(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_weight(scheme, shape, torch.bfloat16)
    tensors = ct.pack(weight)
    codes = (weight.codes.int() - scheme.middle).to(torch.int8)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(codes, scheme.bits))
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], scheme.bits, torch.Size(shape)), codes)
    assert ("weight_zero_point" in tensors) is not scheme.symmetric
    if not scheme.symmetric:
        zeros = (weight.zeros.int() - scheme.middle).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, scheme.bits, packed_dim=0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_decompresses_to_our_weight_bit_for_bit(scheme: QuantScheme) -> None:
    weight = random_weight(scheme, (48, 256), torch.bfloat16)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    dense = compressor.decompress(ct.pack(weight), library_scheme(scheme))["weight"]
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits <= 4], ids=str)
def test_the_library_compresses_the_same_weight_to_the_same_bytes(scheme: QuantScheme) -> None:
    """Only up to 4 bits: at 8 the library cannot find our codes again from a weight in bfloat16."""
    weight = random_weight(scheme, (48, 256), torch.bfloat16)
    state = {"weight": weight.dequantize(torch.bfloat16), "weight_scale": weight.scales}
    state["weight_zero_point"] = (weight.zeros.int() - scheme.middle).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs, ours = compressor.compress(state, library_scheme(scheme)), ct.pack(weight)
    assert sorted(theirs) == sorted(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_three_bit_words_of_older_releases_are_refused() -> None:
    scheme = QuantScheme(3, 32)
    tensors = ct.pack(random_weight(scheme, (8, 128), torch.bfloat16))
    tensors["weight_packed"] = torch.zeros(8, 13, dtype=torch.int32)  # ten codes a word
    with pytest.raises(LowbitError, match=r"\(8, 13\).*\(8, 12\).*compressed-tensors >= 0\.18"):
        ct.unpack(tensors, scheme, {})


def test_float16_scales_are_read_as_they_are() -> None:
    weight = random_weight(W4, (8, 64), torch.bfloat16)
    tensors = ct.pack(weight) | {"weight_scale": weight.scales.half()}
    assert ct.unpack(tensors, W4, {}).scales.dtype == torch.float16


def is_expert(name: str) -> bool:
    return ".experts." in name


MODELS = {
    "w4": ("llama", lambda name: W4),
    "w3row": ("llama", lambda name: QuantScheme(3, -1)),
    "w4-asym": ("llama", lambda name: W4ASYM),
    "mixed": ("llama", lambda name: W8 if ".layers.1." in name or "down" in name else W4),
    "head": ("llama", lambda name: W8 if name == "lm_head" else W4),
    "experts": ("qwen3_moe", lambda name: W4),
    "experts-and-head": ("qwen3_moe", lambda name: W8 if name == "lm_head" else W4),
    "mixed-experts": ("qwen3_moe", lambda name: W4 if is_expert(name) else W8),
}


@pytest.mark.parametrize(("family", "choose"), MODELS.values(), ids=MODELS)
def test_stock_transformers_runs_it(
    family: str,
    choose: Callable[[str], QuantScheme],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The packed checkpoint gives the logits of a dense one that holds our dequantized weights."""
    source = tiny_model(family, tied=False)
    packed, dense, schemes = {}, {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        name = key.removesuffix(".weight")
        quantized = name.endswith("_proj") or (name == "lm_head" and "head" in request.node.callspec.id)
        if not quantized:
            packed[key] = dense[key] = tensor
            continue
        schemes[name] = choose(name)
        weight, _ = rtn.quantize_weight(tensor, None, schemes[name], ct.SCALE_DTYPE)
        packed |= {f"{name}.{suffix}": part for suffix, part in ct.pack(weight).items()}
        dense[key] = weight.dequantize(torch.bfloat16)
    ignore = [name for name in ("lm_head",) if name not in schemes]
    logits = {}
    for kind, tensors in (("packed", packed), ("dense", dense)):
        config = AutoConfig.from_pretrained(source)
        if kind == "packed":
            config.quantization_config = ct.quantization_config(schemes, ignore)
        config.save_pretrained(tmp_path / kind)
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.bfloat16)
        with torch.no_grad():
            logits[kind] = model(torch.arange(3, 35)[None]).logits
    assert torch.isfinite(logits["packed"]).all()
    assert torch.equal(logits["packed"], logits["dense"])
