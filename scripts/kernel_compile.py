"""Compile a kernel for a GPU that is not there, and read what came out.

Triton's wheel carries the assembler and the disassembler, so a machine without a GPU gets the same
instructions as one with it. The numbers are those of the main loop, per thread, divided by the weights that a
thread has in one iteration. Nothing here is a measurement; `Static` is a bound that ranks well.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile

from lowbit_kernels.decode import decode_kernel
from lowbit_kernels.dequantize import dequantize_kernel
from lowbit_kernels.matmul import Target, grid_constants
from lowbit_kernels.prefill import prefill_kernel
from lowbit_kernels.tiles import Tiles, choose

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100")
_CUOBJDUMP = os.path.join(os.path.dirname(triton.backends.__file__), "nvidia", "bin", "cuobjdump")
_POINTERS = {"codes": "*i16", "scale_zero": "*i32", "experts": "*i32", "order": "*i32"}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """A kernel and what it is asked to do; the weight is 4096 x 4096."""

    kernel: str
    bits: int
    dtype: torch.dtype
    rows: int
    group_size: int = 128

    def tile(self, arch: str) -> Tiles:
        """The shipped one."""
        return choose(self.kernel, arch, self.bits, self.dtype, self.rows)


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers; `latency` (of memory, seconds) is an assumption, rates are warps' a clock."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int
    warps: int
    latency: float
    macs: int  # of 16-bit floats, per clock and multiprocessor
    fma: int = 4


GPUS = {
    "sm_80": Gpu("A100", 108, 1.41e9, 2.04e12, 164 * 1024, 64, 600e-9, 1024, fma=2),
    "sm_89": Gpu("RTX 4090", 128, 2.52e9, 1.01e12, 100 * 1024, 48, 600e-9, 512),
    "sm_90": Gpu("H100", 132, 1.755e9, 3.35e12, 228 * 1024, 64, 700e-9, 2048),
    "sm_100": Gpu("B200", 148, 1.85e9, 8.0e12, 228 * 1024, 64, 700e-9, 4096),
}


def compile_case(case: Case, arch: str, tile: Tiles | None = None, **changes: bool) -> CompiledKernel:
    """Compile as the launcher would: aligned pointers and strides, rows unknown.

    `changes` are constants of the kernel (`EXPERTS=True`); without them, decode splits K, and there is no
    bias, no experts, and no column beyond the last block.
    """
    tile = tile or case.tile(arch)
    kernel = {"decode": decode_kernel, "prefill": prefill_kernel, "dequantize": dequantize_kernel}[
        case.kernel
    ]
    constants = grid_constants(case.bits, case.group_size, 4096, case.dtype) | {
        "BM": tile.rows, "BN": tile.features, "STEP": tile.step, "BAND": 8, "EVEN_K": True,
        "SPLIT": case.kernel == "decode", "BIAS": False, "EXPERTS": False, "ASM": arch.startswith("sm_"),
        "OVERLAP": case.kernel == "decode" and Target(arch, 0, arch.startswith("sm_")).overlaps,
    } | changes  # fmt: skip
    absent = {"bias": "BIAS", "experts": "EXPERTS", "order": "EXPERTS"}
    constants |= {pointer: None for pointer, flag in absent.items() if not constants[flag]}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = _POINTERS.get(name, "*" + _NAMES[case.dtype])
        signature[name] = pointer if name in ("x", "out", "bias", *_POINTERS) else "i32"
        if name == "out" and constants.get("SPLIT"):
            signature[name] = "*fp32"
        if name not in ("M", "blocks_per_part"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    number = int(arch[3:]) if arch.startswith("sm_") else arch
    target = GPUTarget("cuda", number, 32) if arch.startswith("sm_") else GPUTarget("hip", number, 64)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return compile(source, target=target, options=options)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str
    stall: int
    waits: bool

    @property
    def stem(self) -> str:
        return self.name.partition(".")[0]


_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);\s*/\* 0x[0-9a-f]{16} \*/"
    r"\s*\n\s*/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)


def cuobjdump(kernel: CompiledKernel, option: str) -> str:
    """What the disassembler says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def disassemble(kernel: CompiledKernel) -> list[Instruction]:
    """Every instruction, with the stall and the wait that its control bits ask for."""
    found = []
    for address, name, operands, control in _LINE.findall(cuobjdump(kernel, "-sass")):
        bits = int(control, 16)
        found.append(
            Instruction(
                int(address, 16), name, operands.strip(), max(1, bits >> 41 & 15), bool(bits >> 52 & 63)
            )
        )
    assert found, "no instruction found: has the disassembler's output changed?"
    return found


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The longest innermost loop with a tensor core instruction in it; [] where there is none."""
    loops = []
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)", branch.operands) if branch.stem == "BRA" else None
        if target and int(target[1], 16) < branch.address:
            loops.append((int(target[1], 16), branch.address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[i for i in instructions if low <= i.address <= high] for low, high in inner]
    return max((b for b in bodies if any("MMA" in i.name for i in b)), key=len, default=[])


def exposed_loads(loop: list[Instruction]) -> int:
    """Loads from global memory to registers that the same iteration waits for."""
    exposed = 0
    for position, load in enumerate(loop):
        register = re.search(r"\bR(\d+)\b", load.operands) if load.stem == "LDG" else None
        if register:
            width = 4 if ".128" in load.name else 2 if ".64" in load.name else 1
            names = {f"R{int(register[1]) + i}" for i in range(width)}
            later = (set(re.findall(r"\bR\d+\b", i.operands)) for i in loop[position + 1 :])
            exposed += any(names & used for used in later)
    return exposed


_ALU = (
    "LOP3 PLOP3 SHF SHL SHR PRMT IADD3 IADD IABS ISETP SEL FSEL FMNMX FSETP LEA SGXT BMSK MOV CS2R VIADD "
    "F2FP I2FP VIADDMNMX HSET2 HSETP2 HMNMX2"
)
_PIPES = dict.fromkeys(_ALU.split(), "alu") | {
    "FFMA": "fma", "FMUL": "fma", "FADD": "fma", "IMAD": "fma",
    "HFMA2": "half", "HADD2": "half", "HMUL2": "half",
    "I2F": "convert", "F2F": "convert", "F2I": "convert", "MUFU": "convert",
    "LDS": "memory", "LDSM": "memory", "STS": "memory", "STSM": "memory", "LDG": "memory", "LDGSTS": "memory",
}  # fmt: skip


@dataclass(frozen=True)
class Static:
    """What a compiled kernel says about its speed.

    Attributes:
        per_weight: Instructions of the main loop per weight.
        conversions: Of them, conversions between integers and floats, per weight.
        exposed: Loads that the loop waits for.
        narrow: Asynchronous copies of 4 bytes beyond those of scales and zeros.
        spills: Instructions that touch local memory, in the whole kernel.
        registers: Per thread.
        shared: Bytes of shared memory of a program.
        programs: That fit on a multiprocessor.
        headroom: How much faster than memory the loop can run, by its tightest unit.
        tightest: That unit.
        of_peak: The tightest unit's rate over that of the tensor cores: what bounds prefill.
        in_flight: Bytes of weights under way, over those that hide the memory's latency.
    """

    per_weight: float
    conversions: float
    exposed: int
    narrow: int
    spills: int
    registers: int
    shared: int
    programs: int
    headroom: float
    tightest: str
    of_peak: float
    in_flight: float


def programs_that_fit(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """On one multiprocessor, by registers (64 Ki, handed out by 256 to a warp), shared memory and warps."""
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    return min(by_registers, gpu.shared // (shared + 1024), gpu.warps // warps, 32)


def rates(
    gpu: Gpu, loop: list[Instruction], weights: float, warps: int, rows: int, wgmma: bool
) -> dict[str, float]:
    """Weights a clock that each unit of a multiprocessor can pass, over 32 (that is, per warp)."""
    pipes = Counter(_PIPES.get(i.stem, "other") for i in loop)
    loaded = sum(
        32 * (16 if ".128" in i.name or i.name.endswith(".4") else 4)
        for i in loop
        if _PIPES.get(i.stem) == "memory"
    )
    # 30 clocks where an instruction waits for shared memory; loads from afar were issued stages before.
    cycles = sum(i.stall for i in loop) + 30 * sum(i.waits for i in loop)
    width = {"alu": 2, "fma": gpu.fma, "half": 4, "convert": 0.5}
    found = {pipe: weights * each / pipes[pipe] for pipe, each in width.items() if pipes[pipe]}
    efficiency = 1.0 if wgmma or gpu.macs <= 1024 else 0.62  # mma.sync reaches 62 % of Hopper's wgmma
    return found | {
        "issue": 4 * weights / len(loop),
        "shared memory": 128 * weights / loaded if loaded else math.inf,
        "latency": warps * weights / cycles,
        "tensor cores": gpu.macs * efficiency / (32 * rows),
    }


def analyse(case: Case, arch: str, tile: Tiles | None = None) -> Static:
    """Compile `case` for an NVIDIA architecture and count."""
    tile = tile or case.tile(arch)
    kernel = compile_case(case, arch, tile)
    instructions, gpu = disassemble(kernel), GPUS[arch]
    loop = main_loop(instructions)
    if not loop:
        raise ValueError(f"{case} on {arch}: no main loop, it was unrolled away or has changed")
    block = grid_constants(case.bits, case.group_size, 4096, case.dtype)["BK"]
    columns = block if case.kernel == "decode" else tile.step * 16 // case.bits
    weights = tile.features * columns / (32 * tile.warps)
    registers = int(re.search(r"REG:(\d+)", cuobjdump(kernel, "-res-usage"))[1])  # type: ignore[index]
    programs = programs_that_fit(gpu, registers, kernel.metadata.shared, tile.warps)
    wgmma = any(i.stem in ("HGMMA", "UTCHMMA") for i in loop)
    possible = rates(gpu, loop, weights, programs * tile.warps, tile.rows, wgmma)
    tightest = min(possible, key=possible.__getitem__)
    groups = max(1, block // case.group_size) if case.group_size > 0 else 1
    bytes_per_weight = case.bits / 8 + (4 / case.group_size if case.group_size > 0 else 0)
    per_multiprocessor = gpu.bandwidth / gpu.multiprocessors
    needed = per_multiprocessor / gpu.clock / bytes_per_weight / 32
    copies = [i for i in loop if i.stem == "LDGSTS"]
    of_scales = groups * max(1, tile.features // (32 * tile.warps))
    under_way = programs * max(1, tile.stages - 1) * tile.features * columns * case.bits / 8
    return Static(
        per_weight=len(loop) / weights,
        conversions=sum(i.stem in ("I2F", "I2FP", "F2I") for i in loop) / weights,
        exposed=exposed_loads(loop),
        narrow=max(0, sum(".128" not in i.name for i in copies) - of_scales),
        spills=sum(i.stem in ("LDL", "STL") for i in instructions),
        registers=registers,
        shared=kernel.metadata.shared,
        programs=programs,
        headroom=possible[tightest] / needed,
        tightest=tightest,
        of_peak=possible[tightest] / possible["tensor cores"],
        in_flight=under_way / (per_multiprocessor * gpu.latency),
    )
