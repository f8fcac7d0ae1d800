"""C sources of this package, compiled by the system's compiler and kept.

Once, in a second, into the user's cache (`$XDG_CACHE_HOME/lowbit`), under a name that is a hash of source
and flags, so that machines that share a home don't share what only one of them can run. Nothing needs
them: whoever asks has another way, and the reason at hand.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowbit.errors import LowbitError

_FLAGS = ("-O3", "-shared", "-fPIC", "-fopenmp")


def processor() -> set[str]:
    """Flags of the processor, as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def library(source: Path, features: Sequence[str]) -> ctypes.CDLL:
    """The library of a C file, compiled for a processor with `features` if that was not done before.

    Raises:
        LowbitError: there is no such file, no compiler that works, or nowhere to keep what it makes.
    """
    if not source.is_file():
        raise LowbitError(f"{source} is missing: install lowbit again")
    path = _compile(source, [*_FLAGS, *(f"-m{name.replace('_', '')}" for name in features)])
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LowbitError(f"{path} can't be loaded ({error}): delete it") from error


def _compile(source: Path, flags: Sequence[str]) -> Path:
    try:
        content = source.read_bytes() + " ".join(flags).encode()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
        path = cache / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / path.name
                _run(source, flags, made)
                made.replace(path)  # in one step: another process may be doing the same
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        raise LowbitError(f"{source.name} can't be compiled ({error}): set XDG_CACHE_HOME") from error
    return path


def _run(source: Path, flags: Sequence[str], made: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise LowbitError("kernels in C need a C compiler and there is none: install gcc, or set CC")
    command = [compiler, *flags, str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LowbitError(f"{compiler} can't compile {source.name} ({said}): set CC to gcc >= 9")
