"""A checkpoint written shard by shard, and put in its place in one step.

Tensors go to disk as they come, so memory does not grow with the model. Everything is written into a
scratch folder beside the target; only a complete checkpoint is renamed to its final name, so
a crash or Ctrl-C leaves nothing behind and an existing checkpoint is replaced whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import durable, places
from lowbit.errors import LowbitError
from lowbit.shard import Shard

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `300MB` (powers of ten, as the hub counts).

    Raises:
        LowbitError: not a positive size, or more bytes than a file can have.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = match and (match[2] if match[2] in UNITS else f"{match[2]}B")
    size = float(match[1]) * UNITS[unit] if match and unit is not None else 0.0
    if size >= 2**63:
        shown = text if len(text) <= 24 else f"{text[:24]}..."
        raise LowbitError(f"{shown!r} is more than any disk holds: write it like 5GB or 300MB")
    if size < 1:
        raise LowbitError(f"{text!r} is not a size: write it like 5GB or 300MB")
    return int(size)


class CheckpointWriter:
    """Writes tensors into `model-0000i-of-0000n.safetensors` shards with an index.

    Attributes:
        folder: Where the shards go.
        total_size: Bytes of all tensors added.
    """

    def __init__(
        self, folder: Path, max_shard_size: int, marks: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Begin a checkpoint, or go on with one.

        Args:
            folder: Folder to create, or with `marks` the one they were made in.
            max_shard_size: Bytes of a shard.
            marks: What `mark` gave; anything written later is removed. An empty list begins a checkpoint
                that can be marked, in place of whatever is in the folder.

        Raises:
            LowbitError: a shard is not as it was marked.
        """
        self.folder = folder
        self._max_shard_size = max_shard_size
        self._resumable = marks is not None
        if not marks and self._resumable:
            shutil.rmtree(folder, ignore_errors=True)
        if not marks:
            folder.mkdir(parents=True)
        self._shards = _marked_shards(folder, marks) if marks else [self._new_shard(0)]
        self._names = {name for shard in self._shards for name in shard.names}
        self.total_size = sum(shard.size for shard in self._shards)

    def _new_shard(self, number: int) -> Shard:
        return Shard(_part(self.folder, number))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, to a new shard where it would overfill the current one.

        Raises:
            ValueError: the name was added before.
        """
        if name in self._names:
            raise ValueError(f"{name} was written twice")
        self._names.add(name)
        shard = self._shards[-1]
        if shard.size and shard.size + tensor.nbytes > self._max_shard_size:
            shard.close(keep_data=self._resumable)
            shard = self._new_shard(len(self._shards))
            self._shards.append(shard)
        shard.add(name, tensor)
        self.total_size += tensor.nbytes

    def mark(self) -> list[dict[str, Any]]:
        """Bring what was added to the disk; what another process needs to go on from here."""
        marks = [shard.mark() for shard in self._shards]
        durable.sync(self.folder)
        return marks

    def tidy(self) -> None:
        """Once a mark is committed: remove what only the one before it needed."""
        for shard in self._shards:
            if shard.closed:
                shard.data_path.unlink(missing_ok=True)

    def finish(self, config: Mapping[str, Any], sidecars: list[Path]) -> None:
        """Close the last shard; write the index, `config.json`, and copies of the source's other files.

        Args:
            config: What `config.json` is to say.
            sidecars: The other files, those in `places.CHAT_TEMPLATES` too; or that folder as a whole.
        """
        self._shards[-1].close(keep_data=self._resumable)
        count = len(self._shards)
        weight_map = {}
        for number, shard in enumerate(self._shards, start=1):
            name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            shard.path.rename(self.folder / name)
            weight_map.update(dict.fromkeys(shard.names, name))
        if count > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)
        for file in sidecars:
            _copy_sidecar(file, self.folder)
        write_json(self.folder / "config.json", config)


def _copy_sidecar(file: Path, folder: Path) -> None:
    """Copy one of the source's files; what lies in its folder of chat templates lands in ours."""
    if file.is_dir():
        shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
        return
    # A source may be called like that folder, but then it holds a configuration.
    if file.parent.name == places.CHAT_TEMPLATES and not (file.parent / "config.json").is_file():
        folder = folder / places.CHAT_TEMPLATES
        folder.mkdir(exist_ok=True)
    shutil.copyfile(file, folder / file.name)


def drop_parts(folder: Path) -> None:
    """Once a finished checkpoint is committed: remove what only the mark before it needed."""
    for path in folder.glob("part-*.data"):
        path.unlink()


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _marked_shards(folder: Path, marks: Sequence[Mapping[str, Any]]) -> list[Shard]:
    """The shards as they were marked, found again where `finish` had begun to rename them."""
    shards, needed = [], set()
    for number, mark in enumerate(marks):
        part = _part(folder, number)
        if mark["closed"] and not part.exists():
            for renamed in folder.glob(f"model-{number + 1:05}-of-*.safetensors"):
                renamed.rename(part)
        file = part if mark["closed"] else Shard.data_of(part)
        durable.check(file, mark["size"], mark["sha256"])
        shards.append(Shard(part, mark))
        needed.add(file)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)  # of the chat templates, where `finish` had begun
        elif path not in needed:
            path.unlink()
    return shards


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
            "free some space or choose another place"
        )


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """A folder next to `output` for the files of a run; after a failure no trace is left of it.

    What `kill -9` leaves is `OUTPUT.unfinished-...`, where a user sees it; see `put_in_place`.

    Raises:
        LowbitError: it can't be made.
    """
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=f"{output.name}.unfinished-", dir=output.parent)
        except OSError as error:
            raise LowbitError(
                f"{output} can't be written ({error.strerror}): choose another folder"
            ) from None
        with scratch as name:
            yield Path(name)
    except BaseException:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def put_in_place(finished: Path, output: Path) -> None:
    """Rename what is finished to `output`; what is there already is replaced.

    A file is replaced in one step: at every moment `output` is the old one or the new one, whole. A folder
    can't be, so the old one is moved aside, to `replaced` beside `finished`, and removed when the new one has
    its name. Where the process is killed between the two renames, nothing is called `output`, and both are
    whole in the folder of the run beside it, whose name begins with that of `output`. A work folder is put
    right by the next run (`work.py`); of `scratch_beside` the user renames one of them.
    """
    if not finished.is_dir():
        durable.sync(finished)
        finished.replace(output)
        durable.sync(output.parent)
        return
    durable.sync_folder(finished)
    aside = finished.with_name("replaced")
    if output.exists():
        output.rename(aside)
    try:
        finished.rename(output)
    except BaseException:  # Ctrl-C between the two renames too
        if aside.exists():
            aside.rename(output)
        raise
    durable.sync(output.parent)
    shutil.rmtree(aside, ignore_errors=True)
