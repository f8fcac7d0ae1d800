"""The solver against all combinations, one after the other."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.knapsack import solve

ITEM = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 60)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(1, 250))
def test_no_combination_is_better(items: list[list[tuple[int, int]]], limit: int) -> None:
    losses = [[loss / 1000 for loss, _ in options] for options in items]
    sizes = [[48 * size for _, size in options] for options in items]

    def total(table: list[list[float]] | list[list[int]], taken: tuple[int, ...] | list[int]) -> float:
        return sum(options[number] for options, number in zip(table, taken, strict=True))

    every = itertools.product(*(range(len(options)) for options in items))
    fitting = [taken for taken in every if total(sizes, taken) <= 48 * limit]
    found = solve(losses, sizes, 48 * limit)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert total(sizes, found) <= 48 * limit
    assert total(losses, found) == pytest.approx(min(total(losses, taken) for taken in fitting), abs=1e-6)


def test_a_model_of_many_blocks_takes_no_time() -> None:
    """320 groups of eight schemes: of two groups alike but for their loss, the larger takes more bits."""
    bits = [4.0, 4.125, 4.25, 4.5, 8.0, 8.125, 8.25, 8.5]
    losses = [[(1 + group) * 4.0 ** (4 - width) for width in bits] for group in range(320)]
    sizes = [[int(65536 * width) for width in bits]] * 320
    found = solve(losses, sizes, int(320 * 65536 * 5.0))
    assert found is not None
    assert found == sorted(found)
    assert len(set(found)) > 2
    assert 4.99 < sum(bits[number] for number in found) / 320 <= 5.0
