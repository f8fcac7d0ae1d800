"""One safetensors file, written tensor by tensor in constant memory.

The safetensors library writes a file from tensors that are all in memory. A shard of several
gigabytes would be the largest thing in the process, so the format is written here: eight bytes with
the length of a JSON header, the header (dtype, shape and offsets of each tensor), then the data
without gaps (https://github.com/huggingface/safetensors, section "Format").

Readers map the file and want every tensor at a multiple of its element size. The library gets
that by putting wide elements first; here each width goes to a file of its own, and closing the shard
strings them together, widest first, behind the header.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
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
        self._entries: dict[int, dict[str, tuple[str, list[int], int]]] = {}
        self._files: dict[int, BinaryIO] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor of any shape and device; its bytes go to disk at once.

        Raises:
            KeyError: safetensors has no name for its dtype.
        """
        width = tensor.element_size()
        if width not in self._files:
            self._files[width] = self._part(width).open("wb")
            self._entries[width] = {}
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        flat.numpy().tofile(self._files[width])
        self._entries[width][name] = (DTYPES[tensor.dtype], list(tensor.shape), flat.numel())
        self.names.append(name)
        self.size += flat.numel()

    def close(self) -> None:
        """Put the header and the parts together at `path`."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        widths = sorted(self._files, reverse=True)
        for width in widths:
            for name, (dtype, shape, size) in self._entries[width].items():
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for width in widths:
                self._files[width].close()
                with self._part(width).open("rb") as part:
                    shutil.copyfileobj(part, file, 2**20)
                self._part(width).unlink()

    def _part(self, width: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{width}")
