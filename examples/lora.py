"""LoRA on a quantized base: the weights stay packed in memory, only the adapter is trained (needs peft).

python examples/lora.py my-model-w4 train.jsonl my-adapter

peft is told that lowbit's `QuantLinear` is a linear layer; gradients pass through it to the adapters below.
The adapter is an ordinary one: `PeftModel.from_pretrained` puts it on the quantized model or the original.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoTokenizer

import lowbit
from lowbit.dataset import pack_tokens, read_documents
from lowbit.nn import QuantLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="quantized checkpoint, ours or another tool's")
    parser.add_argument("data", help=".txt, .jsonl or .parquet")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = lowbit.load(options.model, device=device)
    packed = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=sorted(packed))
    config._register_custom_module({QuantLinear: LoraLinear})
    model = get_peft_model(model, config)
    model.train()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = options.steps * options.batch
    rows = pack_tokens(read_documents(options.data), tokenizer, count, options.seq_len, seed=0).to(device)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=options.learning_rate
    )
    for step in range(options.steps):
        batch = rows[torch.arange(step * options.batch, (step + 1) * options.batch) % len(rows)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.save_pretrained(options.output)
    print(f"adapter in {options.output}")


if __name__ == "__main__":
    main()
