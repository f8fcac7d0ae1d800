"""What every format owes: what goes in comes out, and the checkpoint's config says what it was."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from lowbit import grid
from lowbit.algorithms import rtn
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format
from lowbit.scheme import SUPPORTED_BITS, QuantScheme
from tests.formats.samples import assert_same, random_weight

SCHEMES = [
    QuantScheme(bits, group_size, symmetric)
    for bits, group_size, symmetric in itertools.product(SUPPORTED_BITS, (32, 64, 128, -1), (True, False))
] + [QuantScheme(8, -1, activation_bits=8)]
NAME = "model.layers.0.mlp.up_proj"
SHAPES = [(32, 128), (96, 384), (64, 640)]


def holds(fmt: Format, scheme: QuantScheme) -> bool:
    try:
        fmt.check({NAME: scheme}, [])
    except LowbitError:
        return False
    return True


CASES = [
    pytest.param(fmt, scheme, id=f"{name}-{scheme}")
    for name, fmt in FORMATS.items()
    for scheme in SCHEMES
    if holds(fmt, scheme)
]


def test_every_format_is_tried() -> None:
    counted = {name: sum(case.values[0] is fmt for case in CASES) for name, fmt in FORMATS.items()}
    assert counted == {"compressed-tensors": 33, "gptq": 32, "gptq-v2": 32, "awq": 4}


@pytest.mark.parametrize(("fmt", "scheme"), CASES)
def test_round_trip(fmt: Format, scheme: QuantScheme) -> None:
    config = json.loads(json.dumps(fmt.quantization_config({NAME: scheme}, ["lm_head"])))
    assert config["quant_method"] == fmt.QUANT_METHOD
    assert fmt.read_config(config, NAME) == scheme
    for seed, shape in enumerate(SHAPES):
        fmt.check_layer(NAME, *shape, scheme, "Linear")
        weight = random_weight(scheme, shape, fmt.SCALE_DTYPE, seed)
        tensors = fmt.pack(weight)
        assert set(tensors) <= set(fmt.TENSORS)
        assert all(tensor.is_contiguous() for tensor in tensors.values())  # as safetensors wants them
        assert_same(fmt.unpack(tensors, scheme, config), weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (5, 256), (33, 384)], ids=str)
def test_compressed_tensors_round_trip_at_odd_heights(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    fmt = FORMATS["compressed-tensors"]
    weight = random_weight(scheme, shape, fmt.SCALE_DTYPE)
    assert_same(fmt.unpack(fmt.pack(weight), scheme, {}), weight)


@pytest.mark.parametrize("shape", [(3, 1), (2, 31), (7, 33), (5, 77)], ids=str)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_compressed_tensors_round_trip_of_odd_rows(bits: int, shape: tuple[int, int]) -> None:
    fmt = FORMATS["compressed-tensors"]
    for symmetric in (True, False):
        scheme = QuantScheme(bits, -1, symmetric)
        weight = random_weight(scheme, shape, fmt.SCALE_DTYPE)
        assert_same(fmt.unpack(fmt.pack(weight), scheme, {}), weight)


@pytest.mark.parametrize(("fmt", "scheme"), CASES)
def test_what_rounding_makes_survives(fmt: Format, scheme: QuantScheme) -> None:
    """Real grids: negative scales, and groups with no negative weight (whose zero would be 0)."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    weight[:4] = weight[:4].abs()
    quantized, _ = rtn.quantize_weight(weight, None, scheme, fmt.SCALE_DTYPE)
    if scheme.symmetric:
        assert (quantized.scales < 0).any()
    config = fmt.quantization_config({NAME: scheme}, [])
    again = fmt.unpack(fmt.pack(quantized), scheme, config)
    expected = grid.dequantize(quantized.codes, quantized.scales, quantized.zeros, scheme)
    assert torch.equal(again.dequantize(), expected)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_scales_of_another_dtype_are_refused(fmt: Format) -> None:
    assert fmt.SCALE_DTYPES[0] == fmt.SCALE_DTYPE
    for other in {torch.bfloat16, torch.float16, torch.float32} - set(fmt.SCALE_DTYPES):
        with pytest.raises(ValueError, match="scales must be"):
            fmt.pack(random_weight(QuantScheme(4, 32, False), (32, 64), other))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_missing_tensor_is_one_line(fmt: Format) -> None:
    scheme = QuantScheme(4, 32, False)
    tensors = fmt.pack(random_weight(scheme, (32, 64), fmt.SCALE_DTYPE))
    del tensors[fmt.TENSORS[1]]
    with pytest.raises(LowbitError, match=fmt.TENSORS[1]) as error:
        fmt.unpack(tensors, scheme, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_limits_shared_by_all(fmt: Format) -> None:
    with pytest.raises(LowbitError, match="no linear layer is left"):
        fmt.check({}, [])
    with pytest.raises(LowbitError, match=rf"{NAME}.*group_size=128 does not divide in_features=576"):
        fmt.check_layer(NAME, 64, 576, QuantScheme(4, 128, False), "Linear")
    with pytest.raises(LowbitError, match=r"quantization_config lacks"):
        fmt.read_config({"quantization_status": "compressed"}, NAME)


@pytest.mark.parametrize(
    ("shape", "group_size", "reason"),
    [
        ((576, 576), 64, r"\[576, 576\]"),
        ((96, 128), 32, r"\[96, 128\]"),
        ((128, 256), 256, "group_size=256"),
        ((128, 128), 128, None),
    ],
)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_sglang_shapes(fmt: Format, shape: tuple[int, int], group_size: int, reason: str | None) -> None:
    scheme = QuantScheme(4, group_size, symmetric=fmt.QUANT_METHOD != "awq")
    lines = [line for line in fmt.warnings({NAME: scheme}, {NAME: shape}) if line.startswith("SGLang")]
    if reason is None:
        assert not lines
    else:
        (line,) = lines
        assert reason.replace("\\", "") in line
