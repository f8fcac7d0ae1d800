"""The page beside a checkpoint: `report.html`, one file, drawn from the record alone.

Nothing is fetched: style, charts and text are in the file, and there is no script. What has one axis
(sizes, seconds, errors of layers) is a table whose cells are coloured or carry a bar, so that the
numbers are there for a screen reader, a phone and a search; what has two is SVG (`charts.py`).
Colours are variables of the style sheet with a second set for dark mode; series differ in marker
and dash too.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.charts import Axis, Chart

NAME = "report.html"
LEVELS = 10  # steps of a colour ramp
KL_LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats at which a token's colour changes
LISTED = 12  # rows of a list that may be long
NUMBER = re.compile(r"(?<=[a-z_]\.)\d+(?=\.[a-z]|$)")  # of a block or an expert: `layers.3.mlp`


def write(record: Mapping[str, Any], folder: Path) -> None:
    """Draw the page of a record into a folder."""
    (folder / NAME).write_text(render(record), encoding="utf-8")


def render(record: Mapping[str, Any]) -> str:
    """The page of a record (`record.py`), as HTML."""
    quantization = record["quantization"] or {}
    layers = quantization.get("layers", [])
    return page(
        "report.html.jinja",
        record=record,
        quantization=quantization,
        evaluations=[_evaluation(entry) for entry in record["evaluations"]],
        tasks=record.get("tasks", []),
        runs=evaluation_runs(record),
        sizes=_sizes(record),
        heat=heat_map(layers, quantization.get("skipped", {})),
        worst=sorted(layers, key=lambda layer: -layer["error"])[:LISTED],
        stages=_stages(quantization),
        plan=_plan(quantization.get("plan")),
        skipped=grouped(quantization.get("skipped", {}).items()),
        notes=[note for note, _ in grouped((note, "") for note in quantization.get("notes", []))],
    )


def evaluation_runs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that measured something, each once: a run leaves a row for every task and metric."""
    runs: list[dict[str, Any]] = []
    for entry in (*record["evaluations"], *record.get("tasks", [])):
        if entry["run"] not in runs:
            runs.append(entry["run"])
    return runs


