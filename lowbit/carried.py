"""The activations between two blocks: in memory up to a size, beyond it in mapped files.

A file has lost its name before it is written to, so nothing is left behind however the process ends.
What a mapped tensor holds lies in the system's cache or on the disk; of all of them, the pages of the one
that was used last are in this process.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit import pages


class Carried:
    """A list of tensors, None until they are set.

    Args:
        count: How many.
        in_memory: Bytes kept in memory; None keeps all of them there.
        folder: Where the files of the others are made.
    """

    def __init__(self, count: int, in_memory: int | None = None, folder: Path | None = None) -> None:
        self._tensors: list[Tensor | None] = [None] * count
        self._in_memory, self._folder = in_memory, folder
        self._mapped: set[int] = set()
        self._last: Tensor | None = None

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> Tensor | None:
        if self._last is not None:
            pages.forget(self._last)
        tensor = self._tensors[index]
        self._last = tensor if index in self._mapped else None
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        old = self._tensors[index]
        if index in self._mapped and old is not None and old.shape == tensor.shape:
            old.copy_(tensor)
            pages.forget(old)
            return
        self._tensors[index] = None
        if self._in_memory is None or self.in_memory() + tensor.nbytes <= self._in_memory:
            self._mapped.discard(index)
            self._tensors[index] = tensor
        else:
            self._tensors[index] = self._map(tensor)
            self._mapped.add(index)

    def __iter__(self) -> Iterator[Tensor | None]:
        return (self[index] for index in range(len(self)))

    def named(self) -> Mapping[str, Tensor]:
        """Those that are set, by number (`000001`); read one after the other, one at a time is resident."""
        return _Named(self, [n for n, tensor in enumerate(self._tensors) if tensor is not None])

    @property
    def is_limited(self) -> bool:
        """Is there a limit to what is kept in memory?"""
        return self._in_memory is not None

    def in_memory(self) -> int:
        """Bytes of the tensors that are not in files."""
        held = (t for i, t in enumerate(self._tensors) if t is not None and i not in self._mapped)
        return sum(tensor.nbytes for tensor in held)

    def clear(self) -> None:
        """Let everything go."""
        self._tensors, self._mapped, self._last = [None] * len(self), set(), None

    def _map(self, tensor: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(prefix=".activations-", dir=self._folder) as file:
            _make_room(file.fileno(), max(tensor.nbytes, 1))
            flat = torch.from_file(file.name, shared=True, size=math.prod(tensor.shape), dtype=tensor.dtype)
        mapped = flat.view(tensor.shape)
        mapped.copy_(tensor)
        pages.forget(mapped)
        return mapped


def _make_room(file: int, size: int) -> None:
    """Give a file its size and its room on the disk.

    A full disk refuses here, with an `OSError`. What is written through a mapping later can't be refused: the
    system kills the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


class _Named(Mapping[str, Tensor]):
    def __init__(self, carried: Carried, numbers: list[int]) -> None:
        self._carried, self._numbers = carried, {f"{number:06}": number for number in numbers}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._carried[self._numbers[name]]
        assert tensor is not None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)
