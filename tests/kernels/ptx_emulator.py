"""Run the PTX that Triton compiles for sm_80 on a CPU: all threads of a program at once, in numpy.

This is the program that a GPU would run, with its layouts, swizzles, asynchronous copies, matrix instructions
and inline PTX, and it is unforgiving where a GPU is not:

- shared memory begins as NaN, and a copy's bytes arrive at the `wait_group` that asks for them, no sooner;
- an address outside the tensors that were passed raises `OutOfBounds`.

It counts memory sectors of 32 bytes and shared-memory wavefronts, and the fewest that would have done. It
does not model timing or the order of warps (a missing barrier goes unnoticed), and knows only the
instructions below.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kernels.ptx_text import Array, Instruction, decode, encode, parse, width_of

_WARP = 32


class OutOfBounds(Exception):
    """An address that belongs to none of the tensors."""


class Memory:
    """The tensors' bytes, far from one another."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, Array]] = []

    def add(self, tensor: Tensor) -> int:
        base = (len(self.segments) + 1) << 32
        self.segments.append((base, tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()))
        return base

    def bytes_at(self, addresses: Array, count: int) -> tuple[Array, Array]:
        """A segment, and `[threads, count]` places in it."""
        base, data = next(
            (s for s in self.segments if s[0] >> 32 == int(addresses[0]) >> 32), (0, np.empty(0))
        )
        places = addresses.astype(np.int64)[:, None] - base + np.arange(count)
        if places.min() < 0 or places.max() >= len(data):
            raise OutOfBounds(f"bytes {places.min()} ... {places.max()} of a tensor of {len(data)}")
        return data, places


