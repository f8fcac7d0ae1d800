"""How the gradient at a layer's output depends on a token's place in its row: a Markdown table.

    python scripts/token_places.py MODEL --calibration train.txt

The log-likelihood of tokens drawn from the model itself is differentiated: the second moment of the gradient
at the output of a matrix says what an error there costs the divergence (the Fisher information; Martens
2014, arXiv:1412.1193, section 9). A figure is its mean over rows for the tokens of some places, beside the
mean over all but the first (no token counting for more than ten); the share of the first is of all tokens;
both are medians over blocks. `lowbit/reach.py` weighs the tokens of q/k/v by what this shows.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import hf
from lowbit.batches import draw_rows

MATRICES = {
    "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "q, k and v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",), "gate and up": ("gate_proj", "up_proj"), "down": ("down_proj",),
}  # fmt: skip
PLACES = (1, 2, 5, 11, 51, 201, 401)
MOST = 10.0


def squares(model: Any, rows: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Squared norm of the gradient at the output of every linear layer, float32 `[rows, length]` by name."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def keep(_: nn.Module, inside: Any, outside: tuple[Tensor, ...]) -> None:
            found.setdefault(name, []).append(outside[0][0].detach().float().square().sum(-1))

        module.register_full_backward_hook(keep)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            watch(name, module)
    random = torch.Generator().manual_seed(seed)
    for row in rows:
        read = model.get_input_embeddings()(row[None]).detach().requires_grad_()
        logits = model(inputs_embeds=read).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: torch.stack(parts) for name, parts in found.items()}


def by_place(block: Tensor, edges: tuple[int, ...]) -> list[float]:
    """Share of the first token of `block [rows, length]`, then the means between `edges`."""
    rest = block[:, 1:]
    rest = (rest / rest.mean()).clamp(max=MOST)
    rest = rest / rest.mean()
    means = [float(rest[:, a - 1 : b - 1].mean()) for a, b in pairwise(edges)]
    return [float(block[:, 0].sum() / block.sum()), *means]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a model built like Llama")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    model: Any = hf.load(options.model, packed=False, dtype=torch.float32)
    model.requires_grad_(False)
    tokenizer = hf.load_tokenizer(options.model)
    rows = draw_rows(options.calibration, tokenizer, options.samples, options.seq_len, 0)
    found = squares(model, rows)
    edges = (*(place for place in PLACES if place < options.seq_len), options.seq_len)
    heads = [f"{a + 1} to {b}" for a, b in pairwise(edges)]
    print(f"| matrices | share of the first | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 2)}")
    for title, names in MATRICES.items():
        blocks: dict[str, Tensor] = {}
        for name, part in found.items():
            path, _, last = name.rpartition(".")
            if last in names:
                blocks[path] = blocks.get(path, torch.zeros(())) + part
        median = torch.tensor([by_place(block, edges) for block in blocks.values()]).median(0).values
        print(f"| {title} | {median[0]:.3f} | {' | '.join(f'{float(m):.2f}' for m in median[1:])} |")


if __name__ == "__main__":
    main()
