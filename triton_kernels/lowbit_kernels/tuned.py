"""Tiles that were timed on a GPU of this machine, in place of the shipped ones.

`tune.py` writes them, one file for each kind of GPU, in the user's cache (`$XDG_CACHE_HOME/lowbit`). A file
says with which versions it was measured: another Triton compiles other code, so a file of other versions
counts for nothing, and neither does one that is damaged. It is read once in a process, at the first launch
on a device; nothing is ever measured then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import triton

from lowbit_kernels.tiles import Tiles, key

HEIGHTS = {"decode": (8, 16, 32), "prefill": (64, 128, 256, 1024)}
"""Rows of x up to which one entry holds."""


def shape_key(
    kernel: str, bits: int, dtype: torch.dtype, rows: int, group_size: int, features: int, columns: int
) -> str:
    """The name of an entry: `decode w4 float16 m16 g128 4096x4096`."""
    height = next((height for height in HEIGHTS[kernel] if height >= rows), HEIGHTS[kernel][-1])
    return f"{kernel} {key(bits, dtype, height)} g{group_size} {features}x{columns}"


def versions() -> dict[str, str]:
    """What a measurement depends on beside the GPU: Triton, torch, and the text of the kernels."""
    digest = hashlib.sha256()
    for name in ("decode.py", "prefill.py", "tile.py", "layout.py"):
        digest.update(files("lowbit_kernels").joinpath(name).read_bytes())
    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": digest.hexdigest()[:16]}


def path_of(device_name: str) -> Path:
    """Where the tiles of a kind of GPU are kept."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_home / "lowbit" / f"tiles-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def read(path: Path) -> dict[str, Tiles]:
    """The entries of a file; none, with a warning, where it is damaged or of other versions."""
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["versions"] == versions():
            return {name: Tiles(*map(int, entry)) for name, entry in kept["tiles"].items()}
        reason = "was measured with other versions"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        reason = "is damaged"
    warnings.warn(f"lowbit: {path} {reason} and is not used: run lowbit tune again", stacklevel=2)
    return {}


def write(path: Path, tiles: Mapping[str, Tiles]) -> None:
    """Put entries into a file beside those that it has, all at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = {**read(path), **tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"versions": versions(), "tiles": {name: list(tile) for name, tile in sorted(entries.items())}}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
    Path(file.name).replace(path)
    for_device.cache_clear()


@cache
def for_device(device: torch.device) -> Mapping[str, Tiles]:
    """What was measured on such a device; asks the driver for its name, once."""
    if device.type != "cuda":
        return {}
    return read(path_of(torch.cuda.get_device_name(device)))
