"""The command line: the list of commands, errors and exit codes.

Every refusal is one line on stderr and exit code 2; a failed verification is exit code 1; Ctrl-C is
130. Where the same command goes on later, the line says so. Heavy imports wait until a command runs, so
`--help` answers at once.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, NoReturn

import typer

from lowbit import __version__, interruption
from lowbit.commands import (
    bench,
    compare,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    plan,
    push,
    quantize,
    tune,
)
from lowbit.errors import INTERRUPTED, LowbitError, Stopped, VerificationError

COMMANDS = {
    "quantize": quantize,
    "plan": plan,
    "convert": convert,
    "eval": evaluate,
    "compare": compare,
    "inspect": inspect,
    "generate": generate,
    "bench": bench,
    "tune": tune,
    "doctor": doctor,
    "push": push,
}
"""Every command: its name, and the module with its `run` and its `EXAMPLES`."""

SMALLER = {
    "quantize": ("--max-memory",),
    "eval": ("a smaller --seq-len",),
    "compare": ("a smaller --seq-len", "fewer --windows"),
}
"""What takes less of a GPU's memory, by command; of the rest only `--device` does."""

OVERVIEW = {
    "make a model small": ("lowbit quantize Qwen/Qwen3-8B --output qwen3-8b-w4",),
    "see what it cost": ("lowbit eval qwen3-8b-w4 --reference Qwen/Qwen3-8B",),
    "see what is in it": ("lowbit inspect qwen3-8b-w4",),
    "use it": (
        "lowbit generate qwen3-8b-w4 --prompt 'Why is the sky blue?'",
        "vllm serve qwen3-8b-w4",
    ),
    "see how fast it is": ("lowbit bench qwen3-8b-w4 --reference Qwen/Qwen3-8B",),
}
"""The five things one does with lowbit, shown where it is called without a command."""

app = typer.Typer(
    name="lowbit",
    help="Quantize the weights of language models to a few bits, in formats that load everywhere.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in COMMANDS.items():
    app.command(_name, epilog="\n\n".join(["[bold]Examples[/]", *_module.EXAMPLES]))(_module.run)


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(_overview())


def _overview() -> str:
    lines = [f"lowbit {__version__}: language models in a few bits, in formats that load everywhere", ""]
    for what, examples in OVERVIEW.items():
        for title, example in zip([what, *[""] * len(examples)], examples, strict=False):
            lines.append(f"  {title:<20}{example}")
    lines += ["", "lowbit --help lists the commands, lowbit COMMAND --help shows options and examples,"]
    return "\n".join([*lines, "lowbit doctor what works on this machine."])


def main() -> None:
    """Entry point of the `lowbit` command: `run`, and out at once where a signal ended it."""
    try:
        run()
    except SystemExit as end:
        interruption.leave(end.code)
        raise


def run() -> None:
    """What the arguments of this process ask for; raises SystemExit with the code of `errors.py`."""
    interruption.listen()
    try:
        code = app(prog_name="lowbit", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except Stopped as stopped:
        _fail(str(stopped), stopped.code)
    except Exception as error:
        _failed(error)
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: Exception) -> None:
    """One line and an exit code for what the user can mend; the traceback of anything else."""
    signalled = interruption.received()
    if isinstance(signalled, KeyboardInterrupt):
        _interrupted()
    if signalled is not None:
        raise signalled from None
    torch: Any = sys.modules.get("torch")  # where it is not loaded, no GPU can be full
    if torch and isinstance(error, torch.OutOfMemoryError):
        _fail(_out_of_memory(error), 2)
    if isinstance(error, LowbitError | OSError):  # OSError: a full disk, a folder that may not be read
        _fail(str(error), 2)
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # a usage error of click's
        _fail(_usage(error), error.exit_code)
    if isinstance(error, VerificationError):
        _fail(str(error), 1)
    raise error


def _out_of_memory(error: Exception) -> str:
    """How much more was wanted of a GPU, and what the command that was called can do about it."""
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    ways = [*SMALLER.get(command, ()), "--device cpu"]
    more = f" ({wanted[1]} more was needed)" if wanted else ""
    again = ", with --restart" if hasattr(error, "kept") else ""  # what was begun has other settings
    return f"the GPU's memory is full{more}: try {' or '.join(ways)}{again}"


def _interrupted() -> NoReturn:
    _fail("interrupted: nothing was left behind", INTERRUPTED)


def _usage(error: Any) -> str:
    """What click says of a wrong command line, with the command whose `--help` says what is right."""
    message = error.format_message().rstrip(".")
    return f"{message} (see {error.ctx.command_path} --help)" if message and error.ctx else message


def _fail(message: str, code: int) -> NoReturn:
    if message:  # empty where click has shown the help instead
        print(f"lowbit: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
