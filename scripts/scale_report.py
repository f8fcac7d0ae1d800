"""How much memory quantizing takes, and how it grows: synthetic llamas of 4 and 64 blocks, and real models.

    python scripts/scale_report.py                        # blocks alone: half a minute on a free core
    python scripts/scale_report.py --model MODEL --calibration train.txt --max-memory 1.2GB
    python scripts/scale_report.py --shape 7b --max-memory 6GB --full-blocks 2
    python scripts/scale_report.py --shape wide --blocks 6 --samples 32 --ranks 1 2

Each run is a process of its own (`lowbit quantize --json`), whose peak resident size the system reports.
The imports' own, which no plan can change, is measured in one more process and shown beside it. Weights
of synthetic models are random, and written tensor by tensor: a model larger than memory can be made.
`--full-blocks` calibrates one block and then that many (two or more) and passes over the rest, and rounds
all of them to nearest in a run of its own; the time of calibrating all is extrapolated from the first two.
`--ranks` quantizes one model with so many processes, one thread each, in turn: how long the blocks took,
what CPU time that was on each rank, and what was sent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lowbit.checkpoint import CheckpointWriter

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 4096},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 4096},
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "num_hidden_layers": 32,
    },
}
HEADER = """| model | method | calibration | peak GB | over imports | seconds | CPU s |
|---|---|---|---|---|---|---|"""
RANKS_HEADER = """| model | method | ranks | seconds | of the first | CPU s by rank | MB sent per block |
|---|---|---|---|---|---|---|"""
IMPORTS = """
import datasets, compressed_tensors, lowbit.pipeline
from lowbit.hardware import peak_memory
print(peak_memory())
"""


def make_llama(folder: Path, shape: str, blocks: int | None = None) -> Path:
    """A random llama of a shape, written tensor by tensor, with a tokenizer of words."""
    sizes = SHAPES[shape] | ({} if blocks is None else {"num_hidden_layers": blocks})
    config = LlamaConfig(**sizes, tie_word_embeddings=False, max_position_embeddings=2048, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    writer = CheckpointWriter(folder, 2 * 10**9)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            tensor = torch.ones(parameter.shape)
        else:
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
            tensor.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        writer.add(name, tensor.to(torch.bfloat16))
    writer.finish(config.to_dict(), [])
    _make_tokenizer(folder)
    return folder


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(4000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
    fast.save_pretrained(folder)


def make_text(path: Path, words: int = 40_000) -> str:
    """Random words of that tokenizer."""
    drawn = torch.randint(2, 4000, (words,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(f"w{i}" for i in drawn), encoding="utf-8")
    return str(path)


def imports() -> int:
    """Peak resident bytes of a process that only imports what a run needs."""
    return int(subprocess.run([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, check=True).stdout)


def quantize(model: Path, output: Path, *options: str, ranks: int = 1) -> dict[str, Any]:
    """One run, of several processes where asked; `peak_memory` in its result is that of the first of them."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "lowbit", "quantize", str(model), "--output", str(output)]
    command += ["--json", "--overwrite", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def row(name: str, found: dict[str, Any], base: int) -> str:
    """One line of the table."""
    peak = found["peak_memory"]
    return (
        f"| {name} | {found['method']} | {found['calibration'].rpartition('/')[2]} | {peak / 1e9:.2f} "
        f"| {(peak - base) / 1e9:.2f} | {found['seconds']['all']:.0f} | {found['cpu_seconds']:.0f} |"
    )


def _options(arguments: argparse.Namespace, text: str) -> list[str]:
    size = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len), "--dataset", text]
    limit = ["--max-memory", arguments.max_memory] if arguments.max_memory else []
    return [*size, "--method", arguments.method, *limit]


