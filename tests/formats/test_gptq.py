"""The GPTQ layout against an independent packer, in both conventions for zeros."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from transformers import GPTQConfig

from lowbit.errors import LowbitError
from lowbit.formats import gptq
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import SUPPORTED_BITS, QuantScheme
from tests.formats import reference
from tests.formats.samples import assert_same, random_weight

NAME = "model.layers.0.mlp.up_proj"
V1, V2 = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}
SCHEMES = [QuantScheme(*grid) for grid in itertools.product(SUPPORTED_BITS, (32, 128, -1), (True, False))]


def foreign(weight: QuantizedWeight, v1: bool) -> dict[str, torch.Tensor]:
    """The tensors as another tool writes them."""
    codes, zeros = weight.codes.numpy().astype("int64"), weight.zeros.numpy().astype("int64")
    qweight, qzeros = reference.gptq(codes, zeros, weight.scheme.bits, v1)
    groups = torch.arange(weight.shape[1]) // weight.scheme.columns_per_group(weight.shape[1])
    return {
        "qweight": torch.tensor(qweight.copy()),
        "qzeros": torch.tensor(qzeros.copy()),
        "scales": weight.scales.t().contiguous(),
        "g_idx": groups.int(),
    }


def test_bytes_written_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)  # every output channel: 0, 1, ... 7 along `in`
    codes[7] = 15
    zeros = torch.tensor([[1], [2], [3], [4], [5], [6], [8], [15]], dtype=torch.uint8)
    scales = -torch.arange(1, 9).half()[:, None]
    tensors = gptq.pack(QuantizedWeight(codes, scales, zeros, QuantScheme(4, -1, symmetric=False)))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (1, 8)),
        "qzeros": (torch.int32, (1, 1)),
        "scales": (torch.float16, (1, 8)),
        "g_idx": (torch.int32, (8,)),
    }
    assert tensors["qweight"].tolist() == [[0x76543210] * 7 + [-1]]
    assert tensors["qzeros"].item() & 0xFFFFFFFF == 0xE7543210  # zeros - 1
    assert tensors["scales"].tolist() == [[-1, -2, -3, -4, -5, -6, -7, -8]]
    assert tensors["g_idx"].tolist() == [0] * 8


def test_symmetric_zeros_are_the_known_constant() -> None:
    tensors = gptq.pack(random_weight(QuantScheme(4, 32), (64, 64), torch.float16))
    assert (tensors["qzeros"] == 0x77777777).all()
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_naive_packer(scheme: QuantScheme) -> None:
    weight = random_weight(scheme, (32, 128), torch.float16)
    expected, tensors = foreign(weight, v1=True), gptq.pack(weight)
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_reads_both_conventions(scheme: QuantScheme, v1: bool) -> None:
    weight = random_weight(scheme, (64, 256), torch.float16)
    assert_same(gptq.unpack(foreign(weight, v1), scheme, V1 if v1 else V2), weight)


@pytest.mark.parametrize("zero", [1, 8, 15])
def test_zeros_at_the_ends(zero: int) -> None:
    scheme = QuantScheme(4, 32, symmetric=False)
    weight = random_weight(scheme, (8, 32), torch.float16)
    weight.zeros.fill_(zero)
    tensors = gptq.pack(weight)
    assert tensors["qzeros"].item() & 0xFFFFFFFF == (zero - 1) * 0x11111111
    assert_same(gptq.unpack(tensors, scheme, V1), weight)
    assert_same(gptq.unpack(foreign(weight, v1=False), scheme, V2), weight)


def test_a_zero_of_0_cannot_be_written_but_can_be_read_from_v2() -> None:
    scheme = QuantScheme(4, 32, symmetric=False)
    weight = random_weight(scheme, (8, 32), torch.float16)
    weight.zeros[3] = 0
    with pytest.raises(LowbitError, match="zero of 0"):
        gptq.pack(weight)
    tensors = foreign(weight, v1=False)
    assert_same(gptq.unpack(tensors, scheme, V2), weight)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    with pytest.raises(LowbitError, match="qzeros hold 15"):
        gptq.unpack(tensors, scheme, V1)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_symmetric_zeros_betray_a_wrong_convention(bits: int) -> None:
    scheme = QuantScheme(bits, 32)
    weight = random_weight(scheme, (32, 64), torch.float16)
    for v1, config in ((False, V1), (True, V2)):
        with pytest.raises(LowbitError, match="checkpoint_format"):
            gptq.unpack(foreign(weight, v1), scheme, config)


def test_activation_order_is_refused_and_a_trivial_one_read() -> None:
    scheme = QuantScheme(4, 32)
    weight = random_weight(scheme, (32, 64), torch.float16)
    tensors = gptq.pack(weight)
    config = {"desc_act": True}
    assert_same(gptq.unpack(tensors, scheme, config), weight)  # static groups: g_idx is natural
    shuffled = tensors | {"g_idx": tensors["g_idx"].flip(0)}
    with pytest.raises(LowbitError, match="g_idx is not in natural order"):
        gptq.unpack(shuffled, scheme, {})
    del tensors["g_idx"]
    assert_same(gptq.unpack(tensors, scheme, {}), weight)
    with pytest.raises(LowbitError, match="g_idx is not in natural order"):
        gptq.unpack(tensors, scheme, config)


# -------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_stock_transformers_parses_the_config(scheme: QuantScheme) -> None:
    config = gptq.quantization_config({NAME: scheme}, ["lm_head"])
    assert "meta" not in config
    assert "modules_in_block_to_quantize" not in config
    assert {"bits", "group_size", "desc_act", "sym"} <= set(config)  # what vLLM and SGLang insist on
    parsed = GPTQConfig.from_dict(json.loads(json.dumps(config)))
    assert (parsed.bits, parsed.group_size, parsed.sym) == (scheme.bits, scheme.group_size, scheme.symmetric)
    assert (parsed.format, parsed.desc_act) == ("gptq", False)


def test_dense_modules_of_a_block_are_named_by_their_siblings() -> None:
    schemes = {
        f"model.layers.{i}.mlp.{part}": QuantScheme() for i in (0, 1) for part in ("up_proj", "down_proj")
    }
    config = gptq.quantization_config(
        schemes, ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    )
    assert config["modules_in_block_to_quantize"] == [["mlp.down_proj", "mlp.up_proj"]]


def test_dynamic_rules_are_followed() -> None:
    config: dict[str, Any] = {
        "bits": 4,
        "group_size": 128,
        "dynamic": {
            "-:.*lm_head": {},
            r"+:.*\.layers\.1\..*": {"bits": 8, "group_size": 32, "desc_act": False},
            ".*": {"sym": False},
        },
    }
    assert gptq.read_config(config, "model.layers.1.mlp.up_proj") == QuantScheme(8, 32)
    assert gptq.read_config(config, NAME) == QuantScheme(4, 128, False)
    with pytest.raises(LowbitError, match="says it is dense"):
        gptq.read_config(config, "lm_head")


def test_config_refusals() -> None:
    with pytest.raises(LowbitError, match="checkpoint_format='marlin'"):
        gptq.read_config({"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, NAME)
    with pytest.raises(LowbitError, match="one scheme per checkpoint, got w4g128, w8g128"):
        gptq.check({NAME: QuantScheme(4), "model.layers.0.mlp.down_proj": QuantScheme(8)}, [])
    with pytest.raises(LowbitError, match=r"lm_head: gptq.*--skip lm_head"):
        gptq.check({NAME: QuantScheme(), "lm_head": QuantScheme()}, [])
    with pytest.raises(LowbitError, match=r"model\.layers\.1\.mlp\.up_proj: gptq cannot leave it"):
        gptq.quantization_config({NAME: QuantScheme()}, ["model.layers.1.mlp.up_proj"])


@pytest.mark.parametrize(("bits", "multiple"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_sizes_that_fill_no_whole_word_are_refused(bits: int, multiple: int) -> None:
    scheme = QuantScheme(bits, -1)
    gptq.check_layer(NAME, multiple, multiple, scheme, "Conv1D")
    uneven = multiple + multiple // 2
    with pytest.raises(LowbitError, match=rf"{NAME}: in_features={uneven} is no multiple of {multiple}"):
        gptq.check_layer(NAME, multiple, uneven, scheme, "Linear")
    with pytest.raises(LowbitError, match=rf"{NAME}: out_features={uneven} is no multiple of {multiple}"):
        gptq.check_layer(NAME, uneven, multiple, scheme, "Linear")


def test_warnings_name_the_engines() -> None:
    def lines(scheme: QuantScheme) -> str:
        return "\n".join(gptq.warnings({NAME: scheme}, {NAME: (128, 128)}))

    assert lines(QuantScheme(4)) == "transformers will not load this without `pip install gptqmodel optimum`"
    assert "vLLM and SGLang" in lines(QuantScheme(4, symmetric=False))
    assert "vLLM and SGLang" in lines(QuantScheme(3))
    assert "vLLM on CPU" in lines(QuantScheme(8))
