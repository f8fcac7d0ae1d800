"""Exceptions: one that is the user's to mend, one that never is, and the end of a run that was stopped.

Every refusal of lowbit is a `LowbitError` with a single line that names the offending value and
the fix. The command line prints that line and exits with code 2; a library caller catches it as a
`ValueError`. A `VerificationError` says that a result is not what it should be, and exits with code 1.
Anything else that escapes is a bug of ours.
"""


class LowbitError(ValueError):
    """A problem that the user can mend; the message is one line with the value and the fix."""


class VerificationError(RuntimeError):
    """What was written is not what was computed: a bug of lowbit or of a loader, never the user's."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Stopped(Exception):
    """A run was stopped, and the same command goes on from there; the message is one line.

    Attributes:
        code: Exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
