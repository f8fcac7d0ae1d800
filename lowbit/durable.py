"""Files that outlive a power cut, and that say so when they did not.

A rename is atomic, but neither the data nor the rename is on the disk before the system is told to put
it there (`fsync` of the file, then of its folder). So a file is written beside its name, synced, renamed,
and the folder synced: after a cut there is the old file or the new one. Whoever rests on a file later
keeps its size and SHA-256, and `check` finds out what a disk or a hand has done to it since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit import untrusted
from lowbit.errors import LowbitError
from lowbit.shard import DTYPES

_AT_ONCE = 2**22  # bytes read or written at a time


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring all files of a folder and of those in it to the disk, and their names."""
    for path in folder.iterdir():
        if path.is_file():
            sync(path)
        elif path.is_dir():
            sync_folder(path)
    sync(folder)


def part_from(folder: Path, name: str) -> None:
    """Where a file is a link, put a copy in the link's place: what is written then stays in the folder.

    The hub's cache links the files of a snapshot to blobs, which are named by their content and shared.

    Raises:
        LowbitError: the link leads out of the folder.
    """
    path = folder / name
    if not path.is_symlink():
        return
    kept = untrusted.inside(folder, name)
    if not kept.is_file():  # it leads nowhere
        path.unlink()
        return
    new = path.with_name(f"{name}.new")
    try:
        shutil.copyfile(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by this JSON, atomically."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False, separators=(",", ":")))  # in C; dump is not
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, one tensor at a time, and sync it.

    Returns:
        Its `size` and `sha256`, for `check`.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        where = [offset, offset := offset + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": where}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(flat), _AT_ONCE):
                file.write(flat[start : start + _AT_ONCE])
                digest.update(flat[start : start + _AT_ONCE])
        file.flush()
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own."""
    return dict(each_tensor(path))


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, one after the other.

    Memory of torch's own starts where a vector does; in a mapped file tensors start anywhere, and a
    kernel that minds would round a sum otherwise.
    """
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name).clone()


def sha256(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(_AT_ONCE, left))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def check(path: Path, size: int, known: str) -> None:
    """Compare the first `size` bytes of a file with what was written.

    Raises:
        LowbitError: it is not there, too short, or other bytes.
    """
    if not path.is_file() or path.stat().st_size < size or sha256(path, size) != known:
        raise LowbitError(f"{path} is damaged or gone: add --restart to start over")
