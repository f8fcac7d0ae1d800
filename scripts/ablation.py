"""What each technique adds: one after the other, over several calibration seeds, as a Markdown table.

    python scripts/ablation.py MODEL --group-size 64 --calibration train.txt --text test.txt:16 other.txt:8

Every step keeps what the steps before it brought, except where its name says otherwise: the corrected ones
begin with tokens that count alike, and with rows of the text alone.

A run is a process of its own, with one seed; all checkpoints of a text are measured against one pass of the
original. A figure is the mean over seeds, ± the standard error of that mean: what another draw of calibration
rows would change. Results are appended to `--results` as JSON lines, and a run that is there already is not
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compare_peers import evaluate, settings_of
from peer_table import between_markers

MARKERS = ("<!-- ablation: begin -->\n", "<!-- ablation: end -->")


def plain_gptq(**changes: Any) -> SimpleNamespace:
    """GPTQ with some of its parts left out, as `ALGORITHMS` takes it."""
    from functools import partial

    from lowbit.algorithms import gptq

    return SimpleNamespace(NEEDS_HESSIAN=True, quantize_weight=partial(gptq.quantize_weight, **changes))


ONCE = {"again": False}  # ranges chosen for the weight, and not again for what is rounded
WHOLE = {**ONCE, "trust": 1.0, "damp": 0.03}  # the calibration text believed as it is

# `even`: all tokens of a row count alike. `mix`: a fifth of the rows comes from lowbit's passages.
STEPS: dict[str, dict[str, Any]] = {
    "round to nearest, min-max": {"method": "rtn"},
    "GPTQ, columns in order": {
        "without": {**WHOLE, "act_order": False, "shrinks": (), "rounds": 0}, "even": True,
    },
    "+ large inputs first, groups static": {"without": {**WHOLE, "shrinks": (), "rounds": 0}, "even": True},
    "+ ranges chosen by the residual of LDLᵀ": {"without": {**WHOLE, "rounds": 0}, "even": True},
    "+ less trust in the calibration text": {"without": {**ONCE, "rounds": 0}, "even": True},
    "+ codes and scales gone over again": {"without": ONCE, "even": True},
    "+ ranges chosen again, for what is rounded": {"method": "gptq", "even": True},
    "+ tokens weighed by their place": {"method": "gptq"},
    "+ one row in five from the passages (`--method gptq`)": {"method": "gptq", "mix": True},
    "corrected for the layers before, gone over once": {
        "method": "qronos", "without": {**ONCE, "rounds": 0}, "even": True,
    },
    "corrected for the layers before, gone over again": {"method": "qronos", "without": ONCE, "even": True},
    "+ ranges chosen again, for what is rounded (corrected)": {"method": "qronos", "even": True},
    "corrected, + tokens weighed by their place": {"method": "qronos"},
    "+ one row in five from the passages (`balanced`)": {"effort": "balanced", "mix": True},
    "+ scales and norms trained (`high`)": {"effort": "high", "mix": True},
    "+ on more rows, twice (`max`)": {"effort": "max", "mix": True},
    "one pass, on passages alone (`fast`)": {"effort": "fast", "own": True},
}  # fmt: skip


def quantize_once(options: argparse.Namespace) -> None:
    """The child process: one step with one seed; prints its CPU seconds."""
    import lowbit
    from lowbit import QuantScheme, reach
    from lowbit.algorithms import ALGORITHMS

    step = {"mix": False, **STEPS[options.step]}
    if step.pop("even", False):
        reach.weigh = lambda *_: None
    if "without" in step:
        step.setdefault("method", "gptq-in-part")
        ALGORITHMS[step["method"]] = plain_gptq(**step.pop("without"))
    scheme = QuantScheme(options.bits, options.group_size, not options.asymmetric)
    if not step.pop("own", False):
        step |= {"dataset": options.calibration, "samples": options.samples}
    report = lowbit.quantize(
        options.model, scheme, output=options.output, seq_len=options.seq_len, seed=options.seed, **step
    )
    print(json.dumps({"cpu_seconds": report.cpu_seconds, "scheme": report.scheme}))


def measure(options: argparse.Namespace, step: str, seed: int) -> dict[str, Any]:
    """Quantize in a process of its own, then evaluate on every text."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        command = [
            sys.executable, __file__, options.model, "--step", step, "--seed", str(seed),
            "--output", str(made), "--bits", str(options.bits), "--group-size", str(options.group_size),
            "--samples", str(options.samples), "--seq-len", str(options.seq_len),
            "--calibration", options.calibration,
            *(["--asymmetric"] if options.asymmetric else []),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]) | {"texts": evaluate(made, options)}


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard error of the mean, over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def table(results: list[dict[str, Any]]) -> str:
    """A table for each model, scheme and working precision, steps in order."""
    unknown = {run["step"] for run in results} - set(STEPS)
    if unknown:
        sys.exit(f"recorded, but no step of today: {sorted(unknown)}; drop or rename these lines")
    blocks = []

    def kind(run: dict[str, Any]) -> tuple[str, str, str]:
        return run["model"], run["scheme"], run["settings"]["dtype"]

    for model, scheme, dtype in dict.fromkeys(map(kind, results)):
        chosen = [r for r in results if kind(r) == (model, scheme, dtype)]
        texts = list(chosen[0]["texts"])
        heads = [f"KL, {text} | ratio" for text in texts]
        count, used = len({run["seed"] for run in chosen}), chosen[0]["settings"]
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        rows = f"{used['samples']} x {used['seq_len']} tokens"
        lines = [f"**{model}, {scheme}, {rows}, {seeds}, in {dtype}**", "",
                 f"| step | {' | '.join(heads)} | CPU s |", "|---" * (2 + 2 * len(texts)) + "|"]  # fmt: skip
        for step in STEPS:
            runs = [r for r in chosen if r["step"] == step]
            if runs:
                cells = [
                    spread([r["texts"][text][key] for r in runs], digits)
                    for text in texts
                    for key, digits in (("kl", 4), ("perplexity_ratio", 3))
                ]
                cpu = statistics.mean(r["cpu_seconds"] for r in runs)
                lines.append(f"| {step} | {' | '.join(cells)} | {cpu:.0f} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder; without it only the table is made")
    parser.add_argument("--calibration", help="calibration text, never the evaluation text")
    parser.add_argument("--text", nargs="+", help="evaluation texts, FILE:WINDOWS")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=list(range(len(STEPS))), help="by number")
    parser.add_argument("--results", type=Path, default=Path("ablation.jsonl"))
    parser.add_argument("--docs", type=Path, help="page that gets the table between its markers")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        quantize_once(options)
        return
    if options.model and not (options.calibration and options.text):
        parser.error("a model needs --calibration and --text")
    text = options.results.read_text() if options.results.exists() else ""
    known = [json.loads(line) for line in text.splitlines()]
    names = ("samples", "seq_len", "eval_seq_len", "bits", "group_size", "asymmetric")
    settings = settings_of(options, *names) if options.model else {}
    for seed in options.seeds if options.model else []:
        for step in [list(STEPS)[number] for number in options.steps]:
            key = {"model": Path(options.model).name, "step": step, "seed": seed, "settings": settings}
            if any(all(result.get(name) == value for name, value in key.items()) for result in known):
                continue
            print(f"{key['model']}: {step}, seed {seed}", file=sys.stderr)
            known.append(key | measure(options, step, seed))
            with options.results.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
    print(table(known))
    if options.docs:
        options.docs.write_text(between_markers(options.docs.read_text(), table(known), MARKERS))


if __name__ == "__main__":
    main()
