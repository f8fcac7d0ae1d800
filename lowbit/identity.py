"""What the bytes of a result depend on: the model's files, the text, the versions of what computes.

Weights are too large to be read twice. Of each tensor the entry in the header and two pieces of its bytes
are taken, the first and the middle one: no training, merging or conversion leaves those alone. Whatever
is small is taken whole. Names and dates of files don't count, so a model may be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from lowbit import durable

PIECE = 4096  # bytes
SHOWN = 16  # hex digits are enough to tell two models apart


def of_model(weights: Mapping[str, str], others: Iterable[Path]) -> str:
    """Digest of a model: its safetensors files, and the files around them.

    Args:
        weights: Digest of each file by its name, all of one kind (`of_weights`); names give the order only.
        others: Files whose every byte counts.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].encode())
    for path in sorted(others, key=lambda path: path.name):
        digest.update(f"{path.name} {durable.sha256(path)}".encode())
    return digest.hexdigest()[:SHOWN]


def of_weights(path: Path) -> str:
    """Digest of one safetensors file, which was opened before, so that its header is sound."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest.update(header)
        entries = [entry["data_offsets"] for entry in json.loads(header).values() if "data_offsets" in entry]
        for start, stop in sorted(entries):
            for place in (start, (start + stop) // 2):
                file.seek(8 + length + place)
                digest.update(file.read(min(PIECE, stop - place)))
    return digest.hexdigest()


def of_text(spec: str | None) -> str | None:
    """Digest of a local file of text; None where `spec` names none."""
    path = Path(spec) if spec else None
    return durable.sha256(path)[:SHOWN] if path and path.is_file() else None


def of_tokens(rows: Iterable[Tensor]) -> str:
    """Digest of token ids, int64 `[rows, length]` each."""
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()[:SHOWN]


def versions(*more: str) -> dict[str, str]:
    """Of what computes, and of the packages `more`: another version may round otherwise."""
    found = {}
    for package in ("lowbit", "torch", "transformers", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            continue
    return found
