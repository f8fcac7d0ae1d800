"""PTX as text: its number types and its statements."""

from __future__ import annotations

import re

import numpy as np

Array = np.ndarray


def bf16_to_float(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def float_to_bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + 0x7FFF + ((bits >> 16) & 1) >> 16).astype(np.uint16)


def decode(raw: Array, kind: str) -> Array:
    """Register contents, uint64, as numbers of a PTX type; packed halves get a last dimension of 2."""
    if kind.endswith("x2"):
        halves = np.stack((raw & 0xFFFF, raw >> 16 & 0xFFFF), axis=-1)
        return decode(halves, kind[:-2])
    if kind == "bf16":
        return bf16_to_float(raw.astype(np.uint16))
    if kind in ("f16", "f32"):
        width = {"f16": (np.uint16, np.float16), "f32": (np.uint32, np.float32)}[kind]
        return np.ascontiguousarray(raw.astype(width[0])).view(width[1]).astype(np.float64)
    unsigned = np.dtype(f"u{int(kind[1:]) // 8}")
    return raw.astype(unsigned).view(f"i{unsigned.itemsize}") if kind[0] == "s" else raw.astype(unsigned)


def encode(values: Array, kind: str) -> Array:
    """The inverse of `decode`: rounds once, or wraps."""
    if kind.endswith("x2"):
        low, high = np.moveaxis(values, -1, 0)
        return encode(low, kind[:-2]) | encode(high, kind[:-2]) << np.uint64(16)
    if kind == "bf16":
        return float_to_bf16(values).astype(np.uint64)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32).astype(np.uint64)
    unsigned = np.dtype(f"u{int(kind[1:]) // 8}")
    return (
        values.astype(f"i{unsigned.itemsize}" if values.dtype.kind == "i" else unsigned)
        .view(unsigned)
        .astype(np.uint64)
    )


def width_of(kind: str) -> int:
    """Bytes of a PTX type."""
    return int(re.sub(r"\D", "", kind.removesuffix("x2"))) // 8


Instruction = tuple[tuple[str, bool] | None, list[str], list[str]]


def parse(ptx: str) -> tuple[int, list[str], list[Instruction], dict[str, int]]:
    """Threads, parameters, instructions `(predicate, dotted name, operands)`, and labels."""
    body = re.sub(
        r"//[^\n]*|^\s*\.(loc|pragma|section|file)[^\n]*", "", ptx[ptx.index(".visible .entry") :], flags=re.M
    )
    threads = int(re.search(r"\.reqntid (\d+)", body)[1])  # type: ignore[index]
    header, code = body.split("\n{", 1)
    code = re.sub(r"\.reg [^;]*;", "", code[: code.index("$L__func_end")])
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    # Braces around inline PTX stand alone on a line; those of operands do not.
    for statement in re.split(r";|(?<=:)\n|^\s*[{}]\s*$", code, flags=re.M):
        text = (
            statement.strip().removeprefix("{").strip()
            if not re.match(r"\s*\{[^}]*,", statement)
            else statement
        )
        while match := re.match(r"(\$L\w+):\s*", text):
            labels[match[1]] = len(instructions)
            text = text[match.end() :]
        if not text or text.startswith("}"):
            continue
        guard = re.match(r"@(!?)(%p\d+)\s+", text)
        predicate = (guard[2], guard[1] == "!") if guard else None
        name, _, rest = text[guard.end() if guard else 0 :].partition(" ") if " " in text else (text, "", "")
        name, _, more = name.partition("\t")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", more + " " + rest)
        instructions.append((predicate, name.strip().split("."), operands))
    return threads, re.findall(r"\w+_param_\d+", header), instructions, labels
