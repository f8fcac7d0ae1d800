"""What large models would take on several GPUs: time, memory and traffic, counted from shapes.

    python scripts/scale_on_paper.py            # the tables of docs/SCALE.md; nothing is run
    python scripts/scale_on_paper.py --check    # the same count against a run of two ranks on this machine

Products, bytes held and bytes sent follow from the shapes and from what `lowbit quantize` does with a block.
How fast a GPU does that is assumed (`GPUS`, `ASSUMED`), and how far a real run stays behind the count is
measured on a CPU (`--check`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

OVERHEAD = 2.7
"""Seconds of a run over seconds of its products at the rate of a large product; see --check."""


@dataclass(frozen=True)
class Gpu:
    """A card, from its data sheet; rates are per second."""

    memory: float
    bf16: float
    float32: float
    link: float


GPUS = {
    "H100 SXM, 80 GB": Gpu(80e9, 989e12, 67e12, 450e9),
    "H200 SXM, 141 GB": Gpu(141e9, 989e12, 67e12, 450e9),
}
ASSUMED = {"products": 0.5, "links": 0.5, "column": 40e-6, "host": 25e9, "disk": 3e9}
"""Parts of the data sheet's rates that are reached; seconds per column of a sweep (some ten launches); bytes
per second from the host's memory to one card, and from the disk."""
MEASURED = {"kept": 0.5e9, "brought": 1.9e9}
"""Bytes per second: to the disk with their digest, and from one gloo rank to another; see --check."""


class Input(NamedTuple):
    """An input of a block and what reads it: `rows` in all; how many are alike; its part of the tokens."""

    rows: int
    width: int
    copies: int = 1
    share: float = 1.0
    writes: bool = False


@dataclass(frozen=True)
class Shape:
    """A model: its blocks by kind, and what lies around them."""

    name: str
    hidden: int
    vocabulary: int
    heads: int  # times the width of one: what attention multiplies for each pair of tokens
    blocks: dict[str, tuple[int, list[Input]]]

    def weights(self, inputs: list[Input]) -> int:
        return sum(i.rows * i.width * i.copies for i in inputs)

    def all_weights(self) -> int:
        return sum(count * self.weights(inputs) for count, inputs in self.blocks.values())


def llama(name: str, hidden: int, inner: int, kv: int, blocks: int, vocabulary: int) -> Shape:
    """A dense model with grouped-query attention."""
    inputs = [
        Input(hidden + 2 * kv, hidden), Input(hidden, hidden, writes=True),
        Input(2 * inner, hidden), Input(hidden, inner, writes=True),
    ]  # fmt: skip
    return Shape(name, hidden, vocabulary, 2 * hidden, {"dense": (blocks, inputs)})


def deepseek_v3() -> Shape:
    """Latent attention; three dense blocks, 58 with a shared expert and 256 of which a token asks 8."""
    hidden, heads = 7168, 128
    attention = [
        Input(1536 + 576, hidden), Input(heads * 192, 1536), Input(heads * 256, 512),
        Input(hidden, heads * 128, writes=True),
    ]  # fmt: skip
    dense = [*attention, Input(2 * 18432, hidden), Input(hidden, 18432, writes=True)]
    experts = [
        *attention, Input(2 * 2048, hidden), Input(hidden, 2048),
        Input(2 * 2048, hidden, 256, 8 / 256), Input(hidden, 2048, 256, 8 / 256),
    ]  # fmt: skip
    blocks = {"dense": (3, dense), "experts": (58, experts)}
    return Shape("DeepSeek-V3, 671B", hidden, 129280, heads * (192 + 128), blocks)


SHAPES = [llama("Llama, 70B", 8192, 28672, 1024, 80, 128256), deepseek_v3()]


class Count(NamedTuple):
    """Of one block, over all ranks: products (multiply and add are two), bytes of one rank, columns swept."""

    forward: float
    float32: float
    sweep: float
    columns: float
    held: float
    sent: float
    carried: float


