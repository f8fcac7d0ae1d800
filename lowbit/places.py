"""Where a model comes from and where it goes, as far as names tell: asked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import LowbitError

CHAT_TEMPLATES = "additional_chat_templates"
"""The one subfolder of a checkpoint: transformers keeps the named chat templates there."""

FOLDERS = frozenset({CHAT_TEMPLATES, ".cache"})  # the latter is of a download
SUFFIXES = frozenset(
    {".safetensors", ".json", ".jinja", ".txt", ".model", ".py", ".md", ".html", ".tiktoken", ""}
)
"""What a folder may hold that is removed for a new checkpoint: nothing that somebody else put there."""


def split_revision(model: str) -> tuple[str, str | None]:
    """Hub id and revision of `org/name@revision`; what names no revision stays as it is.

    An `@` in a path is part of a name: a path is what exists here, is written like one, or ends in `.gguf`.

    >>> split_revision("org/name@v1"), split_revision("org/name"), split_revision("./name@v1")
    (('org/name', 'v1'), ('org/name', None), ('./name@v1', None))
    """
    hub_id, at, revision = model.partition("@")
    if not at or _like_a_path(hub_id) or model.endswith(".gguf") or Path(model).expanduser().exists():
        return model, None
    return hub_id, revision


def check_source(model: str, known: str = "a folder, a .gguf file or a hub id (org/name)") -> None:
    """Refuse what is written like a path and is none; whether a hub has it is asked later.

    Args:
        model: Path or hub id, which may name a revision.
        known: What the caller takes, for the message.

    Raises:
        LowbitError: there is no such file or folder, a revision is asked of one, or one half of a hub id and
            its revision is missing.
    """
    hub_id, revision = split_revision(model)
    if _like_a_path(hub_id) and not Path(hub_id).expanduser().exists():
        raise LowbitError(f"{model} does not exist: give {known}")
    if revision is None:
        return
    if not hub_id or not revision:
        raise LowbitError(f"{model} is half a name: give org/name@revision, with a branch, tag or commit")
    if Path(hub_id).exists():  # transformers would read it, whatever the revision
        raise LowbitError(f"{hub_id} is a local file or folder, without revisions: leave out @{revision}")


def no_revision(model: str) -> LowbitError:
    """What to raise where the hub has a model, and not the revision that is asked for."""
    hub_id, revision = split_revision(model)
    return LowbitError(f"{hub_id} has no revision {revision or 'main'}: give a branch, tag or commit of it")


def _like_a_path(name: str) -> bool:
    return name.count("/") > 1 or name.startswith((".", "/", "~"))


def check_target(output: Path, source: str, overwrite: bool, as_file: bool = False) -> None:
    """Refuse an output, a folder or with `as_file` a file, that would overwrite something.

    Raises:
        LowbitError: `output` exists and is not empty (or holds more than a checkpoint), or holds the source.
    """
    origin = Path(source).expanduser().resolve()
    if source and origin.exists() and (origin == output or output in origin.parents):
        holds = "is" if origin == output else f"holds {source},"
        raise LowbitError(f"{output} {holds} the model itself: choose another folder")
    if as_file:
        if output.is_dir():
            raise LowbitError(f"{output} is a folder: choose the name of a file")
        if output.exists() and not overwrite:
            raise LowbitError(f"{output} exists: choose another or add --overwrite")
        return
    if output.suffix == ".gguf":
        raise LowbitError(
            f"{output} is named like a file: choose a folder, and lowbit convert makes a file of it"
        )
    if output.is_file():
        raise LowbitError(f"{output} is a file: choose a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise LowbitError(f"{output} exists and is not empty: choose another or add --overwrite")
        if not (output / "config.json").is_file() or not any(output.glob("*.safetensors")):
            raise LowbitError(f"{output} holds something else than a model: choose another folder")
        for path in sorted(output.iterdir()):
            if path.name not in FOLDERS if path.is_dir() else path.suffix not in SUFFIXES:
                raise LowbitError(f"{path} is no part of a model: move it away or choose another folder")
