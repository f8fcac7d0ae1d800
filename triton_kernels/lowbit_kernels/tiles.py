"""Which tile a kernel runs with: a table that ships with the package, so that nothing is tuned at run time.

sm_90's part was filled by the clock, on an H200 (`scripts/time_tiles.py`). The others' were filled without a
GPU: `scripts/rank_tiles.py` compiles every candidate, throws out those that spill, convert, or wait for a
load, and ranks the rest by instructions per weight and bytes in flight.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """One entry.

    Attributes:
        rows: Of x, in a tile.
        features: Of the output, in a tile.
        step: Words of a row that prefill takes at a time.
        warps: Of a program.
        stages: Tiles of weights in shared memory at a time.
        programs: That fit on a multiprocessor together; K is split until there are as many.
    """

    rows: int
    features: int
    step: int
    warps: int
    stages: int
    programs: int


# Architectures without an entry of their own take the one of the same shared memory and instructions.
_LIKE = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_120": "sm_89", "sm_121": "sm_89", "sm_103": "sm_100"}


def key(bits: int, dtype: torch.dtype, rows: int) -> str:
    """The name of an entry: `w4 float16 m16`."""
    return f"w{bits} {str(dtype).removeprefix('torch.')} m{rows}"


@cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """The shipped table: architecture, kernel, `key`."""
    loaded: dict[str, dict[str, dict[str, list[int]]]] = json.loads(
        files("lowbit_kernels").joinpath("tiles.json").read_text(encoding="utf-8")
    )
    return loaded


@cache
def choose(kernel: str, arch: str, bits: int, dtype: torch.dtype, rows: int) -> Tiles:
    """The entry for the fewest rows that hold `rows`, or the one for the most.

    An architecture newer than the table takes sm_90's entries, any AMD one gfx942's.
    """
    fallback = "gfx942" if arch.startswith("gfx") else "sm_90"
    entries = table().get(_LIKE.get(arch, arch), table()[fallback])[kernel]
    name = key(bits, dtype, 0)[:-1]
    heights = sorted(int(entry.removeprefix(name)) for entry in entries if entry.startswith(name))
    height = next((h for h in heights if h >= rows), heights[-1])
    return Tiles(*entries[f"{name}{height}"])
