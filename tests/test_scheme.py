"""What a scheme accepts, refuses and costs."""

from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.scheme import SUPPORTED_BITS, QuantScheme


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (QuantScheme(), "w4g128"),
        (QuantScheme(3, 64, symmetric=False), "w3g64-asym"),
        (QuantScheme(8, -1), "w8row"),
    ],
)
def test_name(scheme: QuantScheme, name: str) -> None:
    assert str(scheme) == name


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, -4])
def test_refuses_bits(bits: int) -> None:
    with pytest.raises(LowbitError, match=rf"^bits={bits} .*2, 3, 4, 8"):
        QuantScheme(bits)


@pytest.mark.parametrize("group_size", [0, 1, 7, -2, -128])
def test_refuses_group_size(group_size: int) -> None:
    with pytest.raises(LowbitError, match=rf"^group_size={group_size} "):
        QuantScheme(4, group_size)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_levels(bits: int) -> None:
    scheme = QuantScheme(bits)
    assert scheme.levels == 2 * scheme.middle == 2**bits


def test_groups() -> None:
    assert QuantScheme(4, 64).num_groups(896) == 14
    assert QuantScheme(4, -1).num_groups(896) == 1
    assert QuantScheme(4, -1).columns_per_group(896) == 896


def test_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(
        LowbitError, match=r"128 does not divide in_features=576: use one of \[64, 32, 16, -1\]"
    ):
        QuantScheme(4, 128).num_groups(576)


def test_bits_per_weight_counts_scales_and_stored_zeros() -> None:
    assert QuantScheme(4, 128).bits_per_weight(4096) == 4.125
    assert QuantScheme(4, 128, symmetric=False).bits_per_weight(4096) == 4 + 20 / 128
    assert QuantScheme(8, -1).bits_per_weight(1000) == 8.016


def test_is_a_value() -> None:
    assert QuantScheme(4, 64) == QuantScheme(4, 64)
    assert len({QuantScheme(4, 64), QuantScheme(4, 64), QuantScheme(4, 64, False)}) == 2
