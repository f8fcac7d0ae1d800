"""Count what the shipped kernels compile to, without a GPU, and hold them to it.

    python scripts/kernel_report.py            # print the table and write it into docs/KERNELS.md
    python scripts/kernel_report.py --check    # compile again; exit 1 where a count is worse than written

`--check` also fails where a promise is broken: no spill, no conversion of integers to floats, no load that
the main loop waits for, no weight read four bytes at a time, the instructions per weight of `LIMITS`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from kernel_compile import NVIDIA, Case, Static, analyse, compile_case

PAGE = Path(__file__).parents[1] / "docs" / "KERNELS.md"
BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"
ROWS = (1, 16, 512)
AMD = "gfx942"

# Instructions of the main loop per weight: (bits, dtype, rows) -> at most. On sm_100 the tile with the most
# headroom is not the one with the fewest instructions, so it is only held to what is written.
LIMITS = {
    (4, torch.float16, 1): 1.9,
    (4, torch.float16, 16): 2.1,
    (4, torch.bfloat16, 1): 2.5,
    (4, torch.bfloat16, 16): 2.5,
    (8, torch.float16, 1): 2.3,
    (8, torch.float16, 16): 2.3,
}
SLACK = 1.02  # a newer assembler moves an instruction or two

HEADER = (
    "| kernel | weights | x | rows | GPU | tile | per weight | conversions | exposed | spills | registers | "
    "headroom | tightest | of peak | in flight |\n" + "|---" * 15 + "|\n"
)


def cases() -> Iterator[Case]:
    """Every kernel at the three heights."""
    for rows in ROWS:
        kernel = "decode" if rows <= 32 else "prefill"
        for bits in (4, 8):
            for dtype in (torch.float16, torch.bfloat16):
                yield Case(kernel, bits, dtype, rows)


def name(case: Case, arch: str) -> str:
    """The cells that identify a row of the table."""
    dtype = str(case.dtype).removeprefix("torch.")
    return f"| {case.kernel} | W{case.bits} g{case.group_size} | {dtype} | {case.rows} | {arch} |"


def line(case: Case, arch: str, static: Static) -> str:
    """A row of the table."""
    tile = case.tile(arch)
    shape = f"{tile.rows}x{tile.features}, {tile.warps} warps, {tile.stages} stages"
    cells = [
        shape,
        f"{static.per_weight:.2f}",
        f"{static.conversions:.2f}",
        str(static.exposed),
        str(static.spills),
        str(static.registers),
        f"{static.headroom:.2f}x" if case.kernel == "decode" else "",
        static.tightest,
        f"{static.of_peak:.0%}" if case.kernel == "prefill" else "",
        f"{static.in_flight:.1f}x" if case.kernel == "decode" else "",
    ]
    return f"{name(case, arch)} {' | '.join(cells)} |"


def broken_promises(case: Case, arch: str, static: Static) -> Iterator[str]:
    """What the kernel should never do."""
    limit = LIMITS.get((case.bits, case.dtype, case.rows))
    if limit and arch != "sm_100" and static.per_weight > limit:
        yield f"{static.per_weight:.2f} instructions per weight, more than {limit}"
    for what in ("conversions", "exposed", "narrow", "spills"):
        if getattr(static, what):
            yield f"{what}: {getattr(static, what)}"


def written_counts(page: str) -> dict[str, float]:
    """Instructions per weight by row, from the page."""
    rows = re.findall(r"^((?:\|[^|\n]+){5}\|)[^|]+\| ([0-9.]+) \|", page, re.MULTILINE)
    return {key: float(count) for key, count in rows}


def amd_faults(case: Case) -> Iterator[str]:
    """What is wrong with `case` compiled for AMD; nothing, if it compiles and spills no register."""
    text = compile_case(case, AMD).asm["amdgcn"]
    for kind, count in re.findall(r"\.(vgpr_spill_count):\s+(\d+)", text):
        if int(count):
            yield f"{kind} {count}"
    if "v_mfma" not in text:
        yield "no matrix instruction"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with docs/KERNELS.md, write nothing")
    parser.add_argument("--arch", choices=[*NVIDIA, AMD], nargs="+", default=[*NVIDIA, AMD])
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    written, lines, faults = written_counts(page), [], []
    for case in cases():
        for arch in (arch for arch in NVIDIA if arch in arguments.arch):
            try:
                static = analyse(case, arch)
            except ValueError as error:
                # Triton 3.7 gives sm_100's tensor memory a loop that the counter does not know.
                lines.append(f"{name(case, arch)} not counted: no main loop found |" + " |" * 9)
                print(f"{lines[-1]}\n{error}", flush=True)
                if arch != "sm_100":
                    faults.append(str(error))
                continue
            lines.append(line(case, arch, static))
            print(lines[-1], flush=True)
            faults += [f"{name(case, arch)} {fault}" for fault in broken_promises(case, arch, static)]
            before = written.get(name(case, arch))
            if arguments.check and (before is None or static.per_weight > before * SLACK):
                faults.append(f"{name(case, arch)} {static.per_weight:.2f} per weight, written: {before}")
        if AMD in arguments.arch:
            faults += [f"{name(case, AMD)} {fault}" for fault in amd_faults(case)]
    if not arguments.check:
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{HEADER}" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")
    print("\n".join(faults) or "every promise kept", file=sys.stderr)
    sys.exit(bool(faults and arguments.check))


if __name__ == "__main__":
    main()
