"""What the kernels compile to, for GPUs that are not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_compile import NVIDIA, Case, Instruction, analyse, compile_case, exposed_loads, main_loop
from kernel_report import AMD, broken_promises

from lowbit_kernels.tiles import Tiles, choose, table

ROOT = Path(__file__).parents[2]


def test_the_shipped_decode_kernel_keeps_its_promises() -> None:
    case = Case("decode", 4, torch.float16, 16)
    assert list(broken_promises(case, "sm_90", analyse(case, "sm_90"))) == []


def test_a_worse_kernel_is_noticed() -> None:
    """Scales for fewer features than the program has threads: they are loaded in the loop, not before."""
    case = Case("decode", 4, torch.float16, 16)
    static = analyse(case, "sm_80", Tiles(16, 64, 0, 8, 3, 1))
    assert list(broken_promises(case, "sm_80", static)) != []


@pytest.mark.slow
def test_no_count_is_worse_than_written() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kernel_report.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What a group size changes is the same for every GPU, and what a GPU changes for every group size: the
# smallest group and the largest meet all of them.
VARIANTS = [
    (group_size, bits, arch)
    for group_size in (32, 64, 256, -1)
    for bits in (4, 8)
    for arch in ("sm_80", "sm_90", AMD)
    if group_size in (32, -1) or arch == "sm_80"
]


@pytest.mark.slow
@pytest.mark.parametrize(("group_size", "bits", "arch"), VARIANTS)
def test_every_variant_compiles(group_size: int, bits: int, arch: str) -> None:
    for rows, kernel in ((16, "decode"), (512, "prefill")):
        case = Case(kernel, bits, torch.bfloat16, rows, group_size)
        compile_case(case, arch, BIAS=True, EVEN_K=False, SPLIT=False)
    compile_case(Case("decode", bits, torch.float16, 8, group_size), arch, EXPERTS=True)
    dequantize = Case("dequantize", bits, torch.float16, 0, group_size)
    compile_case(dequantize, arch, Tiles(0, 0, 0, 4, 1, 1))


@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
def test_the_table_has_a_tile_for_everything(arch: str) -> None:
    for kernel, heights in (("decode", (1, 8, 9, 32)), ("prefill", (33, 64, 65, 1024))):
        for bits in (4, 8):
            for dtype in (torch.float16, torch.bfloat16):
                for rows in heights:
                    tile = choose(kernel, arch, bits, dtype, rows)
                    assert tile.features in (64, 128)
                    assert tile.programs >= 1
                    assert kernel == "prefill" or tile.rows >= rows


def test_a_gpu_like_another_takes_its_entries() -> None:
    assert choose("decode", "sm_86", 4, torch.float16, 1) == choose("decode", "sm_89", 4, torch.float16, 1)
    assert choose("decode", "gfx950", 4, torch.float16, 1) == choose("decode", AMD, 4, torch.float16, 1)
    assert set(table()) == {*NVIDIA, AMD}


def test_counting() -> None:
    """A loop written by hand: one load is used in the same turn, the other in the next."""

    def instruction(address: int, name: str, operands: str = "") -> Instruction:
        return Instruction(address, name, operands, 1, False)

    loop = [
        instruction(0x20, "LDG.E.128", "R4, [R2.64]"),
        instruction(0x30, "HMMA.16816.F32", "R8, R4, R6, R8"),
        instruction(0x40, "LDG.E", "R12, [R2.64]"),
        instruction(0x50, "BRA", "0x20"),
    ]
    program = [instruction(0x10, "MOV", "R1, R2"), *loop, instruction(0x60, "BRA", "0x60")]
    assert main_loop(program) == loop
    assert exposed_loads(loop) == 1
