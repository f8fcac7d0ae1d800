"""A quantized checkpoint made better: the same codes, with scales and norms trained end to end.

Folder in, folder out, so it stands behind any method and any tool: the checkpoint may be ours or a
stranger's. The original is run once for what its output head reads, and let go; then `distill` trains;
then the checkpoint is written again, tensor by tensor in the order of the file, and nothing but scales
and norms differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import formats, hf
from lowbit.blocks import fingerprint
from lowbit.checkpoint import CheckpointWriter
from lowbit.distill import LATENT_RATE, TOKENS_PER_STEP, Distilled, distill
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.judge import head_inputs, next_tokens
from lowbit.progress import Progress, silent
from lowbit.quantized import QuantizedWeight


@dataclass(frozen=True)
class Refined:
    """What `refine` did.

    Attributes:
        before: Loss on rows that were not trained on, nats per token: KL, or cross-entropy.
        after: The same at the end.
        held_out: How many rows those are.
        steps: Steps of the optimizer.
        dtype: Precision of activations and their gradients.
        kept: False where nothing was gained and the checkpoint was left as it was.
        fingerprints: Digest of every weight that changed, by module name.
    """

    before: float
    after: float
    held_out: int
    steps: int
    dtype: torch.dtype
    kept: bool
    fingerprints: dict[str, bytes]


def refine(
    folder: Path,
    original: Path,
    output: Path,
    tokens: Tensor,
    *,
    epochs: float = 1.0,
    weights_too: bool = False,
    loss: str = "original",
    tokens_per_step: int = TOKENS_PER_STEP,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int = 5 * 10**9,
    device: torch.device | None = None,
    progress: Progress | None = None,
    resume_from: Mapping[str, Tensor] | None = None,
    keep: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> Refined:
    """Train the scales and norms of a quantized checkpoint towards the original model.

    Args:
        folder: The quantized checkpoint.
        original: The model it was made from.
        output: Folder to create; not created where training gained nothing.
        tokens: Calibration rows, int64 `[rows, length]`.
        epochs: How often each row is seen.
        weights_too: Train the codes, too (`latent.py`).
        loss: `original`: KL from the original. `data`: cross-entropy of the rows themselves.
        tokens_per_step: Tokens between two steps of the optimizer.
        dtype: Precision of activations and their gradients; what is trained is float32. For float16, in which
            gradients of single tokens vanish, bfloat16 is taken.
        max_shard_size: Bytes of a shard.
        device: Where to train.
        progress: Told about every row and step.
        resume_from: What an interrupted run handed to `keep`; empty or None starts anew.
        keep: Given now and then what is needed to go on from there.

    Raises:
        LowbitError: `folder` is not quantized in a format that lowbit reads, or can't be trained.
    """
    told = progress or silent
    quantization, fmt = hf.quantization_of(folder)
    if fmt is None:
        raise LowbitError(f"{folder} is not quantized in a format that lowbit reads: quantize it first")
    where = device or torch.device("cpu")
    learned, dtype = loss == "data", torch.bfloat16 if dtype == torch.float16 else dtype
    targets = list(next_tokens(tokens)) if learned else _targets(original, tokens, dtype, where, told)
    weights = _weights(folder, fmt, quantization)
    model = hf.load(folder, packed=False, dtype=dtype, device=where)
    done = distill(
        model, weights, tokens, targets, epochs=epochs, latent_rate=LATENT_RATE if weights_too else None,
        tokens_per_step=tokens_per_step,
        progress=lambda step, steps, mean: told(
            "train", step, steps, f"{'cross-entropy' if learned else 'KL'} {mean:.4f}"
        ),
        resume_from=resume_from, keep=keep,
    )  # fmt: skip
    prefix = f"{model.base_model_prefix}."
    del model
    kept = done.after < done.before
    if kept:
        _write(folder, output, fmt, done, prefix, max_shard_size)
    changed = {name: fingerprint(weight.dequantize()) for name, weight in done.weights.items()}
    return Refined(done.before, done.after, done.held_out, done.steps, dtype, kept, changed if kept else {})


def _targets(
    original: Path, tokens: Tensor, dtype: torch.dtype, device: torch.device, told: Progress
) -> list[Tensor]:
    """What the original's head reads for every row; the original itself is let go."""
    model = hf.load_stock(original, dtype, device)
    targets = []
    for number, found in enumerate(head_inputs(model, tokens.split(1))):
        targets.append(found[0].cpu())
        told("teach", number + 1, len(tokens), "running the original")
    return targets


def _weights(folder: Path, fmt: Format, quantization: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """Packed layers whose groups are runs of columns; the others are not trained."""
    found = {}
    for module, tensors in hf.layers(folder, fmt):
        if not isinstance(tensors, Tensor):
            scheme = fmt.read_config(quantization, module)
            weight, order = formats.read(fmt, tensors, scheme, quantization)
            if order is None:
                found[module] = weight
    return found


def _write(
    folder: Path, output: Path, fmt: Format, done: Distilled, prefix: str, max_shard_size: int
) -> None:
    """Files of a base model leave out `prefix`, which a causal model's parameters begin with."""
    writer, norms = CheckpointWriter(output, max_shard_size), dict(done.norms)
    for name, tensors in hf.layers(folder, fmt):
        if isinstance(tensors, Tensor):
            norm = norms.pop(name, None)
            norm = norms.pop(prefix + name, None) if norm is None else norm
            writer.add(name, tensors if norm is None else norm.to(tensors.dtype))
            continue
        packed = fmt.pack(done.weights[name]) if name in done.weights else {}
        for suffix, tensor in tensors.items():
            writer.add(f"{name}.{suffix}", packed.get(suffix, tensor))
    if norms:
        raise LowbitError(f"{folder} has no tensor for {next(iter(norms))}, which was trained")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    skip = {"config.json", "model.safetensors.index.json"}
    others = [f for f in sorted(folder.iterdir()) if f.suffix != ".safetensors" and f.name not in skip]
    writer.finish(config, others)
