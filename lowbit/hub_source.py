"""A source whose weight files come from the hub one at a time: `--drop-source`.

A run reads what lies outside of the blocks, then tensors that the architecture does not use, then block
after block, then the head. Each of these parts is in one file or a few. So before a part is loaded its files
are there and all others are gone, but for the one that the next part will want (`hub_shards.py`).

What lies outside of the blocks stays mapped all through the run, and a mapped file takes room even when
it is removed. Its tensors are copied into files of their own, at their own places, with holes for the rest.

Such a model is known by the digests that the hub lists. What the result tells of it is the digest that a
folder with the same files has; it is made of each file while that is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import identity, ranks, topology, untrusted
from lowbit.effort import Effort
from lowbit.errors import LowbitError
from lowbit.hub_shards import HubShards, copy_parts, digest_of
from lowbit.plan import head_name
from lowbit.source import Source
from lowbit.target import Target, megabytes

OPTION = "--drop-source"


def check(
    keep_source: bool,
    model: str | Path | PreTrainedModel,
    dial: Effort,
    within: Target | None,
) -> None:
    """Refuse to drop a source that is needed all at once, or is no copy of a hub's.

    Raises:
        LowbitError: a model that is no hub id, training, text from the model itself, a target, or ranks.
    """
    if keep_source:
        return
    keep = "use --keep-source"
    if isinstance(model, PreTrainedModel):
        raise LowbitError(f"{OPTION} is for a hub id, not for a model in memory: {keep}")
    path = Path(model).expanduser()
    if path.suffix == ".gguf" or path.exists():
        raise LowbitError(f"{OPTION} is for a hub id, and {model} is a local file or folder: {keep}")
    if dial.training:
        how = "leave out --method qat" if dial.weights else "use --effort balanced"
        raise LowbitError(f"{OPTION}: training reads the whole original: {how}, or {keep}")
    if dial.dataset == "self":
        raise LowbitError(f"{OPTION}: --dataset self loads the whole model: give a text, or {keep}")
    if within:
        raise LowbitError(f"{OPTION}: {within.option} reads the model three times: give --bits, or {keep}")
    if ranks.size() > 1:
        raise LowbitError(f"{OPTION} is for one process, not {ranks.size()}: leave out torchrun, or {keep}")


class HubSource(Source):
    """A source that fetches a part's files before it is loaded; see `Source`."""

    whole = False

    def __init__(self, model: str, scratch: Path, dtype: torch.dtype) -> None:
        """Open a hub id.

        Args:
            model: Hub id, with or without `@revision`.
            scratch: Folder for the files that come and go.
            dtype: Working precision.

        Raises:
            LowbitError: as `Source`, or the hub can't be reached or refuses.
        """
        self._scratch, self._at = scratch, 0
        self.shards = HubShards(model, scratch)
        super().__init__(self.shards.folder, dtype)
        self.seen = {"digests": {}, "downloads": {}, "failures": []}
        path, blocks = topology.decoder_blocks(self.model)
        self._block_paths = [f"{path}.{number}" for number in range(len(blocks))]
        self._head_keys = self.keys_under([head_name(self.model)])
        self._outside = set(self.keys_outside([path])).difference(self._head_keys)
        self.held = self._most_held()

    def _index_files(self) -> dict[str, Path]:
        self._name_of = {self.shards.path(name): name for name in self.shards.sizes}
        keys_of = {path: sorted(self.shards.headers[name]) for path, name in self._name_of.items()}
        return {key: path for path, keys in keys_of.items() for key in keys}  # as safetensors lists them

    def _count_bytes(self) -> int:
        return sum(self.shards.sizes.values())

    @cached_property
    def _parts(self) -> list[set[str]]:
        """The files to fetch, part by part in the order of a run."""
        parts: list[Sequence[str]] = [[key] for key in self.extra_keys]
        parts += [self.keys_under([path]) for path in self._block_paths]
        return [self._fetched(part) for part in [*parts, self._head_keys]]

    def _files(self, keys: Iterable[str]) -> set[str]:
        """Names of the weight files that these keys are read from."""
        return {self._name_of[file] for key in keys if (file := self._file_of[key]) in self._name_of}

    def _fetched(self, keys: Iterable[str]) -> set[str]:
        """Those of them that have to be fetched."""
        return self._files(keys).difference(self.shards.cached)

    def _most_held(self) -> int:
        """Bytes on the disk at the worst moment: a part, what follows it, and what lies outside."""
        sizes, headers = self.shards.sizes, self.shards.headers
        held = 0
        for key in self._outside:
            for name in self._fetched([key]):
                start, stop = headers[name][key]
                held += stop - start
        largest = max((sizes[name] for part in self._parts for name in part), default=0)
        return held + max(sum(sizes[name] for name in part) for part in self._parts) + largest

    def load(self, keys: Iterable[str], device: torch.device) -> None:
        """`Source.load`, once the files are here.

        Raises:
            ConnectionError: one can't be downloaded, or is not what the hub said.
            LowbitError: as `Source.load`.
        """
        keys = list(keys)
        self._bring(keys)
        super().load(keys, device)

    def read(self, key: str) -> Tensor:
        """`Source.read`, once the file is here."""
        if not self.shards.has(self._fetched([key])):
            self._bring([key])
        return super().read(key)

    def _bring(self, keys: Sequence[str]) -> None:
        outside = [key for key in keys if key in self._outside and self._fetched([key])]
        if outside:
            self._keep(outside)
        names = self._fetched(keys)
        if names:
            self._need(names, self._following(names))
        self._digest(self._files(keys))

    def _need(self, names: Iterable[str], following: str | None) -> None:
        downloads = self.seen["downloads"]
        for name in self.shards.need(names, following):
            downloads[name] = downloads.get(name, 0) + 1
        self.seen["failures"] += self.shards.failures
        self.shards.failures.clear()

    def _digest(self, names: Iterable[str]) -> None:
        """Note the digests of files that are here."""
        for name in sorted(set(names).difference(self.seen["digests"])):
            with untrusted.reading(self.shards.path(name)):
                self.seen["digests"][name] = identity.of_weights(self.shards.path(name))

    def _following(self, names: set[str]) -> str | None:
        """The first file that a later part needs and this one does not."""
        at = next((i for i, part in enumerate(self._parts) if i >= self._at and names <= part), None)
        if at is None:
            return None
        self._at = at
        return next((name for part in self._parts[at + 1 :] for name in sorted(part - names)), None)

    def _keep(self, keys: Sequence[str]) -> None:
        """Copy these tensors for the whole run; last comes the file that the blocks begin with."""
        order = [name for part in self._parts for name in sorted(part)]
        later = {name: order.index(name) if name in order else len(order) for name in self._fetched(keys)}
        names = sorted(later, key=lambda name: later[name], reverse=True)
        for name, following in zip(names, [*names[1:], None], strict=True):
            self._need([name], following)
            self._digest([name])
            header = self.shards.headers[name]
            here = [key for key in keys if self._fetched([key]) == {name}]
            kept = self._scratch / "outside" / name
            with untrusted.reading(f"{self.shards.model}: {name}"):
                copy_parts(self.shards.path(name), [header[key] for key in here], kept)
            self._file_of.update(dict.fromkeys(here, kept))

    def identity(self) -> str:
        """Digest of what the hub lists, and of the small files."""
        return identity.of_model({"": digest_of(self.shards.digest)}, self._around())

    def known(self) -> dict[str, str]:
        """The digest of a folder with the same files."""
        unread = self.shards.sizes.keys() - self.seen["digests"].keys()  # no part needs any of their keys
        for name in sorted(unread):
            self._need([name], None)
            self._digest([name])
        return {"model": identity.of_model(self.seen["digests"], self._around())}

    def notes(self) -> list[str]:
        """How much was downloaded, how much of it more than once, and what had to be asked for again."""
        downloads, sizes = self.seen["downloads"], self.shards.sizes
        total = sum(sizes[name] * count for name, count in downloads.items())
        again = {name: count - 1 for name, count in downloads.items() if count > 1}
        note = f"{megabytes(total)} of the source downloaded in {len(downloads)} files, and removed again"
        if again:
            more = sum(sizes[name] * count for name, count in again.items())
            note += f"; {len(again)} of them more than once ({megabytes(more)})"
        failures = self.seen["failures"]
        if not failures:
            return [note]
        told = f"downloads that failed and were asked for again: {len(failures)}; the first: {failures[0]}"
        return [note, told]

    def release(self) -> None:
        """Let all weights go, and the files with them."""
        super().release()
        self.shards.close()
