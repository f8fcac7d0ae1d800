"""Rounded activations from end to end: the scheme, the folds, the checkpoint, and everyone who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import QuantScheme, hf, int8
from lowbit.activations import round_rows
from lowbit.algorithms import rtn, smooth
from lowbit.calibration import RoundedInputs
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats import compressed_tensors as ct
from lowbit.formats import gptq, int_quantized
from lowbit.inspection import inspect
from lowbit.quantizer import find_format, quant_layers
from lowbit.results import Report
from lowbit.topology import matrices
from tests.formats.samples import random_weight
from tests.packed import IDS, assert_saved_as_read, distance, logits, spoil

W8A8 = QuantScheme(8, -1, activation_bits=8)
NAME = "model.layers.0.mlp.up_proj"
# Two roundings of the same activations that differ by half a percent of a step: as far apart as either is
# from the original. A wrong scale moves logits by one and more.
NOISE = 0.12


@pytest.mark.parametrize("fields", [(4, -1, True), (8, 32, True), (8, -1, False)], ids=str)
def test_activations_need_eight_bits_a_row(fields: tuple[int, int, bool]) -> None:
    with pytest.raises(LowbitError, match=r"needs weights in w8row, not \w"):
        QuantScheme(*fields, activation_bits=8)
    with pytest.raises(LowbitError, match="activation_bits=4 is not supported: use 8"):
        QuantScheme(8, -1, activation_bits=4)


def test_bytes_are_the_library_s() -> None:
    weight = random_weight(W8A8, (48, 96), torch.bfloat16)
    tensors = ct.pack(weight)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "weight": (torch.int8, (48, 96)),
        "weight_scale": (torch.bfloat16, (48, 1)),
    }
    group = ct.quantization_config({NAME: W8A8}, ["lm_head"])["config_groups"]["group_0"]
    library = QuantizationScheme.model_validate(group)
    assert (library.format, library.input_activations.dynamic) == ("int-quantized", True)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    dense = compressor.decompress(tensors, library)["weight"]
    assert torch.equal(dense, weight.dequantize(torch.bfloat16))


def config_with(**activations: object) -> dict[str, Any]:
    config = json.loads(json.dumps(ct.quantization_config({NAME: W8A8}, [])))
    config["config_groups"]["group_0"]["input_activations"] |= activations
    return config


@pytest.mark.parametrize(
    "change", [{"dynamic": False}, {"strategy": "tensor"}, {"symmetric": False}], ids=str
)
def test_other_activations_are_not_ours(change: dict[str, object]) -> None:
    assert find_format(config_with()) == "compressed-tensors"
    assert ct.read_config(config_with(), NAME) == W8A8
    assert find_format(config_with(**change)) is None  # `enable` leaves it to transformers
    with pytest.raises(LowbitError, match=f"{NAME}: input_activations have {next(iter(change))}="):
        ct.read_config(config_with(**change), NAME)


def test_formats_without_activations_refuse() -> None:
    with pytest.raises(LowbitError, match="gptq knows no rounded activations, got w8a8"):
        gptq.check({NAME: W8A8}, [])
    with pytest.raises(LowbitError, match="int-quantized weights alone"):
        ct.check({NAME: W8A8, "lm_head": QuantScheme(8, -1)}, [])
    with pytest.raises(LowbitError, match="activations of a Expert can't be rounded"):
        ct.check_layer("experts.0", 32, 32, W8A8, "Expert")


def outliers(tokens: int = 200, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations three of whose channels are fifty times larger, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    x[:, :3] *= 50
    return x, torch.randn(32, width, generator=generator)


def output_error(x: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor | None) -> float:
    scaled, inputs = (weight, x) if factors is None else (weight * factors, x / factors)
    rounded = rtn.quantize_weight(scaled, None, W8A8, torch.bfloat16)[0].dequantize()
    return (round_rows(inputs) @ rounded.T - x @ weight.T).square().mean().item()


def test_smoothing_takes_outliers_out() -> None:
    x, weight = outliers()
    factors = smooth.find_channel_scales([weight], x, x.abs().amax(0), W8A8, torch.bfloat16)
    assert factors is not None
    assert factors[:3].min() > 2 * factors[3:].max()
    assert output_error(x, weight, factors) < 0.2 * output_error(x, weight, None)


def test_the_candidates_are_equation_4() -> None:
    x, weight = outliers()
    peaks = x.abs().amax(0)
    factors = smooth.find_channel_scales([weight], x, peaks, W8A8, torch.bfloat16, alphas=(0.5,))
    expected = peaks.sqrt() / weight.abs().amax(0).sqrt()
    ratio = factors / expected
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_nothing_to_smooth(value: float) -> None:
    x, weight = torch.full((4, 64), value), torch.randn(8, 64)
    assert smooth.find_channel_scales([weight], x, x.abs().amax(0), W8A8, torch.bfloat16) is None


def test_inputs_are_rounded_only_where_wanted() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    first, _ = matrices(block, "block")
    x = torch.randn(3, 16)
    with torch.no_grad(), RoundedInputs([first]):
        found = block(x)
    assert torch.equal(found, block[1](block[0](round_rows(x))))


Quantize = Callable[..., Report]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_end_to_end(quantize: Quantize, tiny_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    source = tiny_model(family)
    report = quantize(str(source), W8A8, method="gptq")
    assert (report.scheme, report.warnings) == ("w8a8", [])
    assert report.verification is not None
    folder = tmp_path / "out"
    parts = [part for part in inspect(folder).parts if part.quantized]
    assert {part.scheme for part in parts} == {"w8a8"}
    assert all(8 < part.bits_per_weight <= 8 + 16 / 32 for part in parts)
    model = lowbit.load(folder)
    layers = quant_layers(model)
    assert layers
    assert all(isinstance(layer.operand, int8.Operand) for layer in layers)
    stock = hf.load_stock(folder)
    original = logits(hf.load(source))
    for rows in (1, 40):
        assert distance(logits(model, rows), logits(stock, rows)) < NOISE
    assert distance(logits(model), original) < NOISE
    assert_saved_as_read(model, folder, tmp_path / "again")
    assert torch.equal(logits(lowbit.load(tmp_path / "again")), logits(model))


def test_dense_is_no_way_to_load_it(
    quantize: Quantize, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A dense model would leave the activations as they are, and be measured as better than it is."""
    quantize(str(tiny_model("llama")), W8A8)
    model = hf.load(tmp_path / "out", packed=False)
    assert torch.equal(logits(model), logits(lowbit.load(tmp_path / "out")))
    with lowbit.enable():
        switched = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(switched), logits(model))
    answer = model.generate(IDS[:1, :8], max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 8


def test_folds_are_written(quantize: Quantize, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Calibrated, norms take the factors; without data nothing but the linear layers changes."""
    source = tiny_model("llama")
    original = load_file(source / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    for method, same in (("rtn", True), ("gptq", False)):
        quantize(str(source), W8A8, method=method, output=tmp_path / method)
        found = load_file(tmp_path / method / "model.safetensors")
        assert torch.equal(found[norm], original[norm]) is same


def test_the_noise_of_rounding_is_no_mistake(
    quantize: Quantize, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader rounds activations by its own rule; what isn't rounded is held to the usual tolerance."""
    monkeypatch.setattr("lowbit.verify.TOLERANCE", -1.0)
    report = quantize(str(tiny_model("llama")), W8A8)
    assert report.verification is not None
    assert 0 < report.verification.kl < 0.05
    with pytest.raises(VerificationError):
        quantize(str(tiny_model("llama")), QuantScheme(8, -1), overwrite=True)


def test_awq_is_refused(quantize: Quantize, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"method='awq'.*use gptq or rtn"):
        quantize(str(tiny_model("llama")), W8A8, method="awq")
    assert not (tmp_path / "out").exists()


SPOILED = {
    "scales of groups": lambda t: t.update(
        {f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"].expand(-1, 2).contiguous()}
    ),
    "another shape": lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:, :32].contiguous()}),
    "no scales": lambda t: t.pop(f"{NAME}.weight_scale"),
}


@pytest.mark.parametrize("change", SPOILED.values(), ids=SPOILED)
def test_tensors_that_do_not_fit(
    checkpoint: Callable[..., Path], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = spoil(checkpoint("llama", W8A8), tmp_path / "spoiled", lambda tensors, _: change(tensors))
    with pytest.raises(LowbitError, match="up_proj"):
        lowbit.load(folder)


def test_unpack_refuses_a_dense_weight() -> None:
    with pytest.raises(LowbitError, match="needs int8"):
        int_quantized.unpack({"weight": torch.zeros(4, 4), "weight_scale": torch.ones(4, 1)}, W8A8)
