"""Scripts and examples, run in a test's own process: importing what they need takes longer than most."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock


class Done(NamedTuple):
    """How a script ended, and what it said."""

    code: int
    stdout: str
    stderr: str


def run(script: Path, *arguments: object, cwd: Path | None = None) -> Done:
    """`python SCRIPT ARGUMENTS` in `cwd`. What it imports from its own folder is forgotten again."""
    out, errors, code, known = StringIO(), StringIO(), 0, set(sys.modules)
    with (
        mock.patch.object(sys, "argv", [str(script), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.dict(os.environ),
        chdir(cwd or Path.cwd()),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            errors.write(end.code if isinstance(end.code, str) else "")
        except Exception:
            code = 1
            traceback.print_exc()
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == script.parent:
            del sys.modules[name]
    return Done(code, out.getvalue(), errors.getvalue())
