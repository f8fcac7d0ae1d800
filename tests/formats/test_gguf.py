"""Blocks of GGUF, read by the gguf package's own numpy code and by hand."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.formats.gguf import pack, steps, unpack
from lowbit.quantized import QuantizedWeight
from lowbit.scheme import QuantScheme
from tests.formats.samples import random_weight


def read_by_gguf(kind: str, data: torch.Tensor) -> torch.Tensor:
    """float32 `[out, in]` by code that shares nothing with lowbit."""
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


CASES = [
    (QuantScheme(4, 32), "Q4_0"),
    (QuantScheme(4, 128), "Q4_0"),
    (QuantScheme(4, -1), "Q4_0"),
    (QuantScheme(3, 64), "Q4_0"),
    (QuantScheme(2, 32), "Q4_0"),
    (QuantScheme(4, 32, False), "Q5_0"),
    (QuantScheme(8, 32), "Q8_0"),
    (QuantScheme(8, -1), "Q8_0"),
]


@pytest.mark.parametrize(("scheme", "expected"), CASES, ids=str)
def test_the_packages_own_reader_gets_the_same_weight(scheme: QuantScheme, expected: str) -> None:
    for seed in range(3):
        weight = random_weight(scheme, (24, 256), torch.float16, seed)
        kind, data = pack(weight)
        assert kind == expected
        assert torch.equal(read_by_gguf(kind, data), weight.dequantize())
        found, scales = unpack(kind, data)
        assert all(torch.equal(a, b) for a, b in zip((found, scales), steps(weight), strict=True))


def test_q4_1_where_its_smallest_value_is_exact() -> None:
    weight = random_weight(QuantScheme(4, 32, False), (24, 256), torch.float16)
    exact = QuantizedWeight(weight.codes, weight.scales.bfloat16().half(), weight.zeros & 14, weight.scheme)
    kind, data = pack(exact)
    assert kind == "Q4_1"
    assert torch.equal(read_by_gguf(kind, data), exact.dequantize())
    assert torch.equal(unpack(kind, data)[0], steps(exact)[0])


def test_bytes_by_hand() -> None:
    codes = torch.arange(32, dtype=torch.uint8).reshape(1, 32) % 16
    scales, middle = torch.tensor([[1.0]]).half(), torch.tensor([[8]], dtype=torch.uint8)
    kind, data = pack(QuantizedWeight(codes, scales, middle, QuantScheme(4, 32)))
    assert kind == "Q4_0"
    assert bytes(data[0].tolist()) == b"\x00\x3c" + bytes(17 * i for i in range(16))
    fifteen = torch.full((1, 1), 15, dtype=torch.uint8)
    kind, data = pack(QuantizedWeight(codes, scales * 1.001, fifteen, QuantScheme(4, 32, False)))
    assert kind == "Q5_0"  # steps -15 ... 0 are stored as 1 ... 16: the last has its fifth bit set
    assert np.frombuffer(bytes(data[0, 2:6].tolist()), "<u4")[0] == 1 << 15 | 1 << 31


def test_what_no_block_holds() -> None:
    with pytest.raises(LowbitError, match="groups of 16 columns are not made of gguf's blocks of 32"):
        pack(random_weight(QuantScheme(4, 16), (8, 64), torch.float16))
    with pytest.raises(LowbitError, match="steps around their zeros, and gguf's bytes from -128 to 127"):
        pack(random_weight(QuantScheme(8, 32, False), (8, 64), torch.float16))
    with pytest.raises(LowbitError, match="Q4_K is not a uniform grid"):
        unpack("Q4_K", torch.zeros(1, 144, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"scales must be torch\.float16"):
        pack(random_weight(QuantScheme(4, 32), (8, 64), torch.bfloat16))
    with pytest.raises(LowbitError, match="Q4_1 blocks have no zero on their grid"):
        unpack("Q4_1", torch.tensor([[0, 60, 1, 60, *([0] * 16)]], dtype=torch.uint8))
