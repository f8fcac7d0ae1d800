"""Mend Triton's interpreter, which gets bfloat16 wrong and knows no inline PTX.

Triton 3.9 keeps bfloat16 as its bit pattern in uint16 and then computes with the patterns, and truncates
where a GPU rounds to nearest even. `install` replaces those methods of the interpreter by ones that go
through float32, and adds a PTX interpreter of the few instructions that the kernels use: the text that runs
here is the text that runs on the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 patterns to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def as_float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def install() -> None:
    """Replace the interpreter's methods; once, before a kernel runs."""
    cast, binary, dot = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.binary_op,
        InterpreterBuilder.create_dot,
    )

    def cast_impl(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
        if is_bf16(source) and to.scalar != tl.bfloat16:
            return cast(self, as_float32(source), to)
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def binary_op(self: Any, a: TensorHandle, b: TensorHandle, op: Any) -> TensorHandle:
        if not is_bf16(a) or op in _BITWISE:
            return binary(self, a, b, op)
        result = op(widen(a.data), widen(b.data))
        return TensorHandle(result if result.dtype == bool else narrow(result), tl.bfloat16)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, as_float32(a), as_float32(b), c, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = lambda self, source, to, rounding: cast_impl(self, source, to)
    InterpreterBuilder.create_inline_asm = create_inline_asm


def create_inline_asm(
    _: Any, text: str, constraints: str, values: list[TensorHandle], types: list[Any], pure: bool, pack: int
) -> Any:
    """Run PTX over registers that hold `pack` neighbouring elements each, as the compiler lays them out."""
    shape = values[0].data.shape
    inputs: list[np.ndarray] = []
    for value in values:
        flat = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1, pack)
        inputs += list(flat.view(np.uint32).T)
    num_outputs = sum(part.startswith("=") for part in constraints.split(","))
    assert num_outputs + len(inputs) == len(constraints.split(",")), "constraints and operands differ"
    registers = run_ptx(text, num_outputs, inputs)
    handles = []
    for register, kind in zip(registers, types, strict=True):
        halves = np.ascontiguousarray(register).view(interpreter._get_np_dtype(kind.scalar))
        handles.append(TensorHandle(halves.reshape(shape), kind.scalar))
    return _Results(handles)


class _Results:
    def __init__(self, handles: list[TensorHandle]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def run_ptx(text: str, num_outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The output registers, uint32, of a block of PTX over vectors of input registers."""
    registers = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}

    def read(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        return np.full_like(inputs[0], int(operand, 0))

    for line in re.split(r"[;\n]", text.strip().strip("{}")):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        opcode, operands = line.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        name, kind = opcode.split(".")[0], opcode.split(".")[-1]
        registers[target] = _OPCODES[name](kind, *map(read, sources)).astype(np.uint32)
    return [registers[f"${i}"] for i in range(num_outputs)]


def lop3(_: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any logic of three bits: bit `4a + 2b + c` of `table`."""
    result = np.zeros_like(a)
    for i in range(8):
        if table[0] >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def prmt(_: str, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes chosen from the eight of `a` and `b`."""
    assert not selector[0] & 0x8888, "sign replication is not implemented"
    both = np.stack((a, b), axis=-1).view(np.uint8)
    chosen = [both[:, selector[0] >> 4 * i & 7] for i in range(4)]
    return np.ascontiguousarray(np.stack(chosen, axis=-1)).view(np.uint32)[:, 0]


def arithmetic(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`function` over float32, or over both halves of a register, rounded once."""

    def run(kind: str, *registers: np.ndarray) -> np.ndarray:
        if kind == "f32":
            exact = function(*(register.view(np.float32).astype(np.float64) for register in registers))
            return exact.astype(np.float32).view(np.uint32)
        halves = [np.ascontiguousarray(register).view(np.uint16) for register in registers]
        if kind == "f16x2":
            exact = function(*(half.view(np.float16).astype(np.float64) for half in halves))
            return exact.astype(np.float16).view(np.uint32)
        assert kind == "bf16x2", kind
        exact = function(*(widen(half).astype(np.float64) for half in halves))
        return narrow(exact.astype(np.float32)).view(np.uint32)

    return run


_OPCODES: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda _, a: a,
    "shr": lambda _, a, count: a >> count,
    "lop3": lop3,
    "prmt": prmt,
    "add": arithmetic(lambda a, b: a + b),
    "sub": arithmetic(lambda a, b: a - b),
    "fma": arithmetic(lambda a, b, c: a * b + c),
}
