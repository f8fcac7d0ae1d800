"""One safetensors file, written tensor by tensor in constant memory.

The safetensors library writes a file from tensors that are all in memory. A shard of several
gigabytes would be the largest thing in the process, so the format is written here: eight bytes with
the length of a JSON header, the header (dtype, shape and offsets of each tensor), then the data
without gaps (https://github.com/huggingface/safetensors, section "Format").

Data goes to a file beside the target as it comes. Closing the shard copies it behind the header in
the library's own order, widest dtype first and then by name, which keeps every tensor at a multiple of
its element size, and makes the file the same, byte for byte, as the one the library writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format, in the order in which the library stores them."""

_ORDER = list(DTYPES.values())
_AT_ONCE = 2**22  # bytes copied at a time


class Shard:
    """A safetensors file in the making.

    Attributes:
        path: Where it will be once it is closed.
        names: Tensors added so far.
        size: Their bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.size = 0
        self._entries: list[tuple[int, str, list[int], int, int]] = []
        self._data: BinaryIO = self._data_path().open("wb")

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor of any shape and device; its bytes go to disk at once.

        Raises:
            KeyError: safetensors has no name for its dtype.
        """
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        kind = _ORDER.index(DTYPES[tensor.dtype])
        self._entries.append((kind, name, list(tensor.shape), self.size, flat.numel()))
        flat.numpy().tofile(self._data)
        self.names.append(name)
        self.size += flat.numel()

    def close(self) -> None:
        """Put the header and the data together at `path`."""
        self._data.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        ordered = sorted(self._entries)
        for kind, name, shape, _, size in ordered:
            header[name] = {"dtype": _ORDER[kind], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
        with self.path.open("wb") as file, self._data_path().open("rb") as data:
            file.write(len(text).to_bytes(8, "little") + text)
            for *_, start, size in ordered:
                data.seek(start)
                for done in range(0, size, _AT_ONCE):
                    file.write(data.read(min(_AT_ONCE, size - done)))
        self._data_path().unlink()

    def _data_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.data")
