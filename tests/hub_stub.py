"""A hub on this machine: one repository from a folder, by the few addresses that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import torch
from safetensors.torch import save_file

from tests.tiny import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
MODEL = "someone/tiny"


def shard(number: int) -> str:
    """Name of a file of the model `blocks`."""
    return f"model-0000{number}-of-00006.safetensors"


def make_hub_model(kind: str, folder: Path) -> Path:
    """A model by kind: `blocks` end inside of files, `single` has one file, `extra` a layer too many."""
    if kind == "single":
        return make_model("qwen2", folder, tied=True)
    make_model("llama", folder, max_shard_size="60KB", tied=False)
    if kind == "extra":
        _add_layer(folder)
    return folder


def _add_layer(folder: Path) -> None:
    """A file of tensors that the architecture does not use."""
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    types = (torch.bfloat16, torch.float32)  # safetensors writes the second one first
    added = {f"model.layers.9.part.{n}.weight": torch.randn(64, 64).to(types[n]) for n in range(2)}
    save_file(added, folder / "model-extra.safetensors", {"format": "pt"})
    told["weight_map"] |= dict.fromkeys(added, "model-extra.safetensors")
    index.write_text(json.dumps(told))


class Hub:
    """What it serves, and what was asked of it.

    Attributes:
        folder: The newest commit's files.
        older: Folder of the files of `OLD_COMMIT`, which is also the tag `v1` and the branch `refs/pr/1`.
        url: For `HF_ENDPOINT`.
        whole: Names of the files of which all bytes were sent, in order.
        answer: Called with a name before all its bytes are sent; its result is sent in their place, an int
            as a status.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.older: Path | None = None
        self.whole: list[str] = []
        self.answer: Callable[[str, bytes], bytes | int] = lambda _, content: content

    def at(self, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision; None where there is none."""
        if revision in ("main", COMMIT):
            return COMMIT, self.folder
        if self.older and revision in ("v1", "refs/pr/1", OLD_COMMIT):
            return OLD_COMMIT, self.older
        return None

    def entry(self, path: Path, folder: Path) -> dict[str, Any]:
        content = path.read_bytes()
        name, size = path.relative_to(folder).as_posix(), len(content)
        entry = {"size": size, "blobId": hashlib.sha1(content).hexdigest()}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        return {**entry, "rfilename": name}

    def listed(self, folder: Path) -> list[dict[str, Any]]:
        return [self.entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = re.fullmatch(
            rf"/(api/models/)?{MODEL}(?:/(tree|revision|resolve)/([^/]+))?(?:/(.+))?",
            self.path.partition("?")[0],
        )
        if asked is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        at = self.hub.at(unquote(asked[3] or "main"))
        if at is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if asked[1]:
            return self._told(*at, tree=asked[2] == "tree")
        file = at[1] / unquote(asked[4] or "")
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        self._file(*at, file)
        return None

    def _told(self, commit: str, folder: Path, tree: bool) -> None:
        """What a commit holds, as the one and the other address of the API tell it."""
        listed = self.hub.listed(folder)
        if not tree:
            info = {"id": MODEL, "modelId": MODEL, "sha": commit, "siblings": listed, "tags": []}
            return self._send(200, json.dumps(info).encode())
        entries = []
        for e in listed:
            entries.append({"type": "file", "path": e["rfilename"], "size": e["size"], "oid": e["blobId"]})
            if "lfs" in e:
                entries[-1]["lfs"] = {**e["lfs"], "oid": e["lfs"]["sha256"]}
        return self._send(200, json.dumps(entries).encode())

    def _file(self, commit: str, folder: Path, file: Path) -> None:
        content, entry = file.read_bytes(), self.hub.entry(file, folder)
        headers = {
            "ETag": f'"{entry.get("lfs", {}).get("sha256", entry["blobId"])}"',
            "X-Repo-Commit": commit,
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD":
            return self._send(200, content, headers)
        if span:
            start, stop = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
            told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            return self._send(206, content[start:stop], headers | told)
        answer = self.hub.answer(entry["rfilename"], content)
        if isinstance(answer, int):
            return self._send(answer, b"", headers)
        self.hub.whole.append(entry["rfilename"])
        self._send(200, answer, headers)
        return None


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """The hub, until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = handler.hub = Hub(folder, f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
