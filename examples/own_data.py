"""Quantize a private fine-tune with its own data, offline, and measure the cost on data it has not seen.

python examples/own_data.py ./my-finetune chats.jsonl my-finetune-w4

The data is a .jsonl of `{"text": ...}` or `{"messages": [...]}`. Every tenth row is held out. What a
fine-tune learned is where a calibration text from the web sees least, so its own data is the better one, and
the only honest judge.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lowbit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help=".jsonl with a column text or messages")
    parser.add_argument("output")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--effort", default="balanced")
    options = parser.parse_args()

    rows = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        calibration, held_out = Path(folder, "calibration.jsonl"), Path(folder, "held-out.jsonl")
        calibration.write_text("".join(row for i, row in enumerate(rows) if i % 10), encoding="utf-8")
        held_out.write_text("".join(rows[::10]), encoding="utf-8")

        report = lowbit.quantize(
            options.model,
            output=options.output,
            effort=options.effort,
            dataset=str(calibration),
            seq_len=options.seq_len,
            auto_group=True,
        )
        result = lowbit.perplexity(
            options.output, str(held_out), reference=options.model, seq_len=options.seq_len
        )
    print(f"{report.source_bytes / 1e6:.1f} MB -> {report.output_bytes / 1e6:.1f} MB ({report.scheme})")
    print(f"perplexity on held-out data: {result.reference_perplexity:.3f} -> {result.perplexity:.3f}")
    print(f"KL {result.kl:.4f} nats per token, same top token {100 * (result.top1_agreement or 0):.1f} %")


if __name__ == "__main__":
    main()
