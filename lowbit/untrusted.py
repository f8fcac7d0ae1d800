"""Files from strangers: what is looked at before a library reads them.

A checkpoint is data. It may not make this process run code, read or copy files outside of its folder, or
take time and memory that have nothing to do with its size:

- weights are safetensors or GGUF; pickled ones are refused, also where a library would unpickle with care;
- code that a repository brings along is never run (`trust_remote_code=False` everywhere);
- a name in an index stays in the folder, and so does a link (the hub's cache links into its own store);
- JSON is read up to a size, and numbers in a configuration are compared with what the files hold.

What a file says wrongly beyond that is found out by the readers, and is their refusal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

CONFIG_BYTES = 2**24
INDEX_BYTES = 2**28
LARGEST = 2**40  # no configuration has a larger integer
FEW_LAYERS = 1024  # built in no time, and Qwen2's max_window_layers is 28 in a model of one
OWN = "lowbit"  # what lowbit says there of its own run: nothing is built from it
NEVER_TRUSTED: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained` and `from_config` of transformers."""

_LAYERS = re.compile(r"(^|_)(n_)?layers?$|^depth$|_blocks$")
_COUNTS = re.compile(r"experts|layer|codebooks|position|heads?$|groups?$")


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Any stumbling of a library over a bad file becomes a `LowbitError`; each has its own way to stumble."""
    try:
        yield
    except (LowbitError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LowbitError(f"{what} can't be read ({reason}): get a sound copy") from error


def read_json(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes.

    Raises:
        LowbitError: it is larger, no JSON, or no object.
    """
    try:
        if path.stat().st_size > limit:
            raise LowbitError(f"{path} has more than {limit} bytes: this is no {path.name} of a model")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, LowbitError):
            raise
        raise LowbitError(f"{path} can't be used ({type(error).__name__}): download it again") from None
    if not isinstance(found, dict):
        raise LowbitError(f"{path} can't be used (no JSON object): download it again")
    return found


def inside(folder: Path, name: object) -> Path:
    """The file of that name in a folder.

    Raises:
        LowbitError: it lies, or its link leads, outside of the folder; or it is no plain file.
    """
    plain = isinstance(name, str) and name and "\0" not in name
    if not plain or Path(str(name)).is_absolute() or ".." in re.split(r"[/\\]", str(name)):
        raise LowbitError(f"{folder} names a file outside of itself ({str(name)[:80]!r}): don't trust it")
    path = folder / str(name)
    try:
        leads_out = not path.resolve().is_relative_to(_root(folder))
        other = path.exists() and not path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, one that can't be encoded, a loop of links
        raise LowbitError(
            f"{folder} names a file that can't be ({str(name)[:80]!r}): don't trust it"
        ) from None
    if leads_out:
        raise LowbitError(f"{path} is a link out of its folder: copy the file to where the link is")
    if other:
        raise LowbitError(f"{path} is no file: download it again")
    return path


def _root(folder: Path) -> Path:
    """Where links may lead: the folder, or what the hub's cache keeps of one repository."""
    resolved = folder.resolve()
    for parent in resolved.parents:
        if parent.name.startswith(("models--", "datasets--")) and "snapshots" in resolved.parts:
            return parent
    return resolved


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: what its index names, or those that are there.

    Raises:
        LowbitError: the index is none, or names a file outside of the folder.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index, INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LowbitError(f"{index} is no index of weight files: download it again")
        names: set[Any] = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
        return sorted(inside(folder, name) for name in names)
    if single.is_file():
        return [inside(folder, single.name)]
    return sorted(inside(folder, path.name) for path in folder.glob("*.safetensors"))


def check_config(folder: Path, tensors: int | None = None) -> dict[str, Any]:
    """The configuration of a model, if its numbers can be meant.

    Args:
        folder: Where `config.json` is.
        tensors: How many tensors the files hold, where that is known.

    Raises:
        LowbitError: it can't be read, or a number is out of all proportion.
    """
    path = inside(folder, "config.json")
    config = read_json(path)
    for name, value in _integers({key: value for key, value in config.items() if key != OWN}):
        limit = LARGEST
        if tensors is not None and _LAYERS.search(name):
            limit = max(tensors, FEW_LAYERS)
        elif _COUNTS.search(name):
            limit = 2**24
        if abs(value) > max(limit, 1):
            raise LowbitError(f"{path}: {name}={str(value)[:20]} does not fit the files: download them again")
    return config


def _integers(node: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a configuration and the key it stands under."""
    ahead = [(name, node)]
    while ahead:
        name, node = ahead.pop()
        if isinstance(node, dict):
            ahead += node.items()
        elif isinstance(node, list):
            ahead += [(name, item) for item in node]
        elif isinstance(node, int) and not isinstance(node, bool):
            yield name, node
