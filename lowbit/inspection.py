"""What is in a checkpoint folder: schemes, bits, bytes. Only headers of the files are read."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from lowbit import hf, untrusted
from lowbit.errors import LowbitError
from lowbit.formats import Format, is_part


@dataclass(frozen=True)
class Part:
    """All modules of a checkpoint that are alike but for their number.

    Attributes:
        name: Module name with `*` for numbers.
        scheme: `w4g128`, or the dtype of what is not quantized.
        quantized: Is it on an integer grid?
        modules: How many there are.
        weights: Weights in all of them.
        bytes: What they take on disk, scales, zeros and indices counted.
    """

    name: str
    scheme: str
    quantized: bool
    modules: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / max(self.weights, 1)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, summed up.

    Attributes:
        method: `quant_method` of its configuration, or "none".
        parts: Quantized parts first, then the rest, in order of size.
        file_bytes: Size of the weight files.
    """

    method: str
    parts: list[Part]
    file_bytes: int

    def bits_per_weight(self, quantized_only: bool = False) -> float:
        """Stored bits per weight over the quantized parts or over everything."""
        parts = [part for part in self.parts if part.quantized or not quantized_only]
        return 8 * sum(p.bytes for p in parts) / max(sum(p.weights for p in parts), 1)


@dataclass
class _Module:
    bytes: int = 0
    weights: int = 0
    scheme: str = ""
    quantized: bool = False


def inspect(folder: str | Path) -> Inspection:
    """Read the headers of a checkpoint.

    Raises:
        LowbitError: no checkpoint, a corrupt file, or a quantization that lowbit can't read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LowbitError(f"{folder} is not a folder: give the folder of a checkpoint")
    quantization, fmt = hf.quantization_of(folder)
    method = str(quantization.get("quant_method", "none"))
    if quantization and fmt is None:
        raise LowbitError(f"{folder} is quantized as {method}, which lowbit can't read")
    modules: dict[str, _Module] = defaultdict(_Module)
    files = untrusted.weight_files(folder)
    if not files:
        raise LowbitError(f"{folder} has no *.safetensors: give the folder of a checkpoint")
    for file in files:
        with untrusted.reading(file), safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a mapping)
                _count(modules, key, opened, fmt, quantization)
    return Inspection(method, _parts(modules), sum(file.stat().st_size for file in files))


def _count(
    modules: dict[str, _Module], key: str, opened: object, fmt: Format | None, config: dict[str, object]
) -> None:
    piece = opened.get_slice(key)  # type: ignore[attr-defined]
    shape, dtype = piece.get_shape(), piece.get_dtype()
    size = prod(shape) * _bytes(dtype)
    module, _, suffix = key.rpartition(".")
    if fmt is None or not is_part(fmt, suffix, dtype):
        entry = modules[key.removesuffix(".weight")]
        entry.weights += prod(shape)
        entry.scheme = dtype.lower()
    else:
        entry = modules[module]
        scheme = fmt.read_config(config, module)
        entry.quantized, entry.scheme = True, str(scheme)
        if suffix == "weight_shape":
            entry.weights = int(opened.get_tensor(key).prod())  # type: ignore[attr-defined]
        elif suffix == "weight":
            entry.weights = prod(shape)
        elif suffix == "qweight":
            entry.weights = prod(shape) * 32 // scheme.bits
    entry.bytes += size


def _bytes(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return 1 if digits is None else max(1, int(digits[0]) // 8)


def _parts(modules: dict[str, _Module]) -> list[Part]:
    grouped: dict[tuple[str, str, bool], list[_Module]] = defaultdict(list)
    for name, module in modules.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        grouped[pattern, module.scheme, module.quantized].append(module)
    parts = [
        Part(name, scheme, quantized, len(found), sum(m.weights for m in found), sum(m.bytes for m in found))
        for (name, scheme, quantized), found in grouped.items()
    ]
    return sorted(parts, key=lambda part: (not part.quantized, -part.bytes))
