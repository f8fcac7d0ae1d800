"""Where the seconds of a run go, and how far each part is from what its products alone would take.

    python scripts/profile_run.py MODEL --calibration train.txt --method gptq

The run is watched from a second thread, fifty times a second: the innermost of lowbit's files on the stack
says what it is at. The floor of a part is the number of its products (`scale_on_paper.py` counts them from
the shapes) over the rate that this machine reaches in one large product of the kind. Parts without products
have no floor. One thread; the model must be built like Llama.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from scale_on_paper import Shape, count, llama, rates
from transformers import AutoConfig

import lowbit
from lowbit import QuantScheme
from lowbit.hardware import bfloat16_products, find_dtype

PARTS = {
    "forward": ("stream.py",),
    "moments": ("moments.py",),
    "rounding": ("rounding.py", "gptq.py", "descent.py", "grid.py", "qronos.py", "rtn.py", "awq.py"),
    "keeping": ("durable.py", "work.py", "carried.py"),
    "writing": ("shard.py", "checkpoint.py", "packing.py", "compressed_tensors.py", "blocks.py"),
    "reading": ("source.py", "dataset.py"),
    "reading back": ("verify.py", "readback.py"),
}
PART_OF = {file: part for part, files in PARTS.items() for file in files}
EVERY = 0.02


def part_of(frame: FrameType | None) -> str:
    """What the innermost file of lowbit on a stack is there for."""
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/")
        if "lowbit" in folder and file in PART_OF:
            return PART_OF[file]
        frame = frame.f_back
    return "the rest"


def watch(thread: int, done: threading.Event, found: Counter[str]) -> None:
    """Count what `thread` is at, until `done`."""
    while not done.wait(EVERY):
        found[part_of(sys._current_frames().get(thread))] += 1


def shape_of(model: str) -> Shape:
    """The shape that a folder's configuration gives."""
    config = AutoConfig.from_pretrained(model)
    heads = config.num_attention_heads
    kv = config.hidden_size // heads * config.num_key_value_heads
    return llama(
        Path(model).name, config.hidden_size, config.intermediate_size, kv, config.num_hidden_layers,
        config.vocab_size,
    )  # fmt: skip


def rate_of_moments(width: int, tokens: int = 4096) -> float:
    """Products per second of float32 matrices that hold bfloat16 numbers."""
    x = torch.randn(tokens, width).bfloat16().float()
    total, step = torch.zeros(1024, width), x[:, :1024]
    with bfloat16_products():
        total[: step.shape[1]].addmm_(step.T, x)
        started = time.process_time()
        for _ in range(3):
            total[: step.shape[1]].addmm_(step.T, x)
    return 3 * 2.0 * step.shape[1] * tokens * width / (time.process_time() - started)


def floors(shape: Shape, method: str, samples: int, length: int) -> dict[str, float]:
    """Seconds that the products of a part would take at this machine's rates."""
    (blocks, inputs), (bf16, float32) = shape.blocks["dense"], rates()
    dtype = find_dtype("auto", torch.device("cpu"))  # what the model runs in
    once = count(shape, inputs, method, samples, length, 1)
    moments = rate_of_moments(max(one.width for one in inputs))
    print(f"one thread: {bf16 / 1e9:.0f} GFLOPS in bfloat16, {float32 / 1e9:.0f} in float32, "
          f"{moments / 1e9:.0f} in float32 of bfloat16 numbers; the model runs in {dtype}\n")  # fmt: skip
    return {
        "forward": blocks * once.forward / (bf16 if dtype == torch.bfloat16 else float32),
        "moments": blocks * once.float32 / moments,
        "rounding": blocks * once.sweep / float32,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--method", default="qronos")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--output", type=Path, help="keep the checkpoint there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    least = floors(shape_of(options.model), options.method, options.samples, options.seq_len)
    done, found = threading.Event(), Counter[str]()
    watcher = threading.Thread(target=watch, args=(threading.get_ident(), done, found), daemon=True)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch, "out")
        watcher.start()
        started = time.process_time()
        lowbit.quantize(
            options.model, QuantScheme(options.bits, options.group_size), output=output,
            method=options.method, dataset=options.calibration, samples=options.samples,
            seq_len=options.seq_len,
        )  # fmt: skip
        spent = time.process_time() - started
        done.set()
        watcher.join()
    print(f"{Path(options.model).name}, {options.method}, {options.samples} x {options.seq_len} tokens\n")
    print("| part | CPU s | of all | floor, s | times the floor |\n|---|---|---|---|---|")
    for part in [*PARTS, "the rest"]:
        own = spent * found[part] / found.total()
        ends = f"{least[part]:.0f} | {own / least[part]:.1f}" if part in least else "|"
        print(f"| {part} | {own:.0f} | {own / spent:.0%} | {ends} |")
    print(f"| all | {spent:.0f} | 100% | {sum(least.values()):.0f} | {spent / sum(least.values()):.1f} |")


if __name__ == "__main__":
    main()
