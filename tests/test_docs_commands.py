"""Every command and every Python block of the documentation, checked without running it.

A `lowbit` line goes through the real command line with the work taken out: unknown commands,
unknown options, missing arguments and values of the wrong type fail as they would for a reader.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tomllib
import typer

from lowbit import cli
from tests.script import run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "model_cards").glob("*.md")),
]
FENCE = re.compile(r"^([ ]*)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
# Programs of others that the documents may call; everything else must be ours and is checked.
FOREIGN = {"cd", "curl", "export", "git", "hf", "llama-cli", "mkdir", "pre-commit", "source", "vllm"}


class BadCommand(Exception):
    """A documented command that would not work."""


def blocks(path: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every fenced block of `path` in one of `languages`."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[2] in languages:
            yield text[: match.start(3)].count("\n") + 1, textwrap.dedent(match[3])


def split_line(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line, without comments, redirections and `NAME=value` prefixes."""
    if "{{" in line:  # a placeholder of the model card's template
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";|&"):
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(token)


def shell_commands(path: Path) -> Iterator[tuple[int, list[str]]]:
    for start, body in blocks(path, "bash", "sh", "shell"):
        joined = re.sub(r"\\\n\s*", " ", body)
        yield from ((start, words) for line in joined.splitlines() for words in split_line(line))
    for start, body in blocks(path, "console"):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            if line.startswith("$ "):
                yield from ((start, words) for words in split_line(line[2:]))


@functools.cache
def parser() -> Any:
    """The command line of lowbit with every function taken out."""

    def disarm(command: Any) -> Any:
        command.callback = lambda **_: None
        for parameter in command.params:  # a model that the text speaks of is not here
            parameter.callback = None
        for child in getattr(command, "commands", {}).values():
            disarm(child)
        return command

    return disarm(typer.main.get_command(cli.app))


def check_lowbit(arguments: list[str]) -> None:
    try:
        parser().main(arguments, prog_name="lowbit", standalone_mode=False)
    except typer.TyperException as error:
        raise BadCommand(error.format_message()) from error


def check_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {word for word in arguments if "=" not in word and not word.startswith("-")}
    if asked - targets:
        raise BadCommand(f"no such make target: {sorted(asked - targets)}")


@functools.cache
def help_of(script: str) -> str:
    with mock.patch.dict(os.environ, COLUMNS="200", NO_COLOR="1"):
        done = run(ROOT / script, "--help", cwd=ROOT)
    if done.code:
        raise BadCommand(f"{script} --help fails: {done.stderr[-500:]}")
    return done.stdout


def check_python(arguments: list[str]) -> None:
    if not arguments or arguments[0] == "-c":
        return
    if arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            raise BadCommand(f"no module {arguments[1]}")
        return
    script = arguments[0]
    if not (ROOT / script).is_file():
        raise BadCommand(f"no script {script}")
    for word in arguments[1:]:
        option = word.partition("=")[0]
        if option.startswith("--") and not re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(script)):
            raise BadCommand(f"{script} has no option {option}")


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        asked = re.fullmatch(r"(?:lowbit|\.)\[([\w,-]+)\].*", word)
        if asked and not set(asked[1].split(",")) <= extras.keys():
            raise BadCommand(f"unknown extra in {word}: there are {sorted(extras)}")
    for flag, name in itertools.pairwise(arguments):
        if flag in ("-r", "--requirement") and not (ROOT / name).is_file():
            raise BadCommand(f"no file {name}")


def check(words: list[str]) -> None:
    """Raise `BadCommand` if the command cannot work in a checkout."""
    program, *arguments = words
    name = program.rpartition("/")[2]
    checks = {"lowbit": check_lowbit, "make": check_make, "pip": check_pip}
    if name in checks:
        checks[name](arguments)
    elif re.fullmatch(r"python3?(\.\d+)?", name):
        check_python(arguments)
    elif name == "bash" and arguments:
        check([f"./{arguments[0]}"])
    elif name == "torchrun":
        module = arguments.index("-m")
        check_python(arguments[module : module + 2])
        check(arguments[module + 1 :])
    elif name in FOREIGN:
        return
    elif "/" not in program:
        raise BadCommand(f"{program}: not ours and not in FOREIGN")
    elif not (ROOT / program).is_file():
        raise BadCommand(f"no file {program}")


SHELL = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}:{line}: {' '.join(words)}")
    for path in DOCUMENTS
    if path.exists()
    for line, words in shell_commands(path)
]
PYTHON = [
    pytest.param(body, id=f"{path.relative_to(ROOT)}:{line}")
    for path in DOCUMENTS
    if path.exists()
    for line, body in blocks(path, "python", "py")
]


def test_the_documents_are_there() -> None:
    assert [path.name for path in DOCUMENTS if not path.is_file()] == []
    assert any(parameter.values[0][0] == "lowbit" for parameter in SHELL)


@pytest.mark.parametrize("words", SHELL)
def test_shell_commands_work(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_of_the_help_work(command: str) -> None:
    for example in cli.COMMANDS[command].EXAMPLES:
        check(shlex.split(example))


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_use_what_exists(code: str) -> None:
    """They compile, and every public name of lowbit that they use is there."""
    tree = ast.parse(code)
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "lowbit"
        for alias in node.names
    } | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lowbit"
    }
    import lowbit

    assert [name for name in sorted(names) if not hasattr(lowbit, name)] == []


def test_scripts_of_the_makefile_exist() -> None:
    scripts = set(re.findall(r"scripts/\w+\.py", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert sorted(script for script in scripts if not (ROOT / script).is_file()) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("lowbit quantise model", "quantise"),
        ("lowbit quantize model --no-such-option", "--no-such-option"),
        ("lowbit quantize", "Missing"),
        ("lowbit quantize model --output out --bits four", "--bits"),
        ("make no-such-target", "no-such-target"),
        ("make test && X=1 make no-such-target  # comment", "no-such-target"),
        ("python scripts/no_such_script.py", "no script"),
        ("python -m lowbit.no_such_module", "no module"),
        ("pip install 'lowbit[no-such-extra]'", "unknown extra"),
        ("pip install -r no-such.lock", "no file"),
        (".ci/no-such-file", "no file"),
        ("lowbitt quantize model", "not ours"),
    ],
)
def test_a_wrong_command_is_caught(line: str, complaint: str) -> None:
    commands = list(split_line(line))
    with pytest.raises(BadCommand, match=complaint):
        list(map(check, commands))


def test_blocks_and_lines_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "1. text\n\n   ```bash\n   # comment\n   X=1 make test && lowbit a \\\n     --b 'c d' | tee log\n"
        "   ```\n"
        "```console\n$ make lint\nits output\n```\n```python\nprint(1)\n```\n```\nnot shell\n```\n"
    )
    assert [words for _, words in shell_commands(page)] == [
        ["make", "test"],
        ["lowbit", "a", "--b", "c d"],
        ["tee", "log"],
        ["make", "lint"],
    ]
    assert list(blocks(page, "python")) == [(13, "print(1)\n")]
