"""Other libraries' progress bars and warnings, out of the way: lowbit shows one bar and one summary."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

from transformers import logging


@contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """Silence transformers; `stderr` also drops what others draw there (compressed-tensors' four bars)."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()) if stderr else nullcontext():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
