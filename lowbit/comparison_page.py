"""The page of `lowbit compare`: the accuracy-size curve, and every number beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from lowbit.charts import Axis, Chart, Point, around
from lowbit.comparison import Comparison, Measured, frontier
from lowbit.record import this_run
from lowbit.report import page, survival

PASSAGES = 3  # of each checkpoint
LONGEST_LABEL = 26  # characters


def render(found: Comparison) -> str:
    """The page as HTML, in one file that fetches nothing."""
    models = [
        replace(model, divergence=model.divergence | {"passages": model.divergence["passages"][:PASSAGES]})
        for model in found.models
    ]
    return page(
        "compare.html.jinja",
        found=found,
        models=models,
        best=[model.name for model in frontier(models)],
        curve=accuracy_against_size(models),
        survival=survival([{"divergence": model.divergence} for model in models]),
        run=this_run(),
    )


def accuracy_against_size(models: Sequence[Measured]) -> Markup:
    """KL over size, with error bars and names, and the line of those that no other beats."""
    unit, one = ("GB", 1e9) if max(model.bytes for model in models) >= 1e9 else ("MB", 1e6)
    kls = [max(model.result.kl or 0.0, 1e-6) for model in models]
    errors = [model.result.kl_se for model in models]
    lowest = min(max(kl - (se or 0), kl / 2) for kl, se in zip(kls, errors, strict=True))
    highest = max(kl + (se or 0) for kl, se in zip(kls, errors, strict=True))
    sizes = [model.bytes / one for model in models]
    x = Axis(f"size of the weight files, {unit}", *around(min(sizes), max(sizes)))
    y = Axis("KL divergence, nats per token (log scale)", *around(lowest, highest, log=True), log=True)
    chart = Chart(x, y, "KL divergence from the original against the size of the checkpoint")
    best = frontier(models)
    if len(best) > 1:
        chart.line([m.bytes / one for m in best], [max(m.result.kl or 0.0, 1e-6) for m in best])
    chart.points(
        [
            Point(size, kl, se, _label(model.name), number)
            for number, (size, kl, se, model) in enumerate(zip(sizes, kls, errors, models, strict=True))
        ]
    )
    return Markup(str(chart))


def _label(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
