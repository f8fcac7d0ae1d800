"""A look at a GGUF file's header before a library reads the file.

The gguf package believes every count that it reads: an array of 2^60 elements is a loop that never ends.
Here the header is walked once, with each count compared with the bytes that are left
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "File Structure").
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from lowbit.errors import LowbitError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
_STRING, _ARRAY = 8, 9
_INTEGERS = {4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_ELEMENTS_PER_BYTE = 8  # at most: no type has less than a bit per element


class _Header:
    """Reads forwards, never beyond the end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.left = path.stat().st_size

    def refuse(self, what: str) -> LowbitError:
        return LowbitError(f"{self.path} is no sound GGUF file ({what}): get a sound copy")

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise self.refuse(f"{size} bytes wanted at {self.file.tell()}, {self.left} left")
        self.left -= size
        return self.file.read(size)

    def skip(self, size: int) -> None:
        if size > self.left:
            raise self.refuse(f"{size} bytes wanted at {self.file.tell()}, {self.left} left")
        self.left -= size
        self.file.seek(size, 1)

    def number(self, kind: str) -> int:
        return int(struct.unpack(kind, self.take(struct.calcsize(kind)))[0])

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self) -> int | None:
        """Step over a value; an integer is returned."""
        kind = self.number("<I")
        if kind in _INTEGERS:
            return self.number(_INTEGERS[kind])
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            of, count = self.number("<I"), self.number("<Q")
            if of == _STRING and count <= self.left // 8:
                for _ in range(count):
                    self.skip(self.number("<Q"))
            elif of in _SIZES:
                self.skip(count * _SIZES[of])
            else:
                raise self.refuse(f"an array of {count} of type {of}")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise self.refuse(f"a value of type {kind}")
        return None


def check(path: Path) -> None:
    """Walk the header of a GGUF file.

    Raises:
        LowbitError: it is none, or a count or size in it does not fit the file.
    """
    with path.open("rb") as file:
        header = _Header(path, file)
        size = header.left
        if header.take(4) != b"GGUF":
            raise header.refuse("it does not begin with GGUF")
        version, tensors, values = header.number("<I"), header.number("<Q"), header.number("<Q")
        if version not in (2, 3):
            raise header.refuse(f"version {version}")
        if tensors > size // 24 or values > size // 12:
            raise header.refuse(f"{tensors} tensors and {values} values in {size} bytes")
        counts = {}
        for _ in range(values):
            name = header.string()
            counts[name] = header.value()
        for name, count in counts.items():
            if name.endswith("block_count") and not 0 <= (count or 0) <= tensors:
                raise header.refuse(f"{name}={count} with {tensors} tensors")
            if name == "general.alignment" and count not in (8, 16, 32, 64, 128, 256, 4096):
                raise header.refuse(f"{name}={count}")
            if count is not None and abs(count) > 2**40:
                raise header.refuse(f"{name}={count}")
        for _ in range(tensors):
            _check_tensor(header, size)


def _check_tensor(header: _Header, size: int) -> None:
    name, dimensions = header.string(), header.number("<I")
    if not 1 <= dimensions <= 4:
        raise header.refuse(f"{name} has {dimensions} dimensions")
    elements = 1
    for _ in range(dimensions):
        elements *= header.number("<Q")
    if elements > _ELEMENTS_PER_BYTE * size:
        raise header.refuse(f"{name} has {elements} elements in {size} bytes")
    header.number("<I")
    if header.number("<Q") > size:
        raise header.refuse(f"{name} begins behind the end")
