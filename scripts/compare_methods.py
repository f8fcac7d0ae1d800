"""Every method on one model: what it costs and what is left of the model, as a Markdown table.

    python scripts/compare_methods.py MODEL --group-size 64 --calibration train.txt --text test.txt

Without arguments it takes the demo's model and text (`make demo` puts them in place).

Each run is a process of its own (`lowbit quantize --json`, `lowbit eval --json`), one at a time, so
CPU seconds and peak memory are that run's alone. Results are appended to `--results` as JSON lines
and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lowbit.effort import EFFORTS

RUNS = [
    *((name, 4, "symmetric") for name in ("rtn", "awq", "gptq", "balanced", "high", "max")),
    *((name, 4, "asymmetric") for name in ("rtn", "awq", "gptq", "balanced", "high", "max")),
    *((name, 3, "asymmetric") for name in ("gptq", "balanced", "high")),
    *((name, 2, "asymmetric") for name in ("gptq", "balanced", "high")),
    ("rtn", 8, "symmetric"),
]
HEADER = (
    "| model | method or effort | scheme | bits/weight | perplexity | ratio | KL | top-1 "
    "| KL on the second text | CPU s | peak GB |"
)


def lowbit(*arguments: str) -> dict[str, Any]:
    """Run one lowbit command and read what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", *arguments, "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(
    options: argparse.Namespace, method: str, bits: int, symmetry: str, folder: Path
) -> dict[str, Any]:
    """Quantize and evaluate once."""
    own_data = method in EFFORTS and EFFORTS[method].dataset is not None
    made = lowbit(
        "quantize", options.model, "--output", str(folder),
        "--effort" if method in EFFORTS else "--method", method, "--bits", str(bits),
        "--group-size", options.group_size, f"--{symmetry}", "--seq-len", str(options.seq_len),
        *([] if own_data else ["--dataset", options.calibration, "--samples", str(options.samples)]),
        "--seed", str(options.seed), "--overwrite",
    )  # fmt: skip
    found = lowbit(
        "eval", str(folder), "--reference", options.model, "--dataset", options.text,
        "--seq-len", str(options.eval_seq_len), "--windows", str(options.windows),
        "--dtype", options.eval_dtype,
    )  # fmt: skip
    second = lowbit(
        "eval", str(folder), "--reference", options.model, "--dataset", options.second_text,
        "--seq-len", str(options.eval_seq_len), "--windows", str(options.windows),
        "--dtype", options.eval_dtype,
    )["kl"] if options.second_text else None  # fmt: skip
    size = lowbit("inspect", str(folder))
    parts = [part for part in size["parts"] if part["quantized"]]
    bits_per_weight = 8 * sum(p["bytes"] for p in parts) / sum(p["weights"] for p in parts)
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in made["layers"])
    return {
        "scheme": made["scheme"], "calibration": made["calibration"], "bits_per_weight": bits_per_weight,
        "cpu_seconds": made["cpu_seconds"], "stages": made["seconds"], "peak_memory": made["peak_memory"],
        "cpu_seconds_per_million": made["cpu_seconds"] / (weights / 1e6), **found, "second_kl": second,
    }  # fmt: skip


def row(run: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"| {run['model']} | {run['method']} | {run['scheme']} | {run['bits_per_weight']:.2f} "
        f"| {run['perplexity']:.2f} ± {run['perplexity_se']:.2f} "
        f"| {run['perplexity_ratio']:.4f} ± {run['perplexity_ratio_se']:.4f} "
        f"| {run['kl']:.4f} ± {run['kl_se']:.4f} | {run['top1_agreement']:.3f} "
        f"| {'' if run.get('second_kl') is None else format(run['second_kl'], '.4f')} "
        f"| {run['cpu_seconds']:.0f} | {run['peak_memory'] / 1e9:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    demo = Path("demo-output")
    parser.add_argument("model", nargs="?", default=str(demo / "source"))
    parser.add_argument("--calibration", default="self", help="calibration text, never the evaluation text")
    parser.add_argument("--text", default=str(demo / "python-reference.txt"), help="evaluation text")
    parser.add_argument("--second-text", help="another text, of another kind")
    parser.add_argument("--group-size", default="auto")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--eval-dtype", default="auto")
    parser.add_argument("--only", nargs="*", help="runs such as gptq-4-symmetric")
    parser.add_argument("--results", type=Path, default=Path("compare_methods.jsonl"))
    arguments = parser.parse_args()
    text = arguments.results.read_text() if arguments.results.exists() else ""
    known = [json.loads(line) for line in text.splitlines()]
    model = Path(arguments.model).name
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("only", "results")}
    for method, bits, symmetry in RUNS:
        key = {"model": model, "method": method, "bits": bits, "symmetry": symmetry, "settings": settings}
        if arguments.only and f"{method}-{bits}-{symmetry}" not in arguments.only:
            continue
        if any(all(run.get(name) == value for name, value in key.items()) for run in known):
            continue
        print(f"{model}: {method} {bits} bits {symmetry}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            run = key | measure(arguments, method, bits, symmetry, Path(scratch) / "checkpoint")
        known.append(run)
        with arguments.results.open("a") as file:
            file.write(json.dumps(run) + "\n")
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for run in known:
        print(row(run))


if __name__ == "__main__":
    main()
