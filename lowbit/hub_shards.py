"""The weight files of a hub model, on the disk only while they are read.

One commit is asked for once: what files it has, their sizes and digests. Everything small goes to the hub's
cache, as for any model. Of a weight file the header is read over the network; the file itself comes when it
is needed, into a folder of the run, is compared with its SHA-256 and removed when others are needed. While
a run works on some files, the one that it will want next is on its way in a thread.

What lies in the hub's cache already is read there, and stays. A file that is wanted again comes again: that
is slow, never wrong.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lowbit import durable, origin, places, untrusted
from lowbit.errors import LowbitError

AT_ONCE = 8
"""Headers that are asked for at a time."""

_PATIENCE = 5.0  # seconds for a download that is not wanted any more to notice


class HubShards:
    """The weight files of one commit.

    Attributes:
        model: Its hub id, without a revision.
        folder: Where config, tokenizer and index are, in the hub's cache.
        sizes: Bytes of every weight file, by name.
        headers: By name of a file: bytes `(start, stop)` of its tensors behind the header, by key.
        cached: The files that the hub's cache has.
        digest: Of what the files hold, by their digests on the hub.
        failures: Why downloads failed that were then asked for again, in order; whoever reads it empties it.
    """

    def __init__(self, model: str, scratch: Path) -> None:
        """Ask the hub for everything but the weights.

        Args:
            model: Hub id, with or without `@revision`.
            scratch: Folder for the weight files, made here; the caller removes it.

        Raises:
            LowbitError: the hub can't be reached or refuses, or has no safetensors of that model.
        """
        from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

        self.model, revision = places.split_revision(model)
        self._scratch = scratch
        self._here: set[str] = set()
        self._ahead: _Ahead | None = None
        with origin.asking_hub(model):
            info = HfApi().model_info(self.model, revision=revision, files_metadata=True)
            self._commit = str(info.sha)
            small = [*origin.NEVER_READ, "*.safetensors"]
            self.folder = Path(snapshot_download(self.model, revision=self._commit, ignore_patterns=small))
        listed = {file.rfilename: file for file in info.siblings or []}
        names = self._names(listed)
        self.sizes = {name: int(listed[name].size or 0) for name in names}
        self._sha256 = {name: lfs.sha256 for name in names if (lfs := listed[name].lfs)}
        found = {name: self._sha256.get(name, listed[name].blob_id) for name in names}
        self.digest = {name: f"{self.sizes[name]} {found[name]}" for name in names}
        cached = {name: try_to_load_from_cache(self.model, name, revision=self._commit) for name in names}
        self.cached = {name: Path(path) for name, path in cached.items() if isinstance(path, str)}
        self.headers = self._read_headers()
        self.failures: list[str] = []

    def _names(self, listed: Iterable[str]) -> list[str]:
        """The weight files that a loader reads, by the rules of `untrusted.weight_files`."""
        if not (self.folder / "config.json").is_file():
            raise LowbitError(f"{self.model} has no config.json: give the id of a Hugging Face model")
        if (self.folder / "model.safetensors.index.json").is_file():
            files = untrusted.weight_files(self.folder)
            names = [path.relative_to(self.folder).as_posix() for path in files]
        elif "model.safetensors" in listed:
            names = ["model.safetensors"]
        else:
            names = sorted(name for name in listed if name.endswith(".safetensors") and "/" not in name)
            names = [name for name in names if not any(fnmatch(name, other) for other in origin.NEVER_READ)]
        if not names:
            raise LowbitError(f"{self.model} has no weights (*.safetensors): give a model that has some")
        absent = set(names).difference(listed)
        if absent:
            raise LowbitError(f"{self.model} lacks {min(absent)}, which its index names: give a sound model")
        return names

    def _read_headers(self) -> dict[str, dict[str, tuple[int, int]]]:
        from huggingface_hub import HfApi

        def read(name: str) -> dict[str, tuple[int, int]]:
            header = HfApi().parse_safetensors_file_metadata(self.model, name, revision=self._commit)
            return {key: (info.data_offsets[0], info.data_offsets[1]) for key, info in header.tensors.items()}

        with origin.asking_hub(self.model), ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(self.sizes, pool.map(read, self.sizes), strict=True))

    def path(self, name: str) -> Path:
        """Where a file is, or will be."""
        return self.cached.get(name, self._scratch / name)

    def has(self, names: Iterable[str]) -> bool:
        """Are all of these files here, whole and compared?"""
        return self._here.issuperset(names)

    def need(self, names: Iterable[str], following: str | None = None) -> list[str]:
        """Have these files, and no other but `following`, which is on its way when this returns.

        Returns:
            What was downloaded.

        Raises:
            ConnectionError: one can't be downloaded, or is not what the hub said; what is done can be kept.
        """
        wanted = {name for name in names if name not in self.cached}
        for name in self._here - wanted:
            self.path(name).unlink(missing_ok=True)
        self._here &= wanted
        downloaded = []
        if self._ahead and self._ahead.name not in {*wanted, following}:
            downloaded += self._stop()
        for name in sorted(wanted - self._here):
            if not self._arrived(name):
                self._download(name)
            self._here.add(name)
            downloaded.append(name)
        if following and following not in self.cached and following not in self._here and not self._ahead:
            self._ahead = _Ahead(self, following)
        return downloaded

    def _arrived(self, name: str) -> bool:
        """Is this the file that was on its way, and is it whole? If it failed, `failures` says why."""
        if self._ahead is None or self._ahead.name != name:
            return False
        ahead, self._ahead = self._ahead, None
        ahead.join()
        if ahead.failure:
            self.failures.append(ahead.failure)
        return ahead.done

    def _download(self, name: str, stop: threading.Event | None = None) -> None:
        from huggingface_hub import hf_hub_download

        path = self.path(name)
        try:
            hf_hub_download(
                self.model, name, revision=self._commit, local_dir=self._scratch, tqdm_class=_silent(stop)
            )
        except Exception as error:  # huggingface_hub, httpx and the OS each have their own "can't reach"
            if isinstance(error, OSError) and error.errno:  # a full disk
                raise
            raise ConnectionError(
                f"{self.model}: {name} could not be downloaded ({type(error).__name__}): check the network"
            ) from error
        known = self._sha256.get(name)
        if path.stat().st_size != self.sizes[name] or (known and durable.sha256(path) != known):
            path.unlink()
            raise ConnectionError(
                f"{self.model}: {name} arrived damaged (not the {self.sizes[name]} bytes that the hub "
                "lists): check the network"
            )

    def _stop(self) -> list[str]:
        """Give up what is on its way; what had come already."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return []
        ahead.stop.set()
        ahead.join(_PATIENCE)
        self.path(ahead.name).unlink(missing_ok=True)
        return [ahead.name] if ahead.done else []

    def close(self) -> None:
        """Remove what was downloaded, and end what is on its way."""
        self._stop()
        self._here = set()
        shutil.rmtree(self._scratch, ignore_errors=True)