def count(shape: Shape, inputs: list[Input], method: str, samples: int, length: int, ranks: int) -> Count:
    """What `method` does with a block of these inputs, and what the busiest rank holds and the ranks send."""
    tokens, corrected = samples * length, method == "qronos"
    active = sum(i.rows * i.width * i.copies * i.share for i in inputs)
    once = 2.0 * tokens * active + 2.0 * tokens * length * shape.heads
    # gptq: observed, then on; qronos: the same of the quantized model, and the original beside it
    forward = once * (3 if corrected and any(i.writes for i in inputs) else 2)
    writers = [i for i in inputs if i.writes and corrected]
    moments = sum(i.copies * i.share * i.width**2 for i in inputs) * tokens
    drifts = 2.0 * tokens * sum(i.rows * i.width for i in writers)
    cost = {i: float(i.width) ** 2 * (i.rows + i.width) for i in inputs}
    fair = sum(i.copies * cost[i] for i in inputs) / ranks
    # an input that every rank works on is factored by each; with qronos its turn comes alone
    again = {i: ranks if i.copies == 1 and (corrected or cost[i] > fair) else 1 for i in inputs}
    factors = sum(again[i] * i.copies * (1 + i.writes * corrected) * i.width**3 / 3 for i in inputs)
    rows = sum(i.copies * i.rows * i.width**2 for i in inputs)
    solves = 2.0 * sum(again[i] * i.rows * i.width**2 for i in writers)
    columns = sum(again[i] * i.copies * i.width for i in inputs) / ranks
    weights = shape.weights(inputs)
    totals = 4.0 * sum(i.copies * i.width**2 for i in inputs)
    drift_bytes = 4.0 * sum(i.rows * i.width for i in writers)
    carried = 2.0 * tokens * shape.hidden * (2 if corrected else 1)
    around = 2.0 * 2 * shape.vocabulary * shape.hidden
    held = around + 2.0 * weights * (2 if corrected else 1) + totals + drift_bytes + carried / ranks
    held += weights / ranks + 5 * 4.0 * max(i.rows * i.width for i in inputs)  # codes made; rows in float32
    groups = 1.0 + 3 / 128
    judged = 2.0 * min(tokens / 8, 4096) * sum(i.rows + i.width for i in writers)
    sent = ranks * (totals + drift_bytes) + weights * groups + judged + carried * (1 - 1 / ranks)
    return Count(forward, moments + drifts, factors + rows * 3 + solves, columns, held, sent, carried)


def seconds(found: Count, gpu: Gpu, ranks: int, weights: int) -> dict[str, float]:
    """Of one block, by what they go into; the slowest rank's."""
    rate = ASSUMED["products"]
    return {
        "reading": 2.0 * weights / ASSUMED["disk"] + 2.0 * weights / ASSUMED["host"],
        "forward": found.forward / ranks / (gpu.bf16 * rate),
        "moments": found.float32 / ranks / (gpu.float32 * rate),
        "rounding": found.sweep / ranks / (gpu.float32 * rate) + found.columns * ASSUMED["column"],
        "traffic": 2 * found.sent / ranks / (gpu.link * ASSUMED["links"]),
        "keeping": found.carried / MEASURED["kept"] + found.carried * (1 - 1 / ranks) / MEASURED["brought"],
    }


