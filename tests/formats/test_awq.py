"""The AWQ GEMM layout against an independent packer."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AwqConfig

from lowbit.errors import LowbitError
from lowbit.formats import awq
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme
from tests.formats import reference
from tests.formats.samples import assert_same, random_weight

NAME = "model.layers.0.mlp.up_proj"
SCHEMES = [QuantScheme(4, group_size, symmetric=False) for group_size in (32, 64, 128, -1)]


def test_bytes_written_by_hand() -> None:
    codes = torch.tensor([[0], [1], [2], [3], [4], [5], [6], [15]], dtype=torch.uint8).repeat(1, 8)
    zeros = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)
    scales = torch.arange(1, 9).half()[:, None]
    tensors = awq.pack(QuantizedWeight(codes, scales, zeros, SCHEMES[-1]))
    # From the lowest nibble up: columns 0, 2, 4, 6, 1, 3, 5, 7.
    assert (tensors["qweight"].long() & 0xFFFFFFFF).tolist() == [[0xF5316420]] * 8
    assert tensors["qzeros"].item() & 0xFFFFFFFF == 0x86427531
    assert tensors["scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("shape", [(8, 128), (24, 256), (96, 384)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_naive_packer(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_weight(scheme, shape, torch.float16)
    qweight, qzeros = reference.awq(weight.codes.numpy(), weight.zeros.numpy())
    tensors = awq.pack(weight)
    assert tensors["qweight"].dtype == tensors["qzeros"].dtype == torch.int32
    assert tensors["qweight"].tolist() == qweight.tolist()
    assert tensors["qzeros"].tolist() == qzeros.tolist()
    assert torch.equal(tensors["scales"], weight.scales.t())


@pytest.mark.parametrize("zero", [0, 1, 8, 15])
def test_every_zero_is_stored_as_it_is(zero: int) -> None:
    weight = random_weight(SCHEMES[0], (8, 32), torch.float16)
    weight.zeros.fill_(zero)
    tensors = awq.pack(weight)
    assert tensors["qzeros"].item() & 0xFFFFFFFF == zero * 0x11111111
    assert_same(awq.unpack(tensors, SCHEMES[0], {}), weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_stock_transformers_parses_the_config(scheme: QuantScheme) -> None:
    config = awq.quantization_config({NAME: scheme}, ["lm_head"])
    parsed = AwqConfig.from_dict(json.loads(json.dumps(config)))
    assert (parsed.bits, parsed.group_size, parsed.zero_point) == (4, scheme.group_size, True)
    assert parsed.format == "gemm"
    assert parsed.modules_to_not_convert == ["lm_head"]
    assert awq.quantization_config({NAME: scheme}, [])["modules_to_not_convert"] is None


def test_refusals() -> None:
    asym, layer = SCHEMES[0], "model.layers.0.mlp.gate_proj"
    with pytest.raises(LowbitError, match="w4g128: use --asymmetric"):
        awq.check({NAME: QuantScheme()}, [])
    with pytest.raises(LowbitError, match="bits=8"):
        awq.check_layer(NAME, 64, 64, QuantScheme(8, 32, False), "Linear")
    with pytest.raises(LowbitError, match="--format gptq"):
        awq.check_layer("transformer.h.0.attn.c_attn", 64, 64, asym, "Conv1D")
    with pytest.raises(LowbitError, match=rf"{NAME}: out_features=12 is no multiple of 8"):
        awq.check_layer(NAME, 12, 32, asym, "Linear")
    with pytest.raises(LowbitError, match="lm_head: awq loaders quantize only decoder blocks"):
        awq.check({NAME: asym, "lm_head": asym}, [])
    with pytest.raises(LowbitError, match=r"mlp\.gate: awq loaders would leave .*gate_proj"):
        awq.check({layer: asym}, ["model.layers.0.mlp.gate"])
    with pytest.raises(LowbitError, match="one scheme per checkpoint"):
        awq.check({NAME: asym, layer: SCHEMES[1]}, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_point": False}, "--asymmetric"),
        ({"version": "gemv"}, "version='gemv'"),
        ({"bits": 8}, "bits=8"),
    ],
)
def test_read_config_refuses(change: dict[str, object], message: str) -> None:
    config = awq.quantization_config({NAME: SCHEMES[0]}, [])
    assert awq.read_config(config | {"version": "GEMM"}, NAME) == SCHEMES[0]
    with pytest.raises(LowbitError, match=message):
        awq.read_config(config | change, NAME)


def test_warnings_name_the_engines() -> None:
    (line,) = awq.warnings({NAME: SCHEMES[0]}, {NAME: (128, 128)})
    assert line == "transformers will not load this without `pip install gptqmodel`"