def page(template: str, **values: Any) -> str:
    """One of our templates, filled in; what is missing is an error, what is text is escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    """Templates are compiled once in a process."""
    environment = Environment(
        loader=PackageLoader("lowbit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "pm": with_error, "seconds": seconds, "sig": significant}
    environment.globals["kl_level"] = kl_level
    environment.globals["kl_levels"] = KL_LEVELS
    return environment


def size(count: float) -> str:
    """Bytes, readable.

    >>> size(457_200_000), size(8_040_000_000)
    ('457 MB', '8.04 GB')
    """
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}" if count < 1000 * one else f"{count / one:,.0f} {unit}"
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds, readable.

    >>> seconds(4.21), seconds(425), seconds(7325)
    ('4.2 s', '7 min 05 s', '2 h 02 min')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def with_error(value: float, error: float | None, scale: float = 1.0) -> str:
    """A value with as many digits as its standard error allows (two of the error's).

    >>> with_error(0.07482, 0.00293), with_error(32.86, None), with_error(0.855, 0.0031, 100)
    ('0.0748 ± 0.0029', '32.9', '85.50 ± 0.31')
    """
    value *= scale
    if not error:
        return significant(value) if error is None else f"{significant(value)} ± 0"
    error *= scale
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def significant(value: float) -> str:
    """Three significant digits, without an exponent where one can be avoided.

    >>> significant(0.01234), significant(35.871), significant(0.0000123)
    ('0.0123', '35.9', '1.2e-05')
    """
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def kl_level(kl: float) -> int:
    """Step of the colour ramp for a token's KL, 0 to `len(KL_LEVELS)`."""
    return sum(kl >= bound for bound in KL_LEVELS)


def heat_map(layers: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> dict[str, Any] | None:
    """Blocks in rows, linears in columns; experts of one block share a cell (mean error)."""
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        block, linear = place(layer["name"])
        if block is not None:
            cells[block, linear].append(layer)
    if not cells:
        return None
    full = {place(name) for name in skipped}
    columns = list(dict.fromkeys(linear for _, linear in cells))
    columns += sorted({linear for block, linear in full if block is not None} - set(columns))
    errors = {key: sum(layer["error"] for layer in found) / len(found) for key, found in cells.items()}
    positive = sorted(error for error in errors.values() if error > 0) or [1.0]
    # One layer that is far better or worse than all others must not bleach the rest.
    low, high = positive[len(positive) // 25], positive[-1 - len(positive) // 25]
    span = math.log(high / low) or 1.0

    def cell(block: int, linear: str) -> dict[str, Any] | None:
        found = cells.get((block, linear))
        if not found:
            return {"full": True} if (block, linear) in full else None
        error = errors[block, linear]
        level = round((LEVELS - 1) * math.log(min(max(error, low), high) / low) / span)
        text = f"{100 * error:.2g}" if error < 0.1 else f"{100 * error:.0f}"
        schemes = sorted({layer["scheme"] for layer in found})
        bits = sum(_bits(layer["scheme"], layer["shape"][1]) for layer in found) / len(found)
        return {"full": False, "error": error, "text": text, "level": level, "bits": bits,
                "scheme": ", ".join(schemes)}  # fmt: skip

    rows = [(block, [cell(block, linear) for linear in columns]) for block in sorted({b for b, _ in cells})]
    filled = [c for _, row in rows for c in row if c and not c["full"]]
    widths = sorted({c["bits"] for c in filled})
    for c in filled:
        c["bits_level"] = (LEVELS - 1) * widths.index(c["bits"]) // max(1, len(widths) - 1)
    schemes = {c["scheme"] for c in filled}
    mixed = len(schemes) > 1 or any(c and c["full"] for _, row in rows for c in row)
    outside = [layer for layer in layers if place(layer["name"])[0] is None]
    shared = any(len(found) > 1 for found in cells.values())
    return {"columns": columns, "groups": _groups(columns), "rows": rows, "low": low, "high": high,
            "mixed": mixed, "shared": shared, "outside": outside}  # fmt: skip


def place(name: str) -> tuple[int | None, str]:
    """Block and linear of a module name.

    >>> place("model.layers.7.mlp.experts.3.up_proj"), place("lm_head")
    ((7, 'mlp.experts.*.up_proj'), (None, 'lm_head'))
    """
    head = re.match(r"(?:[a-zA-Z_]\w*\.)+?(\d+)\.", name)
    if head is None:
        return None, name
    return int(head[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name[head.end() :])


def grouped(lines: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names and reasons; one line for what differs only in numbers: `model.layers.*.mlp.gate (x24)`."""
    alike: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for line in lines:
        alike[tuple(NUMBER.sub("*", text) for text in line)].append(line)
    names = [_joined([name for name, _ in found]) for found in alike.values()]
    counts = [f" (x{len(found)})" if len(found) > 1 else "" for found in alike.values()]
    reasons = [_joined([reason for _, reason in found]) for found in alike.values()]
    return [(name + count, reason) for name, count, reason in zip(names, counts, reasons, strict=True)]


def _joined(texts: Sequence[str]) -> str:
    """Texts that differ only in numbers as one, with `*` for a number that is not the same in all."""
    numbers = zip(*map(NUMBER.findall, texts), strict=True)
    shown = iter([found[0] if len(set(found)) == 1 else "*" for found in numbers])
    return NUMBER.sub(lambda _: next(shown), texts[0])


def _groups(columns: Sequence[str]) -> list[tuple[str, int]]:
    """Neighbouring columns of one parent module: its name, and how many they are."""
    groups: list[tuple[str, int]] = []
    for column in columns:
        parent = column.rpartition(".")[0]
        if groups and groups[-1][0] == parent:
            groups[-1] = (parent, groups[-1][1] + 1)
        else:
            groups.append((parent, 1))
    return groups


def _bits(scheme: str, in_features: int) -> float:
    """Stored bits per weight of a scheme given as text, scales counted."""
    found = re.match(r"w(\d+)(?:g(\d+))?", scheme)
    if found is None:
        return 16.0
    bits, zeros = int(found[1]), int(found[1]) if scheme.endswith("-asym") else 0
    return bits + (16 + zeros) / int(found[2] or in_features)


def _sizes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes before and after, split into quantized layers and the rest."""
    parts = record["parts"]
    quantized = sum(part["bytes"] for part in parts if part["quantized"])
    rest = sum(part["bytes"] for part in parts if not part["quantized"])
    weights = sum(part["weights"] for part in parts)
    inside = sum(part["weights"] for part in parts if part["quantized"])
    before = (record["quantization"] or {}).get("source_bytes") or 2 * weights
    return {
        "before": before,
        "after": max(1, quantized + rest),
        "quantized": quantized,
        "rest": rest,
        "weights": weights,
        "dense": 2 * weights,
        "widest": max(before, quantized + rest, 2 * weights, 1),
        "bits": 8 * (quantized + rest) / max(weights, 1),
        "bits_quantized": 8 * quantized / max(inside, 1),
    }


def _stages(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    times = {name: took for name, took in quantization.get("seconds", {}).items() if name != "all"}
    memory = quantization.get("memory", {})
    longest = max(times.values(), default=0) or 1
    return [
        {"name": name, "seconds": took, "share": took / longest, "memory": memory.get(name)}
        for name, took in times.items()
    ]


def _plan(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a budget chose (`results.Report.plan`), with the length of every bar."""
    if not plan:
        return None
    largest = max((row["sensitivity"] for row in plan["rows"]), default=0) or 1
    rows = [{**row, "share": row["sensitivity"] / largest} for row in plan["rows"]]
    return {**plan, "rows": rows}


def _evaluation(entry: Mapping[str, Any]) -> dict[str, Any]:
    divergence = entry.get("divergence")
    return {**entry, "histogram": histogram(divergence, entry["result"]["kl"]) if divergence else None}


def histogram(divergence: Mapping[str, Any], mean: float) -> Markup:
    """How many tokens diverge how far: a histogram over a logarithmic axis, and the mean."""
    edges, counts = divergence["edges"], divergence["counts"]
    total = sum(counts) or 1
    shares = [count / total for count in counts[1:-1]]
    shares[0] += counts[0] / total
    shares[-1] += counts[-1] / total
    filled = [index for index, share in enumerate(shares) if share]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, len(shares))
    x = Axis("KL divergence at a token, nats (log scale)", edges[first], edges[last], log=True)
    chart = Chart(x, Axis("tokens in a bin, %", 0, 1.08 * max(shares), percent=True),
                  "Histogram of the KL divergence of single tokens")  # fmt: skip
    chart.steps(edges[first : last + 1], shares[first:last])
    chart.mark(divergence["quantiles"]["0.5"], "median", 0)
    chart.mark(mean, "mean", 1)
    chart.mark(divergence["quantiles"]["0.99"], "99 %", 2)
    return Markup(str(chart))


def survival(models: Sequence[Mapping[str, Any]]) -> Markup:
    """For several checkpoints: the share of tokens that diverge by more than so much."""
    edges = models[0]["divergence"]["edges"]
    totals = [sum(model["divergence"]["counts"]) for model in models]
    least = 1 / max(totals)
    chart = Chart(Axis("KL divergence at a token, nats (log scale)", 1e-4, edges[-1] / 5, log=True),
                  Axis("tokens above it (log scale)", least, 1, log=True, percent=True),
                  "Share of tokens whose KL divergence is larger than a value")  # fmt: skip
    for series, (model, total) in enumerate(zip(models, totals, strict=True)):
        counts = model["divergence"]["counts"]
        above = [sum(counts[index + 1 :]) / total for index in range(len(edges))]
        shown = [(x, y) for x, y in zip(edges, above, strict=True) if x >= 1e-4 and y > 0]
        chart.curve([x for x, _ in shown], [y for _, y in shown], series)
    return Markup(str(chart))
