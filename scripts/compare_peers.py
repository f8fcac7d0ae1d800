"""Other quantizers on one model, the same tokens and the same evaluation, as a Markdown table.

    python scripts/compare_peers.py MODEL --group-size 64 --calibration train.txt --text test.txt:16

Every peer gets an environment of its own under `--environments`, made at its first run from the
pinned list in `peer_runs.py`. `scripts/peers/*.py` run inside it, one process for each run: they read
MODEL and the calibration tokens (drawn once, by lowbit's own code) and leave the dequantized model as dense
bfloat16, which is compared with MODEL as `lowbit compare` does it. lowbit's own runs (`--only lowbit`)
are evaluated from their packed checkpoint. They take the same rows, but for the fifth that lowbit replaces
by its passages; `fast` reads those alone.

A CPU that emulates bfloat16 (lowbit then works in float32, and AutoRound does) hands every peer a float32
copy of MODEL: in bfloat16 a peer would spend its seconds on the emulation. A peer's scales are float32 then,
and counted as the 16 bits that they take in a checkpoint of MODEL itself.

CPU seconds run from reading the model to its quantized weights; a run on a model of one block comes
first, so that what a peer compiles once is not counted. Results are appended to `--results` as JSON
lines with their day and machine, and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from peer_runs import PEERS, RUNS, Run
from peer_table import between_markers, table

from lowbit.effort import EFFORTS

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


def environment(name: str, folder: Path) -> Path:
    """Python of a peer's environment, made at the first call."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        peer = PEERS[name]
        print(f"{name}: installing into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, TORCH, *peer.requirements], check=True)
        if peer.alone:
            subprocess.run([*install, "--no-deps", *peer.alone], check=True)
        done.touch()
    return python


def last_json(command: list[Any]) -> dict[str, Any]:
    """Run a command, its chatter to stderr, and read the JSON object that it prints last."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True)
    chatter, _, line = done.stdout.rstrip().rpartition("\n")
    print(chatter, file=sys.stderr)
    result: dict[str, Any] = json.loads(line)
    return result


def lowbit(*words: Any) -> dict[str, Any]:
    """Run one lowbit command and read what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", *map(str, words), "--json"], stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def save_tokens(options: argparse.Namespace, target: Path) -> None:
    """Draw the calibration tokens as `lowbit quantize --no-mix` does, int64 `[samples, seq_len]`."""
    from lowbit import hf
    from lowbit.batches import draw_rows

    asked = options.samples, options.seq_len, options.seed
    np.save(target, draw_rows(options.calibration, hf.load_tokenizer(options.model), *asked).numpy())


def working_dtype() -> str:
    """What lowbit works in on this machine's CPU, `bfloat16` or `float32`."""
    import torch

    from lowbit.hardware import find_dtype

    return str(find_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def settings_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What results are known by: these options, the texts by name (wherever they lie), and the precision."""
    return {name: getattr(options, name) for name in names} | {
        "calibration": Path(options.calibration).name,
        "text": [Path(text).name for text in options.text],
        "dtype": working_dtype(),
    }


def in_float32(model: Path, folder: Path) -> Path:
    """A copy of a model folder in `folder` whose weights are float32."""
    from safetensors.torch import load_file, save_file

    copy = folder / "float32"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {n: t.float() for file in model.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": "float32"}
    (copy / "config.json").write_text(json.dumps(config, indent=2))
    return copy


def save_tiny(tokenizer_of: Path, folder: Path) -> Path:
    """A random model of one block and a few tokens for it, to warm a peer up with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "tiny")
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copy(file, folder / "tiny")
    np.save(folder / "tiny.npy", np.random.default_rng(0).integers(3, 256, (8, 64)))
    return folder / "tiny"


def quantize(run: Run, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a peer; `folder / "made"` becomes its dequantized model."""
    home = (options.environments / run.peer).resolve()
    script = [environment(run.peer, home), HERE / "peers" / PEERS[run.peer].script]
    symmetry = "--symmetric" if run.symmetric else "--no-symmetric"
    method = ["--method", run.method, "--bits", run.bits, symmetry]
    group_size = run.group_size or options.group_size
    warmed = home / f".warm-{run.method}-{run.bits}"
    if not warmed.exists():
        tiny = save_tiny(Path(options.model), folder)
        small = ["--group-size", min(group_size, 64)]
        last_json([*script, tiny, folder / "warm", folder / "tiny.npy", *method, *small])
        warmed.touch()
    tokens = folder / "tokens.npy"
    save_tokens(options, tokens)
    model = Path(options.model)
    model = in_float32(model, folder) if working_dtype() == "float32" else model
    return last_json([*script, model, folder / "made", tokens, *method, "--group-size", group_size])


def scheme_asked(run: Run, group_size: int) -> list[Any]:
    """Options of `lowbit quantize`: an effort or a method with a scheme, or the bits to keep within."""
    if run.method.startswith("target-"):
        return ["--target-bpw", run.method.removeprefix("target-")]
    return [
        "--effort" if run.method in EFFORTS else "--method", run.method, "--bits", run.bits,
        "--group-size", group_size, "--symmetric" if run.symmetric else "--asymmetric",
    ]  # fmt: skip


def quantize_ours(run: Run, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """lowbit itself; `folder / "made"` is its packed checkpoint, or a link to where it is kept."""
    if options.keep:
        kept = options.keep.resolve() / f"{Path(options.model).name}-{run.name.removeprefix('lowbit-')}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        (folder / "made").symlink_to(kept)
    own_data = run.method in EFFORTS and EFFORTS[run.method].dataset is not None
    made = lowbit(
        "quantize", options.model, "--output", (folder / "made").resolve(), "--overwrite",
        *scheme_asked(run, options.group_size),
        *([] if own_data else ["--dataset", options.calibration, "--samples", options.samples]),
        "--seq-len", options.seq_len, "--seed", options.seed,
    )  # fmt: skip
    parts = [part for part in lowbit("inspect", (folder / "made").resolve())["parts"] if part["quantized"]]
    from lowbit import __version__

    return {
        "version": __version__, "cpu_seconds": made["cpu_seconds"], "seconds": made["seconds"]["all"],
        "peak_memory": made["peak_memory"],
        "bits_per_weight": 8 * sum(p["bytes"] for p in parts) / sum(p["weights"] for p in parts),
    }  # fmt: skip


@cache
def original(model: str, text: str, seq_len: int) -> tuple[Any, Any]:
    """Windows of `text` (`FILE:WINDOWS`), and the original's logits for them: it runs once."""
    import torch

    from lowbit import hf
    from lowbit.comparison import Original
    from lowbit.dataset import evaluation_windows, read_documents
    from lowbit.hardware import evaluation_dtype

    file, _, windows = text.rpartition(":")
    dtype = evaluation_dtype("auto", torch.device("cpu"))
    tokens = evaluation_windows(read_documents(file, "test"), hf.load_tokenizer(model), seq_len, int(windows))
    return tokens, Original(hf.load(model, packed=False, dtype=dtype), tokens, lambda *told: None)


def evaluate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `lowbit compare` finds for a checkpoint, text by text."""
    import torch

    from lowbit import hf
    from lowbit.evaluate import compare
    from lowbit.hardware import evaluation_dtype

    dtype = evaluation_dtype("auto", torch.device("cpu"))
    model, found = hf.load(folder, packed=False, dtype=dtype), {}
    for text in options.text:
        tokens, logits = original(options.model, text, options.eval_seq_len)
        found[Path(text.rpartition(":")[0]).stem] = compare(model, logits, tokens).to_dict()
    return found


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize once and evaluate on every text."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spent = (quantize_ours if run.peer == "lowbit" else quantize)(run, options, folder)
        found = evaluate(folder / "made", options)
    from lowbit.record import processor

    return {
        **spent, "group_size": run.group_size or options.group_size, "texts": found,
        "date": date.today().isoformat(), "processor": processor(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder; without it only the table is made")
    parser.add_argument("--calibration", help="calibration text, never the evaluation text")
    parser.add_argument("--text", nargs="+", help="evaluation texts, FILE:WINDOWS")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument(
        "--only", nargs="*", default=[], help="runs such as hqq-hqq-4-asymmetric, or their beginnings"
    )
    parser.add_argument("--environments", type=Path, default=Path("peer-environments"))
    parser.add_argument("--keep", type=Path, help="folder that keeps lowbit's own checkpoints")
    parser.add_argument("--results", type=Path, default=Path("compare_peers.jsonl"))
    parser.add_argument("--docs", type=Path, help="page that gets the table between its markers")
    options = parser.parse_args()
    if options.model and not (options.calibration and options.text):
        parser.error("a model needs --calibration and --text")
    text = options.results.read_text() if options.results.exists() else ""
    known = [json.loads(line) for line in text.splitlines()]
    settings = settings_of(options, "samples", "seq_len", "seed", "eval_seq_len") if options.model else {}
    failed = []
    for run in RUNS if options.model else []:
        key = {"model": Path(options.model).name, **run._asdict(), "settings": settings}
        key["group_size"] = run.group_size or options.group_size
        if options.only and not run.name.startswith(tuple(options.only)):
            continue
        if any(all(result.get(name) == value for name, value in key.items()) for result in known):
            continue
        print(f"{key['model']}: {run.name}", file=sys.stderr)
        try:
            result = key | measure(run, options)
        except subprocess.CalledProcessError as error:
            failed.append(f"{run.name}: {Path(error.cmd[1]).name} ended with {error.returncode}")
            continue
        known.append(result)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(table(known))
    if options.docs:
        options.docs.write_text(between_markers(options.docs.read_text(), table(known)))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
