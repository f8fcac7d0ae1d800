"""Does a packed checkpoint compute what its dequantized weights say? Logits, greedy text, memory.

    python scripts/packed_vs_dense.py my-model-w4 [--original my-model] [--native] [--threads 1]

Logits are compared with those of the dequantized model in float32, its weights not rounded. The packed path
rounds activations to bfloat16 as the dense bfloat16 model does, but not the weights: it must be no
further away than that model is (5 % are allowed for chance). Both of its ways are measured: a prompt at once
(dequantized tiles) and token by token (the kernel for few rows).

Greedy text of both is compared with equal prompts. Where it parts, the lead of the best token over the
second in float32 says whether that was a tie that bfloat16 can't decide: less than six times the error of the
dense bfloat16 logits, or the resolution of bfloat16 at the size of the best logit.

Peak memory is that of fresh processes that load and generate. Markdown goes to stdout; exit code 1 if
the packed path is further away, or parts where there was no tie.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import hf, native
from lowbit.hardware import peak_memory
from lowbit.quantizer import quant_layers

PROMPTS = (
    "The river rises in the mountains and",
    "def quicksort(values):\n",
    "Three reasons why the sky is blue:\n1.",
    "In 1969, the first",
    "SELECT name, COUNT(*) FROM",
    "Once upon a time there was a programmer who",
)
TIE = 6.0
CHANCE = 1.05


@torch.no_grad()
def prefill_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits[0].float()
    return found


@torch.no_grad()
def stepwise_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    cache: Any = None
    rows = []
    for token in ids[0]:
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def exact_model(folder: str, packed: PreTrainedModel) -> PreTrainedModel:
    """The dequantized model in float32, with weights that were never rounded to bfloat16."""
    model = hf.load(folder, packed=False, dtype=torch.float32)
    own = set(map(id, quant_layers(packed)))
    for name, layer in packed.named_modules():
        if id(layer) in own:
            model.get_submodule(name).weight.data = layer.dense(torch.float32)
    return model


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    settings = {"max_new_tokens": count, "do_sample": False, "repetition_penalty": 1.0}
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return found[0]


def compare(folder: str, new_tokens: int) -> bool:
    """Print the tables of logits and text; is the packed path as good as the dense one?"""
    tokenizer = hf.load_tokenizer(folder)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    packed = hf.load(folder)
    exact = exact_model(folder, packed)
    dense = hf.load(folder, packed=False, dtype=torch.bfloat16)
    texts = [(greedy(packed, ids, new_tokens), greedy(dense, ids, new_tokens)) for ids in prompts]

    truth = [prefill_logits(exact, theirs[None]) for _, theirs in texts]
    spread = torch.cat(truth).std().item()
    errors = {}
    for title, model, run in (
        ("dense bfloat16, prompt at once", dense, prefill_logits),
        ("dense bfloat16, token by token", dense, stepwise_logits),
        ("packed, prompt at once", packed, prefill_logits),
        ("packed, token by token", packed, stepwise_logits),
    ):
        found = [run(model, theirs[None]) for _, theirs in texts]
        errors[title] = rms(torch.cat(found) - torch.cat(truth))
    print(
        f"\nLogits, {sum(map(len, truth))} positions, standard deviation {spread:.2f}; distance to float32:\n"
    )
    print("| path | RMS | of the standard deviation |\n|---|---|---|")
    for title, error in errors.items():
        print(f"| {title} | {error:.4f} | {100 * error / spread:.2f} % |")
    values = list(errors.values())
    good = values[2] <= CHANCE * values[0] and values[3] <= CHANCE * values[1]

    print(f"\nGreedy text, up to {new_tokens} tokens:\n")
    print("| prompt | same tokens | lead in float32 where it parts |\n|---|---|---|")
    for ids, (ours, theirs), logits in zip(prompts, texts, truth, strict=True):
        length = min(len(ours), len(theirs))
        parted = (ours[:length] != theirs[:length]).nonzero()
        start, shown = ids.shape[1], repr(tokenizer.decode(ids[0]))
        if not len(parted):
            print(f"| {shown} | {length - start} of {length - start} | |")
            continue
        place = int(parted[0])
        best = logits[place - 1].topk(2).values
        lead, resolution = (best[0] - best[1]).item(), 2**-8 * best[0].abs().item()
        tie = lead < max(TIE * max(values[:2]), resolution)
        good &= tie
        verdict = "a tie in bfloat16" if tie else "NOT a tie"
        print(
            f"| {shown} | {place - start} of {length - start} | {lead:.4f} (best {best[0]:.1f}): {verdict} |"
        )
    return good


def memory(folder: str, stock: bool, threads: int) -> tuple[float, float]:
    """Peak MB after loading, and after generating."""
    torch.set_num_threads(threads)
    model = hf.load_stock(folder) if stock else hf.load(folder)
    loaded = peak_memory() / 1e6
    greedy(model, torch.arange(100, 132).view(1, -1), 16)
    return loaded, peak_memory() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a quantized folder")
    parser.add_argument("--original", help="the model it was made from, for its memory")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--native", action="store_true", help="use the native kernels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [
        ("packed (lowbit.load)", options.checkpoint, False),
        ("stock transformers", options.checkpoint, True),
    ]
    if options.original:
        cases.append(("original, bfloat16", options.original, True))
    print("| peak memory, MB | after loading | after generating |\n|---|---|---|")
    for title, folder, stock in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            loaded, generated = pool.submit(memory, folder, stock, options.threads).result()
        print(f"| {title} | {loaded:.0f} | {generated:.0f} |", flush=True)
    if options.native:
        native.enable()
    sys.exit(0 if compare(options.checkpoint, options.new_tokens) else 1)


if __name__ == "__main__":
    main()
