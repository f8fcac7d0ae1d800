"""Fill this GPU's part of `tiles.json` by the clock: time many tiles on the shapes of a model, keep the best.

    python scripts/time_tiles.py                 # on a GPU, two minutes; writes tiles.json and tried.csv

`rank_tiles.py` fills the table without a GPU, and `lowbit tune` finds tiles for one machine and one
checkpoint; this is for the table that ships. For each kernel, width, dtype and number of rows the tile with
the smallest geometric mean over the shapes wins; a tile that gives other numbers than the shipped one, or
does not run, is out. Tiles are compiled by several processes first, since that is what takes the time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from rank_tiles import TABLE, dumps

from lowbit_kernels import matmul, tune
from lowbit_kernels.layout import Layout
from lowbit_kernels.tiles import Tiles, choose, key
from lowbit_kernels.tune import Outcome, Weight
from lowbit_kernels.tuned import HEIGHTS

SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336))
"""`(out, in)` of Llama-3-8B's fused projections: few features, many, and a long row."""

GROUP_SIZE = 128
FACTORS = {"decode": (0.5, 1, 2), "prefill": (1,)}
"""Of the programs that fit on a multiprocessor: how far K is split."""


def sizes(kernel: str, height: int) -> list[tuple[int, int, int, int, int]]:
    """Rows, features, step, warps and stages worth timing."""
    if kernel == "decode":
        shapes, depths = ((64, 2), (64, 4), (128, 4)), (2, 3, 4) if height == 32 else (3, 4, 5)
        return [(height, features, 0, warps, stages) for features, warps in shapes for stages in depths]
    found = [(64, 128, step, 8, stages) for step in (32, 64) for stages in (3, 4)]
    found += [(64, 64, step, 4, stages) for step in (32, 64) for stages in (3, 4)]
    if height > 64:
        found += [(128, features, 64, features // 16, 3) for features in (64, 128)]
        found += [(128, 128, 32, 8, 3), (256, 128, 32, 8, 3), (256, 128, 16, 8, 4)]
    return found


def choice(kernel: str, shipped: Tiles, height: int) -> list[Tiles]:
    """The shipped tile and what else is timed."""
    programs = sorted({max(1, int(shipped.programs * factor)) for factor in FACTORS[kernel]})
    found = [Tiles(*size, count) for size in sizes(kernel, height) for count in programs]
    return list(dict.fromkeys([shipped, *found]))


@lru_cache(maxsize=1)
def _layout(weight: Weight) -> Layout:
    return tune.random_weight(weight, torch.device("cuda", 0))[1]


@lru_cache(maxsize=len(SHAPES))
def _copies(weight: Weight) -> list[Layout]:
    return tune.copies_of(_layout(weight))


def compile_one(weight: Weight, kernel: str, rows: int, tile: Tiles) -> None:
    """Run a tile once, so that Triton's cache on the disk has it; whether it works is found out later."""
    x = torch.zeros(rows, weight.in_features, dtype=weight.dtype, device="cuda")
    try:
        tune.run(weight, kernel, x, _layout(weight), tile)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{kernel} {list(tile)}: {type(error).__name__}", file=sys.stderr)


def compile_all(jobs: list[tuple[Weight, str, int, Tiles]], workers: int) -> None:
    """`compile_one` for all, in so many processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4))


def mean(times: list[float]) -> float:
    """The geometric one."""
    return math.exp(sum(map(math.log, times)) / len(times))


def best_of(outcomes: list[Outcome], shipped: Tiles) -> tuple[Tiles, float]:
    """The tile that is fastest over all shapes, and how many times faster than the shipped one it is."""
    common = set.intersection(*(set(one.times) for one in outcomes))
    means = {tile: mean([one.times[tile] for one in outcomes]) for tile in common}
    best = min(means, key=lambda tile: means[tile])
    return best, means[shipped] / means[best]


class Entry(NamedTuple):
    """One entry of the table, and what competes for it."""

    kernel: str
    bits: int
    dtype: torch.dtype
    height: int
    shipped: Tiles
    tiles: list[Tiles]

    def weights(self) -> list[Weight]:
        return [Weight(self.bits, GROUP_SIZE, *shape, self.dtype) for shape in SHAPES]


def entries(arch: str, kernels: list[str], widths: list[int]) -> Iterator[Entry]:
    """All that is to be timed."""
    for kernel, bits, dtype in itertools.product(kernels, widths, (torch.float16, torch.bfloat16)):
        for height in HEIGHTS[kernel]:
            shipped = choose(kernel, arch, bits, dtype, height)
            yield Entry(kernel, bits, dtype, height, shipped, choice(kernel, shipped, height))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=HEIGHTS, default=list(HEIGHTS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="that compile")
    parser.add_argument("--out", type=Path, default=Path("tried.csv"), help="every time that was taken")
    parser.add_argument("--table", type=Path, default=TABLE, help="tiles.json to change")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: scripts/rank_tiles.py fills the table without one")
    device = torch.device("cuda", 0)
    arch = matmul.target(device).arch
    table = json.loads(arguments.table.read_text(encoding="utf-8"))
    if arch not in table:
        sys.exit(
            f"{arch} has no part of its own in {arguments.table}: `lowbit tune` keeps tiles for such a GPU"
        )
    found = list(entries(arch, arguments.kernels, arguments.bits))
    begin = time.perf_counter()
    jobs = [(w, e.kernel, e.height, t) for e in found for w in e.weights()[1:] for t in e.tiles]
    compile_all(jobs, arguments.workers)
    print(f"{len(jobs)} compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", *Tiles._fields, "us"))
        for entry in found:
            outcomes = [
                tune.time_one(w, entry.kernel, entry.height, _copies(w), entry.tiles) for w in entry.weights()
            ]
            for one in outcomes:
                writer.writerows((one.name, *tile, f"{us:.2f}") for tile, us in one.times.items())
            best, gain = best_of(outcomes, entry.shipped)
            name = key(entry.bits, entry.dtype, entry.height)
            table[arch][entry.kernel][name] = best
            print(f"{entry.kernel} {name}: {list(entry.shipped)} -> {list(best)} {gain:.3f}x", flush=True)
    arguments.table.write_text(dumps(table), encoding="utf-8")


if __name__ == "__main__":
    main()
