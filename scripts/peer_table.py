"""The results of `compare_peers.py` as Markdown, and a table's place on a page."""

from __future__ import annotations

from typing import Any

COLUMNS = "peer | method | scheme | bits/weight | text | ppl ratio | KL | top-1 | CPU s | peak GB"
MARKERS = ("<!-- peers: begin -->\n", "<!-- peers: end -->")


def scheme_name(result: dict[str, Any]) -> str:
    """Such as `w4g64 asym`; `mixed` where a target stands for it."""
    if result["method"].startswith("target-"):
        return "mixed"
    return f"w{result['bits']}g{result['group_size']} {'sym' if result['symmetric'] else 'asym'}"


def rows(result: dict[str, Any]) -> list[str]:
    """A result's lines of the table, one for each text."""
    found = []
    for text, score in result["texts"].items():
        cells = [
            f"{result['peer']} {result['version']}", result["method"], scheme_name(result),
            f"{result['bits_per_weight']:.2f}", text,
            f"{score['perplexity_ratio']:.3f} ± {score['perplexity_ratio_se']:.3f}",
            f"{score['kl']:.4f} ± {score['kl_se']:.4f}", f"{score['top1_agreement']:.3f}",
            f"{result['cpu_seconds']:.0f}", f"{result['peak_memory'] / 1e9:.2f}",
        ]  # fmt: skip
        found.append(f"| {' | '.join(cells)} |")
    return found


def table(results: list[dict[str, Any]]) -> str:
    """All results as Markdown: a table for each model and width, the best divergence first."""
    groups = sorted({(r["model"], -r["bits"]) for r in results})
    blocks = []
    for model, bits in groups:
        chosen = [r for r in results if (r["model"], -r["bits"]) == (model, bits)]
        chosen.sort(key=lambda r: next(iter(r["texts"].values()))["kl"])
        lines = [f"**{model}, {-bits} bits**", "", f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
        blocks.append("\n".join([*lines, *(line for result in chosen for line in rows(result))]))
    return "\n\n".join(blocks) + "\n"


def between_markers(page: str, text: str, markers: tuple[str, str] = MARKERS) -> str:
    """`page` with `text` in place of what stands between the markers.

    Raises:
        SystemExit: the page has no markers.
    """
    begin, end = (page.find(marker) for marker in markers)
    if begin < 0 or end < begin:
        raise SystemExit(f"the page lacks the lines {markers[0].strip()} and {markers[1]}")
    return f"{page[: begin + len(markers[0])]}\n{text}\n{page[end:]}"
