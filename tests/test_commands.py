"""What every command owes its user: `--json`, errors that look alike, completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import typer

from lowbit import cli
from tests.test_docs_commands import check, split_line

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGTERM, handler)


def parameters(command: str) -> list[Any]:
    whole: Any = typer.main.get_command(cli.app)
    return list(whole.commands[command].params)


def nonsense(command: str, folder: Path) -> list[str]:
    """Arguments that the parser takes, about things that do not exist."""
    words = []
    for parameter in parameters(command):
        if not parameter.required:
            continue
        kind = parameter.type_descriptor.annotation
        is_choice = isinstance(kind, type) and issubclass(kind, Enum)
        value = next(iter(kind)).value if is_choice else str(folder / f"no-{parameter.name}")
        words += [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
    return words


def test_without_arguments_it_shows_the_five_things(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert len(cli.OVERVIEW) == 5
    assert len(out.splitlines()) <= 20
    for what, examples in cli.OVERVIEW.items():
        assert what in out
        for example in examples:
            assert example in out
            for words in split_line(example):
                check(words)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_json(command: str) -> None:
    assert any("--json" in parameter.opts for parameter in parameters(command))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_says_what_it_is(command: str) -> None:
    assert [parameter.name for parameter in parameters(command) if not parameter.help] == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_unknown_option_is_one_line(run: Run, command: str) -> None:
    code, out, err = run(command, "--no-such-option")
    assert (code, out) == (2, "")
    assert err == f"lowbit: No such option: --no-such-option (see lowbit {command} --help)\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_is_not_there_is_one_line(run: Run, command: str, tmp_path: Path) -> None:
    arguments = nonsense(command, tmp_path)
    if not arguments:
        pytest.skip("it needs nothing")
    code, out, err = run(command, *arguments, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("lowbit: ")
    assert err.count("\n") == 1, err
    assert ": " in err.removeprefix("lowbit: "), "it says what to do"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if parameters(name)[0].name == "model"])
def test_a_gguf_file_is_taken_where_the_help_says_so(run: Run, command: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    rest = nonsense(command, tmp_path)[1:]
    code, out, err = run(command, file, *rest)
    assert (code, out) == (2, "")
    if ".gguf" in parameters(command)[0].help:
        assert "is a file" not in err  # but one that begins like a GGUF file and ends there
    else:
        what = f"{file} is a file: give a folder or a hub id (org/name); lowbit compare reads .gguf files"
        assert err == f"lowbit: {what}\n"


def test_a_misspelt_command(run: Run) -> None:
    code, out, err = run("quantise")
    assert (code, out) == (2, "")
    assert err == "lowbit: No such command 'quantise'. Did you mean 'quantize'? (see lowbit --help)\n"


def test_bash_completes_commands_and_choices(tmp_path: Path) -> None:
    """The script that `--install-completion` installs, in a real bash that asks the real command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lowbit = tmp_path / "lowbit"
    lowbit.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lowbit "$@"\n')
    lowbit.chmod(0o755)
    script = f"""
    eval "$({lowbit} --show-completion bash)"
    for words in "lowbit ''" "lowbit quantize --method ''" "lowbit ins"; do
        eval "COMP_WORDS=($words)"; COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _lowbit_completion "{lowbit}"
        echo "${{COMPREPLY[@]}}"
    done
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    commands, methods, beginning = done.stdout.splitlines()
    assert commands.split() == list(cli.COMMANDS)
    assert {"rtn", "gptq", "awq"} <= set(methods.split())
    assert beginning == "inspect"
