"""Fill `tiles.json` without a GPU: compile every candidate, throw out the bad, rank the rest.

    python scripts/rank_tiles.py                 # all but sm_90, which `time_tiles.py` fills; some minutes
    python scripts/rank_tiles.py --arch sm_89    # one architecture, the others kept

A candidate that spills, converts integers to floats, or waits for a load in its main loop is out. For decode,
those with enough headroom over memory and enough bytes in flight come first, in order of instructions per
weight. For prefill, the one whose tightest unit passes most multiplications a clock. AMD's entries are set by
hand: they compile, and nothing here can count them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from kernel_compile import GPUS, NVIDIA, Case, Static, analyse

from lowbit_kernels.tiles import Tiles, key

TABLE = Path(__file__).parents[1] / "triton_kernels" / "lowbit_kernels" / "tiles.json"
HEADROOM, IN_FLIGHT = 1.3, 2.0
HEIGHTS = {"decode": (8, 16, 32), "prefill": (64, 128)}


def candidates(kernel: str, rows: int) -> Iterator[Tiles]:
    """Tiles worth compiling for `rows`."""
    if kernel == "decode":
        for features, warps in ((64, 2), (64, 4), (128, 4)):
            for stages in (3, 4) if rows < 32 else (2, 3):
                yield Tiles(rows, features, 0, warps, stages, 0)
        return
    for height in (64, 128) if rows == 128 else (64,):
        for step in (16, 32):
            for stages in (3, 4):
                yield Tiles(height, 128, step, 4, stages, 0)


def is_clean(static: Static, arch: str) -> bool:
    """No spill, no conversion, no wait for a load, and it fits."""
    waste = (static.spills, static.conversions, static.exposed, static.narrow)
    return not any(waste) and static.shared + 1024 <= GPUS[arch].shared


def merit(static: Static, kernel: str) -> tuple[float, float, float]:
    """Larger is better."""
    instructions = -round(static.per_weight, 1)
    if kernel == "prefill":
        return round(static.of_peak, 2), instructions, static.in_flight
    enough = min(static.headroom / HEADROOM, static.in_flight / IN_FLIGHT, 1.0)
    return round(enough, 2), instructions, static.headroom


def best(case: Case, arch: str) -> tuple[Tiles, Static]:
    """The clean candidate of most merit; where none is clean, the one with the fewest spills."""
    found = [(tile, analyse(case, arch, tile)) for tile in candidates(case.kernel, case.rows)]
    clean = [pair for pair in found if is_clean(pair[1], arch)]
    if not clean:
        return min(found, key=lambda pair: pair[1].spills)
    return max(clean, key=lambda pair: merit(pair[1], case.kernel))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=NVIDIA, nargs="+", default=[a for a in NVIDIA if a != "sm_90"])
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for arch in arguments.arch:
        entries: dict[str, dict[str, Tiles]] = {"decode": {}, "prefill": {}}
        for kernel, heights in HEIGHTS.items():
            for bits in (4, 8):
                for dtype in (torch.float16, torch.bfloat16):
                    for rows in heights:
                        tile, static = best(Case(kernel, bits, dtype, rows), arch)
                        entries[kernel][key(bits, dtype, rows)] = tile._replace(programs=static.programs)
                        print(
                            f"{arch} {kernel} {key(bits, dtype, rows):18} {list(tile[:5])!s:22} "
                            f"{static.per_weight:.2f} per weight, headroom {static.headroom:.2f} "
                            f"({static.tightest}), {static.of_peak:.2f} of peak, "
                            f"in flight {static.in_flight:.1f}, {static.spills} spills",
                            flush=True,
                        )
        table[arch] = entries
        TABLE.write_text(dumps(table), encoding="utf-8")


def dumps(table: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """JSON with one entry a line."""
    text = json.dumps(table, indent=2)
    return re.sub(r"\[\s+([^]]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


if __name__ == "__main__":
    main()
