"""The command line: the list of commands, errors and exit codes.

Every refusal is one line on stderr and exit code 2; a failed verification is exit code 1; Ctrl-C is
130. Heavy imports wait until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer

from lowbit import __version__
from lowbit.commands import bench, evaluate, generate, inspect, quantize
from lowbit.errors import LowbitError

COMMANDS = {
    "quantize": quantize,
    "eval": evaluate,
    "inspect": inspect,
    "generate": generate,
    "bench": bench,
}
"""Every command: its name, and the module with its `run` and its `EXAMPLES`."""

INTERRUPTED = 130

app = typer.Typer(
    name="lowbit",
    help="Quantize the weights of language models to a few bits, in formats that load everywhere.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in COMMANDS.items():
    app.command(_name, epilog="\n\n".join(["[bold]Examples[/]", *_module.EXAMPLES]))(_module.run)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


def _terminate(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)  # an exception, so that scratch folders are removed


def main() -> None:
    """Entry point of the `lowbit` command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted: nothing was left behind", INTERRUPTED)
    except LowbitError as error:
        _fail(str(error), 2)
    except OSError as error:  # a full disk, a folder that may not be read
        _fail(str(error), 2)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # a usage error of click's
            _fail(error.format_message(), error.exit_code)
        if type(error).__name__ == "VerificationError":
            _fail(str(error), 1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    if message:  # empty where click has shown the help instead
        print(f"lowbit: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
