"""End to end: train scales and norms until the model predicts what the original predicts.

Layer-wise methods keep every layer close to the original and hope that the model follows. Here the
model itself is the judge: the loss is the mean over tokens of `KL(original || quantized)` of the next
token, over the whole vocabulary. Trained are a gain per group of weights (`trainable.py`) and the
weights of the norms, all of which the file holds anyway: the same codes, the same size, the same
kernels. The idea is distillation (Hinton et al. 2015, arXiv:1503.02531, with temperature 1) restricted
to the scales, as in the second phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062, section 3.3).

Of the original only the inputs of its output head are kept (`[tokens, hidden]`), so it is not in
memory while the other is trained, and its distribution is still exact. Blocks are checkpointed: of a
step, one tensor per block and the inside of one block are in memory. A few calibration rows are never
trained on; if the loss on them does not fall, what was learned is thrown away, and said so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowbit import topology
from lowbit.errors import LowbitError
from lowbit.judge import Judge
from lowbit.latent import LatentLinear
from lowbit.quantized import QuantizedWeight
from lowbit.trainable import TrainableLinear
from lowbit.training import Norms, Training

TOKENS_PER_STEP = 2048
HELD_OUT = 16  # one calibration row in so many is kept for the judgement at the end
WARM_UP = 0.05
LEARNING_RATE = 2e-3
"""Of gains, where the loss is a nat."""
LATENT_RATE = 0.015
"""Of latents, in units of the grid's step."""


@dataclass(frozen=True)
class Distilled:
    """What training made.

    Attributes:
        weights: Quantized weights with their new scales, by module name.
        norms: New weights of norms, float32, by parameter name.
        before: Loss on the held-out rows before training, nats per token.
        after: The same after it.
        held_out: How many rows those are.
        steps: Steps of the optimizer.
    """

    weights: dict[str, QuantizedWeight]
    norms: dict[str, Tensor]
    before: float
    after: float
    held_out: int
    steps: int


@torch.enable_grad()  # a caller may have turned gradients off
def distill(
    model: PreTrainedModel,
    quantized: Mapping[str, QuantizedWeight],
    batches: Tensor,
    targets: Sequence[Tensor],
    *,
    epochs: float = 1.0,
    learning_rate: float = LEARNING_RATE,
    latent_rate: float | None = None,
    tokens_per_step: int = TOKENS_PER_STEP,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    resume_from: Mapping[str, Tensor] | None = None,
    keep: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> Distilled:
    """Train the scales and norms of `model` towards the original. The model is changed in place.

    Args:
        model: The quantized model, dense, in evaluation mode.
        quantized: Its quantized weights, by module name; those of stacked experts stay as they are.
        batches: Token ids, int64 `[rows, length]`.
        targets: The original's `judge.head_inputs` of each row, `[length, hidden]`; or, to learn the
            data itself, its `judge.next_tokens`, int64 `[length]`.
        epochs: How often the rows are seen.
        learning_rate: Of the gains, which start near 1, where the loss is a nat; see `_distance`.
        latent_rate: Of the codes, in units of the grid's step; None: they are not trained.
        tokens_per_step: Tokens between two steps of the optimizer.
        seed: Seed of the order of rows.
        progress: Called with (steps done, steps in all, mean loss of the step in nats).
        resume_from: What an interrupted run handed to `keep`: its steps are not done again.
        keep: Given now and then all that is needed to go on from there, to the bit.

    Raises:
        LowbitError: too few rows, no layer to train, or logits that are made in an unknown way.
    """
    kept = max(1, len(batches) // HELD_OUT)
    rows = len(batches) - kept
    if rows < 1:
        raise LowbitError(f"{len(batches)} calibration sequences are too few to train on: use 16 or more")
    judge = Judge(model, batches[:1])
    held_out = range(rows, len(batches))
    model.requires_grad_(False)
    layers = _make_trainable(model, quantized, TrainableLinear if latent_rate is None else LatentLinear)
    norms = Norms(model)
    training = Training(layers, norms)
    if resume_from:
        done, before = training.restore(resume_from)
    else:
        done, before = 0, judge.mean(model, batches, targets, held_out)
    # A text's loss says nothing of errors.
    distance = _distance(before) if targets[0].is_floating_point() else 0.5
    at_once = max(1, tokens_per_step // batches.shape[1])
    order = _order(rows, epochs, seed).split(at_once)
    with _checkpointed(model):
        for step, chosen in enumerate(order[done:], start=done):
            pace = _schedule(step, len(order))
            for layer in layers.values():
                if isinstance(layer, LatentLinear):
                    layer.pace(step + 1, (latent_rate or 0.0) * pace)
            loss = judge.step(model, batches[chosen], torch.stack([targets[i] for i in chosen]))
            training.step(learning_rate * distance * pace)
            if progress:
                progress(step + 1, len(order), loss)
            if keep and training.is_due():
                keep(training.state(step + 1, before))
    after = judge.mean(model, batches, targets, held_out)
    learned = {name: layer.quantized().cpu() for name, layer in layers.items()}
    return Distilled(learned, norms.weights(), before, after, kept, len(order))


def _order(rows: int, epochs: float, seed: int) -> Tensor:
    """Row numbers in the order of training; every epoch is a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(epochs))]
    return torch.cat(permutations)[: max(1, round(rows * epochs))]


def _distance(loss: float) -> float:
    """The divergence grows with the square of what a model is off by, so there is its root to go."""
    return math.sqrt(min(max(loss, 0.0), 4.0))


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _make_trainable(
    model: PreTrainedModel, quantized: Mapping[str, QuantizedWeight], kind: type[TrainableLinear]
) -> dict[str, TrainableLinear]:
    layers = {}
    for name, module in list(model.named_modules()):
        if name in quantized and type(module) is nn.Linear and module is not model.get_output_embeddings():
            layer = kind(quantized[name], module.bias, module.weight.dtype)
            model.set_submodule(name, layer.to(module.weight.device))
            layers[name] = layer
    if not layers:
        name = type(model).__name__
        raise LowbitError(f"{name} has no quantized linear layer to train: use --effort balanced")
    return layers


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Blocks keep only their input for the backward pass, and run again in it."""
    _, blocks = topology.decoder_blocks(model)
    for block in blocks:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own method shows again


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
