"""Which grid a weight is rounded to: bits, group size, symmetry; and whether its inputs are rounded too.

How scales and zeros are stored (dtype, packing, file names) is the format's business, and how
they are found is the grid's and the algorithm's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lowbit.errors import LowbitError

SUPPORTED_BITS = (2, 3, 4, 8)
WHOLE_ROW = -1


@dataclass(frozen=True)
class QuantScheme:
    """A uniform integer grid, one scale (and zero) per group of input columns.

    Attributes:
        bits: Width of a code, one of 2, 3, 4, 8.
        group_size: Input columns that share a scale; -1 means the whole row.
        symmetric: True fixes every zero at `2 ** (bits - 1)`; False stores one per group.
        activation_bits: 8 rounds the inputs as well, per token while the model runs (`activations.py`),
            so that products are products of integers; None leaves them alone.

    Raises:
        LowbitError: `bits` or `group_size` is not one of the accepted values, or the inputs are to be
            rounded beside anything but symmetric 8-bit weights with one scale per row.

    >>> str(QuantScheme(bits=4, group_size=128))
    'w4g128'
    >>> QuantScheme(4, 128, symmetric=False).bits_per_weight(4096)
    4.15625
    >>> str(QuantScheme(bits=8, group_size=-1, activation_bits=8))
    'w8a8'
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise LowbitError(f"bits={self.bits} is not supported: use one of {SUPPORTED_BITS}")
        if self.group_size != WHOLE_ROW and self.group_size < 8:
            raise LowbitError(
                f"group_size={self.group_size} is not supported: use 32, 64, 128, or -1 for the whole row"
            )
        if self.activation_bits is not None:
            self._check_activations()

    def _check_activations(self) -> None:
        if self.activation_bits != 8:
            raise LowbitError(f"activation_bits={self.activation_bits} is not supported: use 8")
        if (self.bits, self.group_size, self.symmetric) != (8, WHOLE_ROW, True):
            weights = replace(self, activation_bits=None)
            raise LowbitError(
                f"activation_bits=8 needs weights in w8row, not {weights}: use bits=8, group_size=-1"
            )

    def __str__(self) -> str:
        if self.activation_bits is not None:
            return f"w{self.bits}a{self.activation_bits}"
        group = "row" if self.group_size == WHOLE_ROW else f"g{self.group_size}"
        return f"w{self.bits}{group}" + ("" if self.symmetric else "-asym")

    @property
    def levels(self) -> int:
        """Number of codes, `2 ** bits`."""
        return int(2**self.bits)

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid, `2 ** (bits - 1)`."""
        return int(2 ** (self.bits - 1))

    @property
    def fineness(self) -> tuple[int, float]:
        """Sorts schemes by what a weight takes, whatever the row's length."""
        return self.bits, 0.0 if self.group_size == WHOLE_ROW else 1 / self.group_size

    def columns_per_group(self, in_features: int) -> int:
        """Columns in a group of a row of `in_features` weights.

        Raises:
            LowbitError: `group_size` does not divide `in_features`.
        """
        if self.group_size == WHOLE_ROW:
            return in_features
        if in_features % self.group_size:
            fitting = [g for g in (256, 128, 64, 32, 16) if in_features % g == 0]
            raise LowbitError(
                f"group_size={self.group_size} does not divide in_features={in_features}: "
                f"use one of {[*fitting, WHOLE_ROW]}"
            )
        return self.group_size

    def num_groups(self, in_features: int) -> int:
        """Scales per row; raises `LowbitError` as `columns_per_group` does."""
        return in_features // self.columns_per_group(in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight, scales (and zeros, where they are stored) counted."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group / self.columns_per_group(in_features)


def text_of(schemes: Iterable[QuantScheme]) -> str:
    """All schemes of a checkpoint, smallest first.

    >>> text_of([QuantScheme(8, 128), QuantScheme(4, 32), QuantScheme(4, 128), QuantScheme(4, 32)])
    'w4g128+w4g32+w8g128'
    """
    return "+".join(map(str, sorted(set(schemes), key=lambda scheme: scheme.fineness)))