class _Ahead(threading.Thread):
    """A download of which nobody waits for the end; where it fails, whoever needs the file asks again.

    Attributes:
        stop: Set it to end the download.
        done: Is the file here, whole and compared?
        failure: Why not; empty while nothing went wrong.
    """

    def __init__(self, shards: HubShards, name: str) -> None:
        super().__init__(name=name, daemon=True)  # a process that ends must not wait for it
        self._shards, self.stop = shards, threading.Event()
        self.done, self.failure = False, ""
        self.start()

    def run(self) -> None:
        try:
            self._shards._download(self.name, self.stop)
            self.done = True
        except Exception as error:  # a thread has nobody to raise it to: the next try raises its own
            self.failure = str(error) or type(error).__name__


def _silent(stop: threading.Event | None) -> Any:
    """A progress bar that draws nothing, and ends a download where `stop` is set."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if stop and stop.is_set():
                raise InterruptedError("not wanted any more")

    return Silent


def copy_parts(file: Path, parts: Iterable[tuple[int, int]], target: Path) -> None:
    """Copy the header of a safetensors file and some of its tensors, and leave the rest a hole.

    Every tensor stays at its place: kernels round by how memory is aligned, and a hole takes no room.

    Args:
        file: The whole file.
        parts: Bytes `(start, stop)` of tensors behind the header.
        target: File to create; its folder is made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as whole, target.open("wb") as copy:
        begin = 8 + int.from_bytes(whole.read(8), "little")
        for start, stop in [(-begin, 0), *sorted(parts)]:
            whole.seek(begin + start)
            copy.seek(begin + start)
            left = stop - start
            while left and (piece := whole.read(min(left, 2**24))):
                copy.write(piece)
                left -= len(piece)
        copy.truncate(file.stat().st_size)


def digest_of(files: dict[str, str]) -> str:
    """Digest of a commit's weight files, from what the hub says of each."""
    told = "\n".join(f"{name} {files[name]}" for name in sorted(files))
    return hashlib.sha256(told.encode()).hexdigest()
