"""A checkpoint folder to the Hub: what would go, what must not, and the upload.

Refused are folders that are not a finished quantized checkpoint. The upload is huggingface_hub's own: it
sends large files in parts, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lowbit import beside, card, record
from lowbit.errors import LowbitError

NEVER = (".*", "*/.*", "*.tmp", "*__pycache__/*")  # patterns of fnmatch, as huggingface_hub reads them
WEIGHTS = (".safetensors",)
CLIENTS = ("httpx", "httpx2", "requests")
"""What huggingface_hub's versions speak HTTP with; their errors are no `OSError`."""


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub.

    Attributes:
        repo_id: `org/name`.
        files: Path in the repository and size in bytes.
        url: Where it is; None if nothing was sent.
    """

    repo_id: str
    files: list[tuple[str, int]]
    url: str | None = None

    @property
    def bytes(self) -> int:
        """Size of everything."""
        return sum(size for _, size in self.files)


def push(folder: Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload a checkpoint; a card that was not edited gets the name of the repository once that is there.

    Args:
        folder: A finished checkpoint.
        repo_id: `org/name` on the Hub; made if it is not there.
        private: Make it a private repository (one that exists stays as it is).
        dry_run: Only find out what would go.

    Raises:
        LowbitError: not a finished checkpoint, no such name, not logged in, the Hub can't be reached, or the
            card can't be written.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise LowbitError(f"{repo_id!r} is no name of a repository: write it like org/name") from None
    _check(folder)
    if dry_run:
        return Upload(repo_id, files_of(folder))
    api = HfApi()
    record.load(folder)  # one that can't be read is refused before anything is made
    with _asking_hub(repo_id):
        created = api.create_repo(repo_id, private=private or None, exist_ok=True)
    _rename_card(folder, created.repo_id)
    files = files_of(folder)
    with _asking_hub(repo_id):
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            ignore_patterns=list(NEVER),
            commit_message="Upload a checkpoint quantized with lowbit",
        )
    return Upload(created.repo_id, files, str(created))


@contextmanager
def _asking_hub(repo_id: str) -> Iterator[None]:
    """Whatever keeps the Hub from taking a checkpoint becomes a `LowbitError` that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise LowbitError("not logged in to the Hub: run `hf auth login` first") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise LowbitError(
                f"the Hub refuses {repo_id} ({status}): `hf auth login` with write access"
            ) from None
        raise LowbitError(f"the Hub refuses {repo_id}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:
        of_client = any(kind.__module__.partition(".")[0] in CLIENTS for kind in type(error).__mro__)
        if not (of_client or isinstance(error, OSError)):
            raise
        raise LowbitError(
            f"the Hub can't be reached ({type(error).__name__}): the same command goes on"
        ) from error


def files_of(folder: Path) -> list[tuple[str, int]]:
    """The files that would go, largest first: all but hidden ones."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [name for name in names if not any(fnmatch(name, pattern) for pattern in NEVER)]
    return sorted(((name, (folder / name).stat().st_size) for name in kept), key=lambda item: -item[1])


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise LowbitError(f"{folder} is not a folder: give the folder of a checkpoint")
    if (folder / "state.json").is_file() or folder.resolve().name.endswith(".lowbit-work"):
        raise LowbitError(
            f"{folder} is the work folder of an unfinished run: run the same `lowbit quantize` again"
        )
    if not (folder / "config.json").is_file():
        raise LowbitError(f"{folder} has no config.json: give the folder of a checkpoint")
    if not beside.is_quantized(folder):
        raise LowbitError(
            f"{folder} is not quantized (no quantization_config): push the output of lowbit quantize"
        )
    if not any(path.suffix in WEIGHTS for path in folder.iterdir()):
        raise LowbitError(f"{folder} has no weights (*.safetensors): run the same `lowbit quantize` again")
    if any(folder.glob("part-*.safetensors")):
        raise LowbitError(
            f"{folder} holds unfinished shards (part-*.safetensors): run `lowbit quantize` again"
        )


def _rename_card(folder: Path, repo_id: str) -> None:
    """The commands on the card name the repository, so that they can be copied from its page."""
    kept = record.load(folder)
    if kept is not None and kept.get("repo_id") != repo_id and kept["quantization"]:
        kept["repo_id"] = repo_id
        try:
            beside.own(folder)
            if card.write(kept, folder) is None:
                record.save(kept, folder)
                beside.renew_sums(folder)
        except OSError as error:
            raise LowbitError(
                f"{folder} can't be written ({error.strerror}), and its card needs the repository's name: "
                "copy it to where it can"
            ) from None
