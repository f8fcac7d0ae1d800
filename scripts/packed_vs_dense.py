"""Does a packed checkpoint compute what its dequantized weights say? Products, logits, greedy text, memory.

    python scripts/packed_vs_dense.py my-model-w4 [--original my-model] [--no-native] [--threads 1]

What is right is the dequantized model in float32, its weights not rounded. Three things are asked:

1. *Products.* Every packed layer's, in bfloat16, on the activations that it meets in the model, against
   float64: over all layers no further away than the dense bfloat16 products are (2 % for chance). Rows
   few and many are asked, which run through different kernels. One thing is granted: torch's kernel knows no
   bias; where there is one, few rows' products are rounded before it is added, and that counts as allowed.
2. *float32.* With float32 activations the packed model is the exact one: logits agree to a thousandth of
   their standard deviation, and greedy text is equal.
3. *bfloat16.* Logits are no further from the exact ones than the dense bfloat16 model's. The errors of one
   text are one draw and not hundreds: 25 % are allowed for chance. Greedy text is that of the dense model up
   to a token where the two best are tied: their lead in float32 is less than six times the error of the
   dense model's logits, or the resolution of bfloat16 at the size of the best.

That the dense model does not repeat itself shows what to expect of 3: the table also counts where it chooses
another token when it reads its own text at once instead of token by token.

Peak memory is that of fresh processes that load and generate. Markdown goes to stdout; the exit code is 1
if the answer to one of them is no.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import hf, native
from lowbit.hardware import peak_memory
from lowbit.nn import QuantLinear
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
CHANCE, CHANCE_OF_PRODUCT = 1.25, 1.02
SAME = 1e-3
MANY = 160
"""Rows at which weights are dequantized and multiplied as a dense matrix."""


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


@torch.no_grad()
def check_products(packed: PreTrainedModel, prompts: list[Tensor]) -> bool:
    """Print how far the products of all layers are from float64; are the packed no further than the dense?"""
    print("\nProducts in bfloat16, distance to float64 as a part of their size:\n")
    print("| rows | packed | dense bfloat16 | result rounded once | allowed | worst layer, packed / dense |")
    print("|---|---|---|---|---|---|")
    rows = torch.cat([ids[0] for ids in prompts])
    good = True
    for ids in (rows[:1], rows[:16], rows.repeat(-(-MANY // len(rows)))[:MANY]):
        found: list[tuple[float, float, float, float]] = []

        def measure(
            layer: QuantLinear, inputs: tuple[Tensor], output: Tensor, found: list[Any] = found
        ) -> None:
            x = inputs[0].flatten(0, -2)
            bias = 0 if layer.bias is None else layer.bias.double()
            truth = x.double() @ layer.dense(torch.float32).double().T + bias
            dense = torch.nn.functional.linear(x, layer.dense(x.dtype), layer.bias)
            before = truth - bias
            twice = before.to(x.dtype) - before if len(x) < MANY and not native.enabled() else before - before
            ours, theirs, least = (
                ((y.flatten(0, -2).double() - truth).norm() / truth.norm()).item()
                for y in (output, dense, truth.to(x.dtype))
            )
            extra = (twice.norm() / truth.norm()).item() if layer.bias is not None else 0.0
            found.append((ours, theirs, least, math.hypot(theirs, extra)))

        hooks = [layer.register_forward_hook(measure) for layer in quant_layers(packed)]
        packed(ids[None])
        for hook in hooks:
            hook.remove()
        means = torch.tensor(found).square().mean(0).sqrt().tolist()
        worst = max(ours / theirs for ours, theirs, _, _ in found)
        good &= means[0] <= CHANCE_OF_PRODUCT * means[3]
        print(f"| {len(ids)} | " + " | ".join(f"{mean:.2e}" for mean in means) + f" | {worst:.2f} |")
    return good


def check_text(
    tokenizer: Any, prompts: list[Tensor], ours: list[Tensor], theirs: list[Tensor], exact: Any, error: float
) -> bool:
    """Print where greedy texts part; only at ties?"""
    good = True
    print("| prompt | same tokens | lead in float32 where it parts |\n|---|---|---|")
    for ids, own, other in zip(prompts, ours, theirs, strict=True):
        length, start = min(len(own), len(other)), ids.shape[1]
        parted = (own[:length] != other[:length]).nonzero()
        shown = repr(tokenizer.decode(ids[0]))
        if not len(parted):
            print(f"| {shown} | {length - start} of {length - start} | |")
            continue
        place = int(parted[0])
        best = prefill_logits(exact, other[None, :place])[-1].topk(2).values
        lead, resolution = (best[0] - best[1]).item(), 2**-8 * best[0].abs().item()
        tie = lead < max(TIE * error, resolution)
        good &= tie
        verdict = "a tie" if tie else "NOT a tie"
        print(
            f"| {shown} | {place - start} of {length - start} | {lead:.4f} (best {best[0]:.1f}): {verdict} |"
        )
    return good


def check_float32(folder: str, tokenizer: Any, prompts: list[Tensor], exact: Any, new_tokens: int) -> bool:
    """The same model twice, in float32: are its logits equal, and its texts, without any excuse?"""
    packed = hf.load(folder, dtype=torch.float32)
    ours, theirs = ([greedy(model, ids, new_tokens) for ids in prompts] for model in (packed, exact))
    truth = torch.cat([prefill_logits(exact, text[None]) for text in theirs])
    worst, spread = 0.0, truth.std().item()
    for run in (prefill_logits, stepwise_logits):
        found = torch.cat([run(packed, text[None]) for text in theirs])
        worst = max(worst, (found - truth).abs().max().item())
    equal = sum(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
    tokens = sum(len(text) - ids.shape[1] for text, ids in zip(theirs, prompts, strict=True))
    print(
        f"\nIn float32: logits of {len(truth)} positions differ by {worst:.1e} at most (standard deviation "
        f"{spread:.2f}); greedy text is equal for {equal} of {len(prompts)} prompts, {tokens} tokens."
    )
    return worst <= SAME * spread and equal == len(prompts)


def compare(folder: str, new_tokens: int) -> bool:
    """Print the tables of products, logits and text; is the packed path as good as the dense one?"""
    tokenizer = hf.load_tokenizer(folder)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    packed = hf.load(folder)
    good = check_products(packed, prompts)
    exact = exact_model(folder, packed)
    good &= check_float32(folder, tokenizer, prompts, exact, new_tokens)
    dense = hf.load(folder, packed=False, dtype=torch.bfloat16)
    ours, theirs = ([greedy(model, ids, new_tokens) for ids in prompts] for model in (packed, dense))

    truth = torch.cat([prefill_logits(exact, text[None]) for text in theirs])
    generated = torch.cat(
        [torch.arange(len(text)) >= ids.shape[1] - 1 for text, ids in zip(theirs, prompts, strict=True)]
    )
    errors, chosen = {}, {}
    for title, model, run in (
        ("dense bfloat16, prompt at once", dense, prefill_logits),
        ("dense bfloat16, token by token", dense, stepwise_logits),
        ("packed, prompt at once", packed, prefill_logits),
        ("packed, token by token", packed, stepwise_logits),
    ):
        found = torch.cat([run(model, text[None]) for text in theirs])
        errors[title] = rms(found - truth)
        chosen[title] = found.argmax(-1)[generated]
    spread, usual = truth.std().item(), chosen["dense bfloat16, token by token"]
    print(f"\nIn bfloat16, {len(truth)} positions, standard deviation {spread:.2f}; distance to float32:\n")
    print("| path | RMS | of the standard deviation | another first token than dense, token by token |")
    print("|---|---|---|---|")
    for title, error in errors.items():
        others = int((chosen[title] != usual).sum())
        print(f"| {title} | {error:.4f} | {100 * error / spread:.2f} % | {others} of {len(usual)} |")
    values = list(errors.values())
    good &= values[2] <= CHANCE * values[0] and values[3] <= CHANCE * values[1]
    print(f"\nGreedy text in bfloat16, packed and dense, up to {new_tokens} tokens:\n")
    return good & check_text(tokenizer, prompts, ours, theirs, exact, max(values[:2]))


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
    parser.add_argument("--no-native", action="store_true", help="torch's kernels, not those in C")
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
    if options.no_native:
        native.disable()
    sys.exit(0 if compare(options.checkpoint, options.new_tokens) else 1)


if __name__ == "__main__":
    main()
