"""What the int8 kernels compile to, for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
from kernel_compile import disassemble, exposed_loads, main_loop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile

from lowbit_kernels import int8


def compile_for(arch: str, kernel: object, signature: dict[str, str], **options: int) -> CompiledKernel:
    known = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    constants = {k: v for k, v in options.items() if k not in known}
    constants |= {name: None for name, kind in signature.items() if kind == "absent"}
    kinds = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}  # type: ignore[attr-defined]
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kinds)
        if kinds[name] != "constexpr" and name != "M"
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    return compile(source, target=target, options={name: options.get(name, known[name]) for name in known})


PRODUCT = {
    "x": "*i8", "weight": "*i8", "x_scales": "*bf16", "w_scales": "*fp32", "bias": "absent", "out": "*bf16",
    "M": "i32", "N": "i32", "K": "i32",
}  # fmt: skip
ROUND = {"x": "*bf16", "codes": "*i8", "scales": "*bf16", "K": "i32", "x_stride": "i32"}


def product(arch: str, rows: int, **changes: int) -> CompiledKernel:
    constants = int8.tile(rows) | {"BAND": 8, "EVEN_K": 1, "BIAS": 0} | changes
    if arch.startswith("gfx"):
        constants["num_stages"] = 2
    return compile_for(arch, int8.int8_kernel, PRODUCT, **constants)


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_integers_meet_on_the_tensor_cores(arch: str, rows: int) -> None:
    compiled = product(arch, rows)
    instructions = disassemble(compiled)
    loop = main_loop(instructions)
    assert any(i.stem in ("IMMA", "IGMMA") for i in loop)
    assert not any(i.stem in ("I2F", "I2FP", "F2I", "HMMA") for i in loop)
    assert not any(i.stem in ("LDL", "STL") for i in instructions), "a register is spilled"
    assert exposed_loads(loop) == 0
    assert all(".128" in i.name for i in loop if i.stem == "LDGSTS")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_odd_sizes_compile(arch: str) -> None:
    for rows in (1, 64, 512):
        compiled = product(arch, rows, EVEN_K=0)
        text = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
        assert re.search(r"v_mfma_i32|mma\.sync\S*\.s32|wgmma\S*\.s32", text)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_rounding_compiles(arch: str) -> None:
    compile_for(arch, int8.round_rows_kernel, ROUND, BLOCK=1024, **int8.ROUNDING)


def test_rounding_is_not_fused() -> None:
    """A product that is rounded, then a sum: a compiler may make one operation of them, and other codes."""

    def fused(**options: int) -> list[str]:
        compiled = compile_for("sm_90", int8.round_rows_kernel, ROUND, BLOCK=1024, **options)
        return [i.name for i in disassemble(compiled) if i.stem == "FFMA" and "12582912" in i.operands]

    assert fused(num_warps=4), "the check finds nothing to forbid"
    assert not fused(**int8.ROUNDING)
