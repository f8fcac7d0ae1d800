from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import packing
from lowbit.scheme import SUPPORTED_BITS
from tests.formats import reference

BITS = st.sampled_from(SUPPORTED_BITS)


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        # 0b11_10_01_00 is one byte of four 2-bit codes.
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        # Eight 3-bit codes fill three bytes: 0..7 are 0xFAC688; eleven codes spill into a second word.
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0x00FAC688]),
        (3, [0] * 10 + [0b101], [0x40000000, 0x1]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 0xF], [0x87654321, 0xF]),
        (8, [0x78, 0x56, 0x34, 0x12, 0xFF], [0x12345678, 0xFF]),
    ],
)
def test_words_written_by_hand(bits: int, codes: list[int], words: list[int]) -> None:
    packed = packing.pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in packed.tolist()] == words


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_the_naive_packer_and_comes_back(data: st.DataObject) -> None:
    bits = data.draw(BITS)
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=150))
    codes = torch.tensor([row, row[::-1]], dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.tolist() == reference.pack_rows(codes.numpy(), bits).tolist()
    assert packed.shape[-1] == packing.num_words(len(row), bits)
    assert torch.equal(packing.unpack(packed, bits, len(row)), codes)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_leading_dimensions_and_strides_do_not_matter(bits: int) -> None:
    codes = random_codes(3, 5, 67, bits=bits)
    packed = packing.pack(codes, bits)
    assert torch.equal(packing.unpack(packed, bits, 67), codes)
    transposed = codes.transpose(0, 2).contiguous().transpose(0, 2)
    assert not transposed.is_contiguous()
    assert torch.equal(packing.pack(transposed, bits), packed)
    scattered = packed.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(packing.unpack(scattered, bits, 67), codes)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_inputs_are_not_changed_and_outputs_are_contiguous(bits: int) -> None:
    codes = random_codes(4, 33, bits=bits)
    kept = codes.clone()
    packed = packing.pack(codes, bits)
    words = packed.clone()
    unpacked = packing.unpack(packed, bits, 33)
    assert torch.equal(codes, kept)
    assert torch.equal(packed, words)
    assert packed.is_contiguous()
    assert unpacked.is_contiguous()


def test_a_code_that_is_too_wide_is_refused() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit 3 bits"):
        packing.pack(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="uint8"):
        packing.pack(torch.tensor([1]), 4)


def test_a_wrong_number_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="fill 2 words, got 1"):
        packing.unpack(torch.zeros(1, dtype=torch.int32), 4, 9)
    with pytest.raises(ValueError, match="int32"):
        packing.unpack(torch.zeros(1), 4, 8)