def _blocks(arguments: argparse.Namespace, scratch: Path, base: int) -> None:
    """Peaks of the same llama with few and with many blocks."""
    text, peaks = make_text(scratch / "text.txt"), []
    for blocks in arguments.blocks:
        folder = make_llama(scratch / f"llama-{blocks}", arguments.shape, blocks)
        found = quantize(folder, scratch / "out", *_options(arguments, text))
        print(row(f"{arguments.shape} llama, {blocks} blocks", found, base), flush=True)
        peaks.append(found["peak_memory"])
    if len(peaks) > 1:
        print(f"\n{arguments.blocks[-1]} blocks take {peaks[-1] / peaks[0] - 1:+.1%} of the memory of "
              f"{arguments.blocks[0]}")  # fmt: skip


def _large(arguments: argparse.Namespace, scratch: Path, base: int) -> None:
    """A shape at its full depth, of which a few blocks are calibrated and the others rounded."""
    text = make_text(scratch / "text.txt")
    folder = make_llama(scratch / "llama", arguments.shape)
    blocks, full = SHAPES[arguments.shape]["num_hidden_layers"], arguments.full_blocks
    taken = []
    for some in (1, full):
        rest = [f"model.layers.{number}.*" for number in range(some, blocks)]
        skips = [part for pattern in rest for part in ("--skip", pattern)]
        found = quantize(folder, scratch / "out", *_options(arguments, text), *skips)
        print(row(f"{arguments.shape} llama, {some} of {blocks} blocks", found, base), flush=True)
        taken.append(found["seconds"]["quantization"])
    rounded = quantize(folder, scratch / "out", "--method", "rtn", *_limit(arguments))
    print(row(f"{arguments.shape} llama, all blocks", rounded, base), flush=True)
    more = (taken[1] - taken[0]) / (full - 1)  # than carrying the activations over a block
    carried = (taken[0] - more) / blocks
    print(f"\n{carried + more:.0f} s for a calibrated block, {carried:.0f} s for one that is passed over: "
          f"{(taken[0] + (blocks - 1) * more) / 3600:.1f} h for all {blocks}")  # fmt: skip


def _ranks(arguments: argparse.Namespace, scratch: Path) -> None:
    """The same run by one process and by several, one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    text, blocks = make_text(scratch / "text.txt"), arguments.blocks[0]
    folder = make_llama(scratch / "llama", arguments.shape, blocks)
    print(RANKS_HEADER)
    first = 0.0
    for count in arguments.ranks:
        found = quantize(folder, scratch / "out", *_options(arguments, text), ranks=count)
        taken = found["seconds"]["quantization"]
        first = first or taken
        by_rank = [rank["seconds"] for rank in found["ranks"]] or [found["cpu_seconds"]]
        sent = sum(rank["sent"] for rank in found["ranks"]) / blocks
        cpu = " + ".join(f"{value:.0f}" for value in by_rank)
        print(f"| {arguments.shape} llama, {blocks} blocks | {found['method']} | {count} | {taken:.1f} "
              f"| {taken / first:.2f} | {cpu} | {sent / 1e6:.0f} |", flush=True)  # fmt: skip


def _limit(arguments: argparse.Namespace) -> list[str]:
    return ["--max-memory", arguments.max_memory] if arguments.max_memory else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a real model, in place of synthetic ones")
    parser.add_argument("--calibration", help="its calibration text")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-memory")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--full-blocks", type=int, help="calibrate so many blocks of the shape's own depth")
    parser.add_argument("--ranks", type=int, nargs="+", help="so many processes, in turn")
    parser.add_argument("--scratch", help="folder for the models that are made; the system's, by default")
    arguments = parser.parse_args()
    if arguments.full_blocks is not None and arguments.full_blocks < 2:
        parser.error(f"--full-blocks {arguments.full_blocks}: one block is compared with more, use 2 or more")
    base = 0 if arguments.ranks else imports()
    if not arguments.ranks:
        print(f"imports alone: {base / 1e9:.2f} GB\n")
        print(HEADER)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        if arguments.ranks:
            _ranks(arguments, Path(scratch))
        elif arguments.model:
            model, options = Path(arguments.model), _options(arguments, arguments.calibration)
            found = quantize(model, Path(scratch, "out"), *options)
            print(row(model.name, found, base))
        elif arguments.full_blocks:
            _large(arguments, Path(scratch), base)
        else:
            _blocks(arguments, Path(scratch), base)


if __name__ == "__main__":
    main()
