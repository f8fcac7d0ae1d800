"""One safetensors file, written tensor by tensor in constant memory.

The safetensors library writes a file from tensors that are all in memory. A shard of several
gigabytes would be the largest thing in the process, so the format is written here: eight bytes with
the length of a JSON header, the header (dtype, shape and offsets of each tensor), then the data
without gaps (https://github.com/huggingface/safetensors, section "Format").

Data goes to a file beside the target as it comes. Closing the shard copies it behind the header in
the library's own order, widest dtype first and then by name, which keeps every tensor at a multiple of
its element size, and makes the file the same, byte for byte, as the one the library writes.

A shard in the making can be marked: what is in it until then is on the disk, and another process can go
on from the mark, whatever was written after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lowbit.errors import LowbitError

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format, in the order in which the library stores them; its types of 4 and 6 bits are left out,
whose tensors have another shape in torch than on disk, or none."""

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_ORDER = list(DTYPES.values())
_AT_ONCE = 2**22  # bytes copied at a time


def dtype_of(name: str, tensor: str) -> torch.dtype:
    """What torch calls a dtype of the format, that of `tensor`.

    Raises:
        LowbitError: lowbit does not read or write it.
    """
    if name not in _BY_NAME:
        raise LowbitError(f"{tensor} is stored as {name}: convert it to one of {', '.join(_ORDER)}")
    return _BY_NAME[name]


class Shard:
    """A safetensors file in the making.

    Attributes:
        path: Where it will be once it is closed.
        names: Tensors added so far.
        size: Their bytes.
        closed: Is it whole?
    """

    def __init__(self, path: Path, mark: Mapping[str, Any] | None = None) -> None:
        """Begin a shard, or with `mark` go on with one that holds what was marked."""
        self.path = path
        self._entries: list[tuple[int, str, list[int], int, int]] = []
        self._digest = hashlib.sha256()
        self.closed = bool(mark and mark["closed"])
        self._whole = dict(mark) if mark and self.closed else {}
        if mark:
            if any(kind not in _ORDER for kind, *_ in mark["entries"]):
                raise LowbitError(f"{path} was begun by another version: add --restart to start over")
            self._entries = [(_ORDER.index(kind), *rest) for kind, *rest in mark["entries"]]
        self.names = [name for _, name, *_ in self._entries]
        self.size = sum(entry[-1] for entry in self._entries)
        if not self.closed:
            self._data: BinaryIO = self.data_path.open("r+b" if mark else "wb")
            for _ in range(0, self.size, _AT_ONCE):
                self._digest.update(self._data.read(min(_AT_ONCE, self.size - self._data.tell())))
            self._data.truncate(self.size)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor of any shape and device; its bytes go to disk at once.

        Raises:
            LowbitError: `DTYPES` lacks its dtype.
        """
        if tensor.dtype not in DTYPES:
            raise LowbitError(f"{name} is {tensor.dtype}: convert it to one of {', '.join(_ORDER)}")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = _ORDER.index(DTYPES[tensor.dtype])
        self._entries.append((kind, name, list(tensor.shape), self.size, flat.size))
        flat.tofile(self._data)
        self._digest.update(flat.data)
        self.names.append(name)
        self.size += flat.size

    def close(self, keep_data: bool = False) -> None:
        """Put the header and the data together at `path`; with `keep_data` the latter stays, too."""
        self._data.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        ordered = sorted(self._entries)
        for kind, name, shape, _, size in ordered:
            header[name] = {"dtype": _ORDER[kind], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
        digest = hashlib.sha256()
        with self.path.open("wb") as file, self.data_path.open("rb") as data:
            for part in (len(text).to_bytes(8, "little"), text):
                file.write(part)
                digest.update(part)
            for *_, start, size in ordered:
                data.seek(start)
                for done in range(0, size, _AT_ONCE):
                    part = data.read(min(_AT_ONCE, size - done))
                    file.write(part)
                    digest.update(part)
        self.closed = True
        self._whole = {"size": 8 + len(text) + offset, "sha256": digest.hexdigest(), "synced": False}
        if not keep_data:
            self.data_path.unlink()

    def mark(self) -> dict[str, Any]:
        """Bring the shard to the disk as it is; what another process needs to go on from here."""
        if not self.closed:
            self._data.flush()
            os.fsync(self._data.fileno())
            found = {"size": self.size, "sha256": self._digest.hexdigest()}
        else:
            found = {name: self._whole[name] for name in ("size", "sha256")}
            if not self._whole.get("synced", True):
                with self.path.open("rb+") as file:
                    os.fsync(file.fileno())
                self._whole["synced"] = True
        entries = [[_ORDER[kind], *rest] for kind, *rest in self._entries]
        return {"closed": self.closed, "entries": entries, **found}

    @property
    def data_path(self) -> Path:
        """Where the data is until the shard is closed."""
        return self.data_of(self.path)

    @staticmethod
    def data_of(path: Path) -> Path:
        """Where the data of a shard at `path` is until it is closed."""
        return path.with_name(f"{path.name}.data")