class Program:
    """One program (thread block) of a launch."""

    def __init__(
        self, threads: int, memory: Memory, parameters: dict[str, int], place: Sequence[int], shared: int
    ):
        self.threads, self.memory, self.parameters = threads, memory, parameters
        self.registers: dict[str, Array] = {
            "%tid.x": np.arange(threads, dtype=np.uint64),
            "global_smem": self.full(0),
        }
        for axis, index in zip("xyz", place, strict=True):
            self.registers[f"%ctaid.{axis}"] = self.full(index)
        self.shared = np.full(shared + 16, 0xFF, np.uint8)
        self.copies: list[list[tuple[Array, Array]]] = [[]]
        self.counts: Counter[str] = Counter()

    def full(self, value: int) -> Array:
        return np.full(self.threads, value & (1 << 64) - 1, np.uint64)

    def raw(self, operand: str) -> Array:
        if operand in self.registers:
            return self.registers[operand]
        return self.full(int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0))

    def read(self, operand: str, kind: str) -> Array:
        return self.raw(operand).astype(bool) if kind == "pred" else decode(self.raw(operand), kind)

    def write(self, register: str, values: Array, kind: str, active: Array | None) -> None:
        raw = values.astype(np.uint64) if kind == "pred" else encode(values, kind)
        if active is not None:
            raw = np.where(active, raw, self.registers.get(register, self.full(0)))
        self.registers[register] = raw

    def address(self, operand: str) -> Array:
        base, offset = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()  # type: ignore[union-attr]
        return self.raw(base) + self.full(int(offset or 0))

    def run(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        position = 0
        while True:
            predicate, name, operands = instructions[position]
            active = None if predicate is None else self.registers[predicate[0]].astype(bool) ^ predicate[1]
            position += 1
            if name[0] == "ret":
                return
            if name[0] == "bra":
                if active is None or active.all():
                    position = labels[operands[0]]
                elif active.any():
                    raise NotImplementedError("threads of a program part ways")
            elif name[0] not in ("bar", "barrier"):
                getattr(self, f"op_{name[0]}", self.arithmetic)(name, operands, active)

    # Arithmetic, logic, conversion

    def arithmetic(self, name: list[str], operands: list[str], active: Array | None) -> None:
        target, *sources = operands
        kind = name[-1]
        if "wide" in name:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = (
                decode(self.raw(source), kind).astype(decode(self.full(0), wide).dtype)
                for source in sources[:2]
            )
            values = a * b if len(sources) == 2 else a * b + self.read(sources[2], wide)
            self.write(target, values, wide, active)
            return
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            values = _FUNCTIONS[name[0]](*(self.read(source, kind) for source in sources))
        self.write(target, values, kind, active)

    def op_shl(self, name: list[str], operands: list[str], active: Array | None) -> None:
        value = self.read(operands[1], name[-1])
        self.write(operands[0], value << self.raw(operands[2]).astype(value.dtype), name[-1], active)

    def op_shr(self, name: list[str], operands: list[str], active: Array | None) -> None:
        value = self.read(operands[1], name[-1])
        self.write(operands[0], value >> self.raw(operands[2]).astype(value.dtype), name[-1], active)

    def op_bfe(self, name: list[str], operands: list[str], active: Array | None) -> None:
        start, length = int(operands[2], 0), int(operands[3], 0)
        value = self.raw(operands[1]) >> np.uint64(start) & np.uint64((1 << length) - 1)
        if name[-1] == "s32":
            value = (value ^ np.uint64(1 << length - 1)).astype(np.int64) - (1 << length - 1)
        self.write(operands[0], value.astype(np.int64), name[-1], active)

    def op_lop3(self, name: list[str], operands: list[str], active: Array | None) -> None:
        a, b, c = (self.raw(operand) for operand in operands[1:4])
        table, result = int(operands[4], 0), self.full(0)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        self.write(operands[0], result, "b32", active)

    def op_prmt(self, name: list[str], operands: list[str], active: Array | None) -> None:
        both = (self.raw(operands[1]) & 0xFFFFFFFF) | self.raw(operands[2]) << np.uint64(32)
        selector, result = int(operands[3], 0), self.full(0)
        assert not selector & 0x8888, "sign replication is not implemented"
        for i in range(4):
            result |= (both >> np.uint64(8 * (selector >> 4 * i & 7)) & 255) << np.uint64(8 * i)
        self.write(operands[0], result, "b32", active)

    def op_setp(self, name: list[str], operands: list[str], active: Array | None) -> None:
        a, b = (self.read(operand, name[-1]) for operand in operands[1:])
        self.write(operands[0], getattr(operator, name[1])(a, b), "pred", active)

    def op_selp(self, name: list[str], operands: list[str], active: Array | None) -> None:
        chosen = np.where(self.raw(operands[3]).astype(bool), self.raw(operands[1]), self.raw(operands[2]))
        self.write(operands[0], chosen, name[-1].replace("s", "b"), active)

    def op_mov(self, name: list[str], operands: list[str], active: Array | None) -> None:
        targets, sources = (operand.strip("{} ").replace(" ", "").split(",") for operand in operands)
        bits = 8 * width_of(name[-1])
        whole = self.full(0)
        for i, source in enumerate(sources):
            whole |= self.raw(source) << np.uint64(i * bits // len(sources))
        for i, target in enumerate(targets):
            piece = f"b{bits // len(targets)}"
            self.write(target, whole >> np.uint64(i * bits // len(targets)), piece, active)

    def op_cvt(self, name: list[str], operands: list[str], active: Array | None) -> None:
        to, source = name[-2:]
        values = [self.read(operand, source) for operand in operands[1:]]
        self.write(operands[0], np.stack(values[::-1], -1) if to.endswith("x2") else values[0], to, active)

    # Memory

    def op_ld(self, name: list[str], operands: list[str], active: Array | None) -> None:
        kind = name[-1]
        if name[1] == "param":
            value = self.full(self.parameters[operands[1].strip("[]")])
            self.write(
                operands[0],
                decode(value, "s32" if kind == "s32" else f"b{kind[1:]}"),
                kind.replace("s32", "s64"),
                None,
            )
            return
        targets = operands[0].strip("{} ").replace(" ", "").split(",")
        size = width_of(kind)
        mask = np.ones(self.threads, bool) if active is None else active
        if not mask.any():
            return
        found = self.load(name[1], self.address(operands[1]), size * len(targets), mask)
        for i, target in enumerate(targets):
            piece = np.ascontiguousarray(found[:, i * size : (i + 1) * size]).view(f"u{size}")[:, 0]
            self.write(target, piece, f"b{8 * size}", active)

    def load(self, space: str, addresses: Array, count: int, mask: Array) -> Array:
        """`[threads, count]` bytes; 0 where masked."""
        found = np.zeros((self.threads, count), np.uint8)
        self.count(space, "load", addresses, count, mask)
        if space == "shared":
            found[mask] = self.shared[addresses[mask].astype(np.int64)[:, None] + np.arange(count)]
        elif mask.any():
            data, places = self.memory.bytes_at(addresses[mask], count)
            found[mask] = data[places]
        return found

    def op_st(self, name: list[str], operands: list[str], active: Array | None) -> None:
        size = width_of(name[-1])
        mask = np.ones(self.threads, bool) if active is None else active
        if not mask.any():
            return
        sources = operands[1].strip("{} ").replace(" ", "").split(",")
        pieces = [
            np.ascontiguousarray(self.raw(s).astype(f"u{size}")).view(np.uint8).reshape(-1, size)
            for s in sources
        ]
        values, addresses = np.concatenate(pieces, axis=1), self.address(operands[0])
        self.count(name[1], "store", addresses, values.shape[1], mask)
        if name[1] == "shared":
            self.shared[addresses[mask].astype(np.int64)[:, None] + np.arange(values.shape[1])] = values[mask]
        else:
            data, places = self.memory.bytes_at(addresses[mask], values.shape[1])
            data[places] = values[mask]

    def op_cp(self, name: list[str], operands: list[str], active: Array | None) -> None:
        if name[2] == "commit_group":
            self.copies.append([])
            return
        if name[2] == "wait_group":
            finished = max(0, len(self.copies) - 1 - int(operands[0]))
            for places, values in (copy for group in self.copies[:finished] for copy in group):
                self.shared[places] = values
            del self.copies[:finished]
            return
        target, count = self.address(operands[0]), int(operands[2], 0)
        used = self.raw(operands[3]).astype(np.int64) if len(operands) > 3 else np.full(self.threads, count)
        mask = np.ones(self.threads, bool) if active is None else active
        assert set(used[mask]) <= {0, count}, "copies of part of their width are not implemented"
        values = self.load("global", self.address(operands[1]), count, mask & (used > 0))
        self.count("shared", "copy", target, count, mask)
        self.copies[-1].append((target[mask].astype(np.int64)[:, None] + np.arange(count), values[mask]))

    def count(self, space: str, what: str, addresses: Array, size: int, mask: Array) -> None:
        """Sectors (global) or wavefronts (shared), and the fewest possible."""
        threads = _WARP if space == "global" else max(8, min(_WARP, _WARP * 4 // size))
        for start in range(0, self.threads, threads):
            chosen = addresses[start : start + threads][mask[start : start + threads]].astype(np.int64)
            if len(chosen):
                words = np.unique(chosen[:, None] // 4 + np.arange(-(-size // 4)))
                if space == "global":
                    self.counts[f"{space} {what}"] += len(np.unique(words // 8))
                    self.counts[f"{space} {what}, ideal"] += -(-len(words) // 8)
                else:
                    self.counts[f"{space} {what}"] += int(np.bincount(words % 32).max())
                    self.counts[f"{space} {what}, ideal"] += -(-len(words) // 32)

    # Matrices (PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix")

    def op_ldmatrix(self, name: list[str], operands: list[str], active: Array | None) -> None:
        targets = operands[0].strip("{} ").replace(" ", "").split(",")
        addresses, lane = self.address(operands[1]).astype(np.int64), np.arange(_WARP)
        out = np.zeros((len(targets), self.threads), np.uint64)
        for warp, matrix in product(range(0, self.threads, _WARP), range(len(targets))):
            rows = addresses[warp + 8 * matrix : warp + 8 * matrix + 8]
            tile = np.ascontiguousarray(self.shared[rows[:, None] + np.arange(16)]).view(np.uint16)
            tile = tile.T if "trans" in name else tile
            banks = np.bincount((rows[:, None] // 4 + np.arange(4)).ravel() % 32)
            self.counts["shared ldmatrix"] += int(banks.max())
            self.counts["shared ldmatrix, ideal"] += 1
            low, high = tile[lane // 4, lane % 4 * 2], tile[lane // 4, lane % 4 * 2 + 1]
            out[matrix, warp : warp + _WARP] = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(16)
        for target, values in zip(targets, out, strict=True):
            self.write(target, values, "b32", None)

    def op_mma(self, name: list[str], operands: list[str], active: Array | None) -> None:
        assert "m16n8k16" in name, name
        registers = [operand.strip("{} ").replace(" ", "").split(",") for operand in operands]
        kind, lane = name[-2], np.arange(self.threads)
        warp, group, pair = lane // _WARP, lane % _WARP // 4, lane % 4 * 2
        warps = self.threads // _WARP
        a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        for i, register in enumerate(registers[1]):
            a[warp[:, None], (group + i % 2 * 8)[:, None], (pair + i // 2 * 8)[:, None] + np.arange(2)] = (
                self.read(register, kind + "x2")
            )
        for i, register in enumerate(registers[2]):
            b[warp[:, None], (pair + i * 8)[:, None] + np.arange(2), group[:, None]] = self.read(
                register, kind + "x2"
            )
        for i, register in enumerate(registers[3]):
            c[warp, group + i // 2 * 8, pair + i % 2] = self.read(register, "f32")
        d = a @ b + c
        for i, register in enumerate(registers[0]):
            self.write(register, d[warp, group + i // 2 * 8, pair + i % 2], "f32", None)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": np.minimum, "max": np.maximum,
    "fma": lambda a, b, c: a * b + c, "mad": lambda a, b, c: a * b + c,
    "neg": operator.neg, "not": operator.invert,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "div": lambda a, b: np.trunc(a / b).astype(a.dtype), "rem": np.fmod,
}  # fmt: skip


def launch(ptx: str, grid: Sequence[int], arguments: Sequence[Tensor | int], shared: int) -> Counter[str]:
    """Run every program; tensors are changed in place. Returns the counts of memory traffic."""
    threads, names, instructions, labels = parse(ptx)
    memory, counts = Memory(), Counter[str]()
    values = [memory.add(a) if isinstance(a, Tensor) else a for a in arguments]
    parameters = dict(zip(names, [*values, *[0] * len(names)], strict=False))
    for place in product(*map(range, grid)):
        program = Program(threads, memory, parameters, place, shared)
        with np.errstate(all="ignore"):
            program.run(instructions, labels)
        counts += program.counts
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    for tensor, (_, data) in zip(tensors, memory.segments, strict=True):
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(data))
    return counts
