"""Which tokens an expert is to be calibrated on, measured on a small mixture: a Markdown table.

    python scripts/expert_tokens.py --training code.txt --calibration valid.txt --text test.txt

No mixture of experts is small enough to come with a test, and random routers say nothing, so one is trained
first (`--kept` keeps it). Then every expert of every layer is rounded by GPTQ with second moments from

- its own tokens: those that the router sends it, what `lowbit quantize` does;
- its own, more of them: text is read on until every expert has as many as it would have with equal shares;
- all tokens: the expert runs on what it would never be given (llm-compressor's `moe_calibrate_all_experts`);
- both: its own moment, and all tokens' at the weight of 32, 128 or 512 of its own;
- its own, weighted: a token counts by the square of the share that the router gives the expert.

A figure is what rounding changes in the experts' output on a text that judges, on its own routes and with the
router's shares, beside the same for round to nearest.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lowbit import QuantScheme
from lowbit.algorithms import gptq, rtn

VOCABULARY = 256  # bytes
LENGTH = 256
MIXED = (32, 128, 512)  # tokens of its own that all others count for

Errors = Counter[tuple[str, str, str]]


def rows_of(text: str, count: int | None = None) -> Tensor:
    """Bytes of a text, int64 `[rows, LENGTH]`, spread over it evenly."""
    ids = torch.tensor(list(Path(text).read_bytes()))
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows if count is None else rows[:: max(1, len(rows) // count)][:count]


def train(options: argparse.Namespace) -> Any:
    """A mixture of `--experts`, two for a token, trained on the bytes of `--training`."""
    if options.kept and options.kept.exists():
        return Qwen3MoeForCausalLM.from_pretrained(options.kept, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, moe_intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        num_experts=options.experts, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=LENGTH, output_router_logits=True, router_aux_loss_coef=0.002,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config).float().train()
    rows = torch.cat([rows_of(text) for text in options.training])
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, options.steps)
    for step in range(options.steps):
        batch = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
        adam.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: {float(loss.detach()):.3f}", flush=True)
    if options.kept:
        model.save_pretrained(options.kept)
    return model.eval()


class Seen:
    """What the experts of one layer would read: hidden states, and who is sent where.

    Attributes:
        x: float32 `[tokens, hidden]`.
        experts: int64 `[tokens, 2]`.
        shares: float32 `[tokens, 2]`, the router's weights.
    """

    def __init__(self, x: Tensor, experts: Tensor, shares: Tensor) -> None:
        self.x, self.experts, self.shares = x, experts, shares

    def first(self, tokens: int) -> Seen:
        """The same of the first tokens."""
        return Seen(self.x[:tokens], self.experts[:tokens], self.shares[:tokens])

    def of(self, expert: int, most: int | None = None) -> tuple[Tensor, Tensor]:
        """What an expert reads, and its shares; no more than the first `most` tokens."""
        token, place = torch.where(self.experts == expert)
        token, place = token[:most], place[:most]
        return self.x[token], self.shares[token, place]


@torch.no_grad()
def look(model: Any, rows: Tensor) -> list[Seen]:
    """Run rows through the model, and keep what every layer's experts are given."""
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in model.model.layers]

    def watch(number: int, module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        _, shares, experts = module.gate(x)
        found[number].append((x, experts, shares))

    hooks = [
        layer.mlp.register_forward_pre_hook(partial(watch, number))
        for number, layer in enumerate(model.model.layers)
    ]
    for row in rows.split(8):
        model(input_ids=row, output_router_logits=False)
    for hook in hooks:
        hook.remove()
    return [Seen(*(torch.cat(part) for part in zip(*layer, strict=True))) for layer in found]


def moment(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of `x x^T` over tokens `x [tokens, in]`, weighted if asked."""
    counted = x if weight is None else x * weight[:, None]
    total = x.new_tensor(len(x)) if weight is None else weight.square().sum()
    return counted.T @ counted / total.clamp(min=1e-9)


def inside(x: Tensor, gate_up: Tensor) -> Tensor:
    """What an expert's second matrix reads."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def policies(seen: Seen, tokens: int) -> dict[str, Callable[[int, Callable[[Tensor], Tensor]], Tensor]]:
    """By name: the moment of what an expert reads, as `reads` sees it (itself, or `inside`)."""
    few = seen.first(tokens)
    equal = max(1, tokens * seen.experts.shape[1] // (1 + int(seen.experts.max())))

    def own(expert: int, reads: Callable[[Tensor], Tensor]) -> Tensor:
        return moment(reads(few.of(expert)[0]))

    def more(expert: int, reads: Callable[[Tensor], Tensor]) -> Tensor:
        here = few.of(expert)[0]
        return moment(reads(here if len(here) >= equal else seen.of(expert, equal)[0]))

    def everything(expert: int, reads: Callable[[Tensor], Tensor]) -> Tensor:
        return moment(reads(few.x))

    def mixed(expert: int, reads: Callable[[Tensor], Tensor], others: float) -> Tensor:
        here = len(few.of(expert)[0])
        return (here * own(expert, reads) + others * everything(expert, reads)) / (here + others)

    def weighted(expert: int, reads: Callable[[Tensor], Tensor]) -> Tensor:
        x, share = few.of(expert)
        return moment(reads(x), share)

    both = {f"both, {others}": partial(mixed, others=others) for others in MIXED}
    return {"own": own, "own, more": more, "all": everything, "own, weighted": weighted, **both}


def errors(layer: Any, seen: Seen, judges: Mapping[str, Seen], tokens: int, scheme: QuantScheme) -> Errors:
    """What rounding changes in the outputs of a layer's experts, by text, matrix and policy."""
    found: Errors = Counter()
    experts = layer.mlp.experts
    for number in range(experts.num_experts):
        gate_up = experts.gate_up_proj[number].detach()
        for matrix, weight, reads in (
            ("gate_up", gate_up, lambda x: x),
            ("down", experts.down_proj[number].detach(), partial(inside, gate_up=gate_up)),
        ):
            made = {"rtn": rtn.quantize_weight(weight, None, scheme, torch.bfloat16)[0]}
            for name, policy in policies(seen, tokens).items():
                hessian = policy(number, reads)
                made[name] = gptq.quantize_weight(weight, hessian, scheme, torch.bfloat16)[0]
            for text, judge in judges.items():
                x, share = judge.of(number)
                true = reads(x) * share[:, None]
                for name, rounded in made.items():
                    lost = float((true @ (rounded.dequantize() - weight).T).square().sum())
                    found[text, matrix, name] += lost
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--training", nargs="+", required=True, help="texts to train the mixture on")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True, help="texts that judge")
    parser.add_argument("--kept", type=Path, help="folder of the trained mixture")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    options = parser.parse_args()
    model, scheme = train(options), QuantScheme(options.bits, options.group_size)
    seen = look(model, rows_of(options.calibration, 8 * max(options.tokens) // LENGTH))
    for each in seen:  # rows in another order than the text's, or few tokens would be of one place
        order = torch.randperm(len(each.x) // LENGTH, generator=torch.Generator().manual_seed(0))
        for name in ("x", "experts", "shares"):
            part = getattr(each, name)
            setattr(each, name, part.view(-1, LENGTH, part.shape[-1])[order].flatten(0, 1))
    judges = {text: look(model, rows_of(text, 64)) for text in options.text}
    names = list(policies(seen[0], 1))
    print(f"| tokens | of an expert | matrix | text | {' | '.join(names)} |\n|{'---|' * (4 + len(names))}")
    for tokens in options.tokens:
        counts = torch.cat(
            [torch.bincount(each.first(tokens).experts.flatten(), minlength=options.experts) for each in seen]
        )
        total: Errors = Counter()
        for number, (layer, there) in enumerate(zip(model.model.layers, seen, strict=True)):
            here = {text: judge[number] for text, judge in judges.items()}
            total += errors(layer, there, here, tokens, scheme)
        for matrix in ("gate_up", "down"):
            for text in options.text:
                nearest = total[text, matrix, "rtn"]
                cells = " | ".join(f"{total[text, matrix, name] / nearest:.3f}" for name in names)
                sides = f"{int(counts.min())} to {int(counts.max())}"
                print(f"| {tokens} | {sides} | {matrix} | {Path(text).stem} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
