"""How rounding to one text's second moments fares on other texts, layer by layer: a Markdown table.

    python scripts/other_text.py MODEL --calibration train.txt --text test.txt other.txt code.py

Some blocks of the original model are run over every text. Their matrices are rounded by GPTQ with the
calibration text's second moments, under several `damp` and `trust` (`lowbit/algorithms/gptq.py`), and
the error of a layer's output, `tr(D H D^T)`, is taken with each text's own H. A figure is the geometric mean
over layers of that error beside round to nearest's. In the texts that judge, a row's first token and tokens
with activations ten times the usual are left out: they would outweigh all others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import QuantScheme
from lowbit.algorithms import gptq, rtn
from lowbit.moments import Moment

READERS = {  # what reads the same input, by the first that does
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
VARIANTS = [
    (0.03, 1.0), (0.1, 1.0), (0.3, 1.0), (1.0, 1.0),
    (0.03, 0.9), (0.03, 0.8), (0.1, 0.9), (0.1, 0.8), (0.1, 0.7), (0.1, 0.6),
]  # fmt: skip


class _Stop(Exception):
    """Raised behind the last block of interest."""


def usual(x: Tensor) -> Tensor:
    """`x [tokens, in]` without its first token and without those that are huge."""
    size = x.float().norm(dim=1)
    keep = size < 10 * size.median()
    keep[0] = False
    return x[keep]


@torch.no_grad()
def moments(model: nn.Module, rows: Tensor, layers: dict[str, nn.Module], judge: bool) -> dict[str, Tensor]:
    """The second moment of every layer's input over `rows [rows, length]` of token ids."""
    found = {name: Moment(layer.in_features, torch.device("cpu")) for name, layer in layers.items()}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_pre_hook(
            lambda _, args: found[name].add(usual(args[0][0]) if judge else args[0])
        )

    hooks = [watch(name, layer) for name, layer in layers.items()]
    for row in rows:
        with suppress(_Stop):
            model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: moment.mean() for name, moment in found.items()}


def read_rows(model: str, text: str, count: int, length: int) -> Tensor:
    """Some rows of a text, spread over it evenly, int64 `[count, length]`."""
    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[:: max(1, len(rows) // count)][:count]


def lost(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T)`, D what rounding changes."""
    change = rounded - weight
    return float((change @ hessian).mul_(change).sum())


def compare(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the table."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    blocks = model.get_submodule("model.layers")
    layers = {
        f"{block}.{name}": blocks[block].get_submodule(name) for block in options.blocks for name in READERS
    }

    def stop(*_: object) -> None:
        raise _Stop

    blocks[max(options.blocks)].register_forward_hook(stop)
    texts = [options.calibration, *options.text]
    seen = [
        moments(model, read_rows(options.model, text, count, options.seq_len), layers, judge=number > 0)
        for number, text in enumerate(texts)
        for count in [options.rows if number else options.samples]
    ]
    scheme = QuantScheme(options.bits, options.group_size, not options.asymmetric)
    logs = {variant: [0.0] * len(texts) for variant in VARIANTS}
    for name in layers:
        block, _, first = name.partition(".")
        weight = torch.cat([blocks[int(block)].get_submodule(each).weight for each in READERS[first]])
        weight = weight.detach().float()[:: max(1, len(weight) // options.outputs)]
        nearest = rtn.quantize_weight(weight, None, scheme, torch.bfloat16)[0].dequantize()
        for damp, trust in VARIANTS:
            made, _ = gptq.quantize_weight(
                weight, seen[0][name], scheme, torch.bfloat16, damp=damp, trust=trust
            )
            rounded = made.dequantize()
            for number, hessians in enumerate(seen):
                ratio = lost(weight, rounded, hessians[name]) / lost(weight, nearest, hessians[name])
                logs[damp, trust][number] += math.log(ratio) / len(layers)
    yield f"| damp | trust | {' | '.join(Path(text).stem for text in texts)} |"
    yield "|---" * (2 + len(texts)) + "|"
    for (damp, trust), values in logs.items():
        yield f"| {damp:g} | {trust:g} | {' | '.join(f'{math.exp(value):.3f}' for value in values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a model built like Llama")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--text", nargs="+", required=True, help="texts that judge")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows")
    parser.add_argument("--rows", type=int, default=16, help="rows of a text that judges")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=512, help="rows of a weight that are rounded")
    for line in compare(parser.parse_args()):
        print(line)


if __name__ == "__main__":
    main()
