"""Where a model comes from and where it goes, as far as names tell: asked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import LowbitError


def check_source(model: str) -> None:
    """Refuse what is written like a path and is none; whether a hub has it is asked later.

    Raises:
        LowbitError: there is no such file or folder.
    """
    like_a_path = model.count("/") > 1 or model.startswith((".", "/", "~"))
    if like_a_path and not Path(model).expanduser().exists():
        raise LowbitError(f"{model} does not exist: give a folder, a .gguf file or a hub id (org/name)")


def check_target(output: Path, source: str, overwrite: bool, as_file: bool = False) -> None:
    """Refuse an output, a folder or with `as_file` a file, that would overwrite something.

    Raises:
        LowbitError: `output` exists and is not empty (or is not a checkpoint), or holds the source.
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
    if output.is_file():
        raise LowbitError(f"{output} is a file: choose a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise LowbitError(f"{output} exists and is not empty: choose another or add --overwrite")
        if not (output / "config.json").is_file():
            raise LowbitError(f"{output} holds something else than a model: choose another folder")
