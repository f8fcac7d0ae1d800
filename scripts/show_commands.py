"""Write docs/COMMANDS.md: what every command prints, from real runs.

    python scripts/show_commands.py --lowbit fresh/bin/lowbit --model smollm2-135m-instruct \\
        --calibration wikitext2-valid.txt --text wikitext2-test.raw.txt

Meant for a `lowbit` that was installed from the wheel into a fresh environment. The commands run in an empty
folder that holds the model and the two texts under their own names; a command that fails stops the script.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "COMMANDS.md"
WIDTH = 110
LONGEST = 46  # lines of an output that are shown

STEPS = [
    ("What one does with it", "", ["lowbit"]),
    ("What works here", "`no` is what this machine lacks, with what to do about it.", ["lowbit doctor"]),
    (
        "Quantize",
        "Few samples, to be quick; the default number takes minutes and is better.",
        [
            "lowbit quantize {model} --output smollm2-w4 --samples 32 --seq-len 256 --dataset {calibration}",
            "lowbit quantize {model} --output smollm2-w8 --method rtn --bits 8",
        ],
    ),
    (
        "See what it cost",
        "Adds the result to `smollm2-w4/report.html` and to its model card.",
        ["lowbit eval smollm2-w4 --reference {model} --dataset {text} --seq-len 256 --windows 8"],
    ),
    ("See what is in it", "", ["lowbit inspect smollm2-w4"]),
    (
        "Bits where they matter",
        "What `lowbit quantize` would choose for such a target.",
        ["lowbit plan {model} --target-bpw 4.5 --dataset {calibration}"],
    ),
    (
        "Use it",
        "",
        ["lowbit generate smollm2-w4 --prompt 'What is the capital of France?' --max-new-tokens 24"],
    ),
    (
        "See how fast it is",
        "Beside the original in bfloat16. The figures are this machine's, with other programs running.",
        ["lowbit bench smollm2-w4 --reference {model} --prompt-tokens 64 --new-tokens 8 --threads 1"],
    ),
    (
        "Another format",
        "",
        ["lowbit convert smollm2-w4 smollm2-gptq --format gptq", "lowbit convert smollm2-w4 smollm2-w4.gguf"],
    ),
    (
        "Several on one page",
        "",
        [
            "lowbit compare smollm2-w4 smollm2-w8 smollm2-w4.gguf --reference {model} --dataset {text} "
            "--seq-len 256 --windows 8"
        ],
    ),
    ("Publish", "", ["lowbit push smollm2-w4 my-org/smollm2-w4 --dry-run"]),
    (
        "For scripts",
        "`--json` makes any command's output one object on stdout; progress goes to stderr.",
        ["lowbit inspect smollm2-w8 --json"],
    ),
]
MISTAKES = [
    "lowbit quantise {model}",
    "lowbit quantize {model} --output smollm2-w5 --bits 5",
    "lowbit quantize {model} --output smollm2-w4",
    "lowbit eval smollm2-w4 --dataset notes.csv",
]


def run(command: str, lowbit: Path, folder: Path, expected: tuple[int, ...]) -> str:
    """Run one command in the folder; what it printed."""
    keep = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {"COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    words = [str(lowbit), *shlex.split(command)[1:]]
    started = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - started:6.1f} s  {command}", flush=True)
    if done.returncode not in expected:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def shown(text: str, folder: Path) -> str:
    """An output as the page shows it: without this machine's paths, and not too long."""
    text = text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    lines = [line for line in lines if not re.fullmatch(r"\S+ \d+/\d+  .*", line)]  # a bar in a terminal
    if len(lines) > LONGEST:
        lines = [*lines[:LONGEST], f"... and {len(lines) - LONGEST} lines more"]
    return "\n".join(lines)


def section(title: str, about: str, outputs: list[tuple[str, str]], language: str = "console") -> str:
    blocks = [f"```{language}\n$ {command}\n{output}\n```" for command, output in outputs]
    return "\n\n".join([f"## {title}", *([about] if about else []), *blocks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lowbit", type=Path, required=True, help="the installed command")
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--keep", type=Path, help="folder that gets the pages report.html and compare.html")
    options = parser.parse_args()
    names = {
        name: getattr(options, name).resolve().name.replace(" ", "-")
        for name in ("model", "calibration", "text")
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, shown_as in names.items():
            (folder / shown_as).symlink_to(getattr(options, name).resolve())

        def outputs(commands: list[str], *expected: int) -> list[tuple[str, str]]:
            filled = [command.format(**names) for command in commands]
            return [(c, shown(run(c, options.lowbit.absolute(), folder, expected), folder)) for c in filled]

        version = run("lowbit --version", options.lowbit.absolute(), folder, (0,)).strip()
        parts = [section(title, about, outputs(commands, 0)) for title, about, commands in STEPS]
        wrong = "One line on stderr that names the value and the fix, exit code 2, nothing written."
        parts.append(section("When something is wrong", wrong, outputs(MISTAKES, 2), "text"))
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "compare.html", options.keep)
            shutil.copy(folder / "smollm2-w4" / "report.html", options.keep)
    head = f"""# Every command

Each as a new user would run it: {version}, installed from its wheel into a fresh environment, on
{platform.system()}, Python {platform.python_version()}, {time.strftime("%Y-%m-%d")}, 2 shared cores. This page is
written by

```bash
python scripts/show_commands.py --lowbit fresh/bin/lowbit --model {names["model"]} --calibration {names["calibration"]} --text {names["text"]}
```

`lowbit COMMAND --help` shows all options, with examples."""  # noqa: E501
    PAGE.write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
