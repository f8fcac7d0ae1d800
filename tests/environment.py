"""Virtual environments without lowbit: built once, kept, and asked in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

LOCK = Path(__file__).parents[1] / "requirements-dev.lock"
INSTALL = ("-m", "pip", "install", "-qq", "--no-compile")  # of Python; what is imported is compiled then
STOCK = ("torch", "transformers", "compressed-tensors", "accelerate", "gguf")  # the last two for GGUF


def build(
    variable: str, installs: list[list[str]], requirements: Path, factory: pytest.TempPathFactory
) -> Path:
    """The interpreter of an environment, built where it is missing or was made of something else.

    Args:
        variable: Name of the environment variable with its folder; where that is not set, the environment
            is temporary.
        installs: Arguments of `pip install`, one list for every call.
        requirements: The file with its versions, which calls for a new one when it changes.
        factory: Gives the temporary folder, the same to all workers.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers
    home = Path(os.environ.get(variable) or shared / variable.lower())
    home.mkdir(parents=True, exist_ok=True)
    python, made_for = home / "venv" / "bin" / "python", home / "made-for.txt"
    wanted = f"{installs}\n{sys.version}\n{requirements.read_text(encoding='utf-8')}"
    with FileLock(home / "lock"):
        if not made_for.exists() or made_for.read_text(encoding="utf-8") != wanted:
            made_for.unlink(missing_ok=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home / "venv")], check=True)
            for arguments in installs:
                subprocess.run([str(python), *INSTALL, *arguments], check=True)
            made_for.write_text(wanted, encoding="utf-8")
    return python


def stock(factory: pytest.TempPathFactory) -> Path:
    """transformers and what it reads our checkpoints with, at the versions of requirements-dev.lock."""
    return build("LOWBIT_STOCK_VENV", [["--constraint", str(LOCK), *STOCK]], LOCK, factory)


def start(python: Path, client: Path, cwd: Path) -> subprocess.Popen[str]:
    """Run `client` isolated: away from the checkout, with none of this process's variables."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.Popen(
        [str(python), "-I", str(client)],
        cwd=cwd,
        env={**keep, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
