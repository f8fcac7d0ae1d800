"""Ctrl-C and SIGTERM end a run as exceptions, so that scratch folders are removed and finished blocks kept.

An exception that a signal raises inside compiled code may not come out of it: a destructor drops it, and a
library that asks "is this a tensor?" turns it into an error of its own, of a sound file for example. So a
signal is remembered as well. `received` tells whoever handles an error that a signal was behind it, and
`check`, called now and then, raises once more what got lost.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from typing import Any

_received: list[int] = []


def listen() -> None:
    """Take over both signals; SIGINT stays ignored where the shell ignores it (a job in the background)."""
    _received.clear()
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)
    sys.unraisablehook = _deliver_again


def received() -> BaseException | None:
    """The exception that stands for the signal that came, if one did."""
    if not _received:
        return None
    number = _received[0]
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def check() -> None:
    """Raise what a signal stands for, if one came and what it raised was dropped on the way."""
    lost = received()
    if lost is not None:
        raise lost


def leave(code: Any) -> None:
    """End the process with `code` if a signal came; everything of ours is cleaned up and said by then.

    Python would first wait for every thread. A pool whose thread was being started when the signal came (as
    the one that reads weights in transformers) has a thread that nobody ever tells to end.
    """
    if _received:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _raise(signum: int, frame: Any) -> None:
    _received.append(signum)
    check()


def _deliver_again(lost: Any) -> None:
    """Repeat a signal that came inside a destructor or a callback, where Python drops exceptions."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
    else:
        threading.Timer(0.05, _thread.interrupt_main, [number]).start()
