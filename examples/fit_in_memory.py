"""Fit a 70B model on one 48 GB card: the most bits that leave room for the context, counted before any work.

python examples/fit_in_memory.py meta-llama/Llama-3.3-70B-Instruct llama-70b-w4 --memory 48 --context 8192

Sizes come from the configuration alone. Quantizing itself needs far less memory than the model: one block is
in memory at a time, and `--device cuda` puts that block on the card.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit import QuantScheme

RESERVE = 0.06  # of the card, for activations, the engine's workspace and fragmentation
CHOICES = [QuantScheme(8, 128), QuantScheme(4, 32), QuantScheme(4, 64), QuantScheme(4, 128)]
CHOICES += [QuantScheme(3, 64), QuantScheme(3, 128)]


def sizes(model: str) -> tuple[int, int, set[int]]:
    """Weights that will be quantized (the linear layers inside the blocks), all others, and the widths."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = skeleton.get_output_embeddings()
    linears = [m for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    inside = sum(linear.weight.numel() for linear in linears)
    outside = sum(parameter.numel() for parameter in skeleton.parameters()) - inside
    return inside, outside, {linear.in_features for linear in linears}


def weight_bytes(scheme: QuantScheme, inside: int, outside: int) -> int:
    """Codes, a bfloat16 scale per group, and the rest in bfloat16."""
    return round(inside * (scheme.bits / 8 + 2 / scheme.group_size) + 2 * outside)


def cache_bytes(model: str, context: int) -> int:
    """Keys and values of one sequence in bfloat16."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * heads * width * context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--memory", type=float, default=48, help="GB of the card")
    parser.add_argument("--context", type=int, default=8192, help="tokens")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--dataset", help="calibration text, as lowbit quantize takes it")
    options = parser.parse_args()

    free = options.memory * 1e9 * (1 - RESERVE) - cache_bytes(options.model, options.context)
    inside, outside, widths = sizes(options.model)
    for scheme in CHOICES:
        if any(width % scheme.group_size for width in widths):
            continue
        needed = weight_bytes(scheme, inside, outside)
        print(f"{scheme}: {needed / 1e9:.4g} GB of weights, {free / 1e9:.4g} GB free")
        if needed <= free:
            break
    else:
        sys.exit("it does not fit: take a shorter --context or a second card")
    report = lowbit.quantize(
        options.model, scheme, output=options.output, effort=options.effort, dataset=options.dataset
    )
    print(f"wrote {report.output_bytes / 1e9:.4g} GB: vllm serve {options.output} "
          f"--max-model-len {options.context}")  # fmt: skip


if __name__ == "__main__":
    main()