def paper(samples: int, length: int, ranks: int) -> None:
    """The tables."""
    print(f"{samples} x {length} tokens, {ranks} GPUs, products at {ASSUMED['products']:.0%} of the data "
          f"sheet, times {OVERHEAD} for what is not a product\n")  # fmt: skip
    print("| model | method | reading | forward | moments | rounding | traffic | keeping | all | one GPU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    card = next(iter(GPUS.values()))
    for shape in SHAPES:
        for method in ("gptq", "qronos"):
            many = _times(shape, method, samples, length, ranks, card)
            one = sum(_times(shape, method, samples, length, 1, card).values())
            cells = " | ".join(f"{value / 60:.1f} min" for value in many.values())
            print(f"| {shape.name} | {method} | {cells} | {sum(many.values()) / 3600:.2f} h "
                  f"| {one / 3600:.1f} h |")  # fmt: skip
    print("\n| model | method | block | weights | held by a rank | sent per block, all ranks | fits |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for method in ("gptq", "qronos"):
            for kind, (_, inputs) in shape.blocks.items():
                found = count(shape, inputs, method, samples, length, ranks)
                fits = [name.split()[0] for name, gpu in GPUS.items() if found.held < 0.95 * gpu.memory]
                print(f"| {shape.name} | {method} | {kind} | {shape.weights(inputs) / 1e9:.2f} B "
                      f"| {found.held / 1e9:.0f} GB | {found.sent / 1e9:.0f} GB "
                      f"| {', '.join(fits) or 'neither'} |")  # fmt: skip


def _times(shape: Shape, method: str, samples: int, length: int, ranks: int, gpu: Gpu) -> dict[str, float]:
    total: dict[str, float] = {}
    for blocks, inputs in shape.blocks.values():
        found = count(shape, inputs, method, samples, length, ranks)
        for name, value in seconds(found, gpu, ranks, shape.weights(inputs)).items():
            slower = OVERHEAD if name in ("forward", "moments", "rounding") else 1.0
            total[name] = total.get(name, 0.0) + blocks * value * slower
    return total


def rates(size: int = 2048, repeats: int = 5) -> tuple[float, float]:
    """Products per second of this machine with one thread: bfloat16 weights, and float32."""
    import time

    import torch

    torch.set_num_threads(1)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        a @ b
        started = time.process_time()
        for _ in range(repeats):
            a @ b
        found.append(2.0 * size**3 * repeats / (time.process_time() - started))
    return found[0], found[1]


def keeping(scratch: Path, size: int = 2**28) -> float:
    """Bytes per second that are written, digested and brought to the disk."""
    import time

    import torch

    from lowbit.durable import write_tensors

    tensor, started = torch.ones(size, dtype=torch.uint8), time.monotonic()
    write_tensors(scratch / "kept.safetensors", {"a": tensor})
    return size / (time.monotonic() - started)


def bringing(size: int = 2**27) -> float:
    """Bytes per second from one gloo rank to another of this machine."""
    code = f"""
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
tensor = torch.ones({size}, dtype=torch.uint8)
for _ in range(2):
    dist.barrier()
    started = time.monotonic()
    dist.send(tensor, 0) if dist.get_rank() else dist.recv(tensor, 1)
if dist.get_rank() == 0:
    print({size} / (time.monotonic() - started))
"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", code]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def check(scratch: Path, samples: int, length: int, blocks: int) -> None:
    """CPU seconds and bytes sent of two ranks, against the count."""
    from scale_report import SHAPES as MADE
    from scale_report import make_llama, make_text, quantize

    made = MADE["wide"]
    shape = llama("", made["hidden_size"], made["intermediate_size"], made["hidden_size"], blocks, 0)
    model, text = make_llama(scratch / "llama", "wide", blocks), make_text(scratch / "text.txt", 200_000)
    bf16, float32 = rates()
    print(f"one thread: {bf16 / 1e9:.0f} GFLOPS in bfloat16, {float32 / 1e9:.0f} in float32")
    print(
        f"kept on the disk: {keeping(scratch) / 1e9:.2f} GB/s; brought by gloo: {bringing() / 1e9:.2f} GB/s\n"
    )
    print("| method | CPU s | counted | ratio | sent per block | counted |\n|---|---|---|---|---|---|")
    for method in ("gptq", "qronos"):
        options = ["--samples", str(samples), "--seq-len", str(length), "--dataset", text, "--method", method]
        done = quantize(model, scratch / "out", *options, "--no-verify", ranks=2)
        found = count(shape, shape.blocks["dense"][1], method, samples, length, 2)
        wanted = blocks * (found.forward / bf16 + found.float32 / bf16 + found.sweep / float32)
        spent = sum(rank["seconds"] for rank in done["ranks"])
        sent = sum(rank["sent"] for rank in done["ranks"]) / blocks
        print(f"| {method} | {spent:.0f} | {wanted:.0f} | {spent / wanted:.2f} | {sent / 1e6:.0f} MB "
              f"| {found.sent / 1e6:.0f} MB |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run two ranks here and compare")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2, help="of the model that --check makes")
    arguments = parser.parse_args()
    if arguments.check:
        with tempfile.TemporaryDirectory() as scratch:
            check(Path(scratch), min(arguments.samples, 32), min(arguments.seq_len, 512), arguments.blocks)
        return
    paper(arguments.samples, arguments.seq_len, arguments.ranks)


if __name__ == "__main__":
    main()
