"""A checkpoint written shard by shard, and put in its place in one step.

Tensors are buffered until a shard is full, so memory holds one shard at most. Everything is written
into a scratch folder beside the target; only a complete checkpoint is renamed to its final name, so
a crash or Ctrl-C leaves nothing behind and an existing checkpoint is replaced whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.errors import LowbitError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `300MB` (powers of ten, as the hub counts).

    Raises:
        LowbitError: not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = match and (match[2] if match[2] in UNITS else f"{match[2]}B")
    size = int(float(match[1]) * UNITS[unit]) if match and unit is not None else 0
    if size <= 0:
        raise LowbitError(f"{text!r} is not a size: write it like 5GB or 300MB")
    return size


class CheckpointWriter:
    """Collects tensors into `model-0000i-of-0000n.safetensors` shards with an index.

    Attributes:
        folder: Where the shards go.
        total_size: Bytes of all tensors added.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.total_size = 0
        self._max_shard_size = max_shard_size
        self._buffer: dict[str, Tensor] = {}
        self._buffered = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; writes a shard when the next tensor would overfill it.

        Raises:
            ValueError: the name was added before.
        """
        if name in self._buffer or any(name in shard for shard in self._shards):
            raise ValueError(f"{name} was written twice")
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffered + size > self._max_shard_size:
            self._flush()
        self._buffer[name] = tensor.detach().to("cpu").contiguous()
        self._buffered += size
        self.total_size += size

    def _flush(self) -> None:
        self._shards.append(list(self._buffer))
        save_file(self._buffer, self._part(len(self._shards)), metadata={"format": "pt"})
        self._buffer, self._buffered = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def finish(self, config: Mapping[str, Any], sidecars: list[Path]) -> None:
        """Write what is buffered, the index, `config.json`, and copies of the source's other files."""
        if self._buffer:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._part(number).rename(self.folder / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)
        for file in sidecars:
            shutil.copyfile(file, self.folder / file.name)
        write_json(self.folder / "config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as transformers does: two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def quantized_config(
    source_config: Path, quantization: Mapping[str, Any], tied: bool | None
) -> dict[str, Any]:
    """The source's `config.json` with the quantization added.

    Args:
        source_config: Path of the original file.
        quantization: The format's `quantization_config`.
        tied: False where the head was untied; None keeps what the source says.

    `dtype` becomes bfloat16 whatever the source says: packed float16 is two orders of magnitude
    slower on CPUs and overflows in some models.
    """
    config: dict[str, Any] = json.loads(source_config.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("torch_dtype", None)
        if part is config or "dtype" in part:
            part["dtype"] = "bfloat16"
        if tied is not None and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = tied
    config["quantization_config"] = dict(quantization)
    return config


def stored_dtype(source_dtype: torch.dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an unquantized tensor is written.

    bfloat16, except that float32 tensors of a model that is not float32 are so on purpose.
    """
    if not source_dtype.is_floating_point:
        return source_dtype
    keep = source_dtype == torch.float32 and model_dtype != torch.float32
    return torch.float32 if keep else torch.bfloat16


def check_target(output: Path, source: str, overwrite: bool) -> None:
    """Refuse an output that would overwrite something.

    Raises:
        LowbitError: `output` exists and is not empty (or is not a checkpoint), or is the source itself.
    """
    if output.exists() and Path(source).expanduser().exists() and output.samefile(Path(source).expanduser()):
        raise LowbitError(f"--output {output} is the model itself: choose another folder")
    if output.is_file():
        raise LowbitError(f"--output {output} is a file: choose a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise LowbitError(f"--output {output} exists and is not empty: choose another or add --overwrite")
        if not (output / "config.json").is_file():
            raise LowbitError(f"--output {output} holds something else than a model: choose another folder")


def check_room(folder: Path, needed: int) -> None:
    """Refuse to start where the disk can't hold the result.

    Raises:
        LowbitError: less than `needed` bytes are free at `folder`.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LowbitError(
            f"{folder} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed: "
            "free some space or choose another --output"
        )


def put_in_place(finished: Path, output: Path) -> None:
    """Rename a finished folder to `output`; one that is there already is moved aside and removed."""
    aside = finished.with_name("replaced")
    if output.exists():
        output.rename(aside)
    finished.rename(output)
    shutil.rmtree(aside, ignore_errors=True)
