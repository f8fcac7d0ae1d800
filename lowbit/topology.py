"""What is inside a model, found by its structure and never by its name.

Decoder blocks are the largest list of alike modules. The matrices of a block are the weights of its
linear layers, of GPT-2's transposed `Conv1D`, and the slices of stacked expert parameters. Which of
them share an input is observed while the block runs.

What can be *folded* is found by trying. A fold multiplies the input channels of some matrices by
`s` and divides the output channels of whatever makes that input (a norm, or rows of an earlier
matrix) by `s`, which leaves the block's function unchanged exactly when the path between them is
linear. So each candidate pair is scaled by random powers of two and the block runs on a few tokens:
the fold is real if every token's output stayed, measured against how far scaling the consumers alone
moves it. (Measured against the output itself, a wrong fold passes for true: the residual stream of a
trained model carries a few values thousands of times larger than what a layer adds.) No list of
architectures is needed, and an unusual block costs a missed fold, never a broken model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit.errors import LowbitError

FOLD_TOLERANCE = 1e-3
"""What a real fold may move a token by, relative to half a fold: powers of two commute with rounding."""
FOLD_TOLERANCE_OFFSET = 0.05
"""The same for a norm that multiplies by `1 + weight`, whose weight is rounded anew."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix of a block.

    Attributes:
        name: Path of the parameter in the model, `model.layers.0.mlp.down_proj.weight`.
        owner: Module that holds the parameter.
        attribute: Its name there.
        kind: "Linear", "Conv1D" (stored transposed) or "Expert" (a slice of a stacked parameter).
        index: Which expert, for "Expert".
    """

    name: str
    owner: nn.Module
    attribute: str
    kind: str
    index: int | None = None

    @property
    def module_name(self) -> str:
        """The name that users, skip patterns and `ignore` lists speak of: no trailing `.weight`."""
        name = self.name.removesuffix(".weight")
        return name if self.index is None else f"{name}.{self.index}"

    @property
    def stored(self) -> Tensor:
        """The weight as the block holds it (a view; `[in, out]` for Conv1D)."""
        parameter: Tensor = getattr(self.owner, self.attribute)
        return parameter.data if self.index is None else parameter.data[self.index]

    @property
    def weight(self) -> Tensor:
        """A view of the weight as `[out, in]`; writing into it changes the block."""
        return self.stored.T if self.kind == "Conv1D" else self.stored

    @property
    def bias(self) -> Tensor | None:
        """The bias `[out]`, if there is one beside this matrix."""
        bias = getattr(self.owner, "bias", None) if self.index is None else None
        return None if bias is None else bias.data

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`; works on the meta device too."""
        return self.weight.shape[0], self.weight.shape[1]


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks: the list of alike modules with the most weights.

    Raises:
        LowbitError: the model has no such list.
    """
    inside = model.get_decoder() if hasattr(model, "get_decoder") else model
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if not any(module is part for part in inside.modules()):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise LowbitError(f"{type(model).__name__} has no list of decoder blocks: it can't be quantized")
    return best[1], best[2]


def matrices(block: nn.Module, prefix: str) -> list[Matrix]:
    """Every weight matrix of `block`, whose path in the model is `prefix`."""
    found = []
    for name, module in block.named_modules():
        path = f"{prefix}.{name}" if name else prefix
        if isinstance(module, nn.Linear):
            found.append(Matrix(f"{path}.weight", module, "weight", "Linear"))
        elif isinstance(module, Conv1D):
            found.append(Matrix(f"{path}.weight", module, "weight", "Conv1D"))
        elif not getattr(module, "is_transposed", False):
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and attribute.endswith("proj"):
                    found += [
                        Matrix(f"{path}.{attribute}", module, attribute, "Expert", index)
                        for index in range(parameter.shape[0])
                    ]
    return found


def other_matrices(model: nn.Module, known: set[str]) -> list[str]:
    """Parameters of two dimensions and more that are not in `known`: what stays unquantized."""
    return [name for name, p in model.named_parameters() if p.ndim > 1 and name not in known]


@dataclass(frozen=True, eq=False)
class Fold:
    """A rewrite that preserves the function: consumers' input channels times `s`, producer's by 1/s.

    Attributes:
        consumers: The matrices that read the channels.
        others: Weights `[out, in]` outside `matrices` that read them too (a router).
        producer: A norm, or the matrix whose last rows make the channels.
        offset: What a norm adds to its weight before multiplying (1 in Gemma).
    """

    consumers: tuple[Matrix, ...]
    others: tuple[Tensor, ...]
    producer: nn.Module | Matrix
    offset: float = 0.0

    def apply(self, scales: Tensor) -> None:
        """Fold `scales [in]` (float32, positive) into the block, in place."""
        self.scale_consumers(scales)
        self.scale_producer(scales)

    def scale_consumers(self, scales: Tensor) -> None:
        """One half of `apply`, which alone changes the block's function."""
        for weight in (*(matrix.weight for matrix in self.consumers), *self.others):
            weight.mul_(scales)

    def scale_producer(self, scales: Tensor) -> None:
        """The other half."""
        if isinstance(self.producer, Matrix):
            rows = len(scales)
            self.producer.weight[-rows:].div_(scales.unsqueeze(-1))
            if self.producer.bias is not None:
                self.producer.bias[-rows:].div_(scales)
            return
        weight, bias = _norm_parameters(self.producer)
        weight.copy_((weight.float() + self.offset) / scales - self.offset)
        if bias is not None:
            bias.div_(scales)


def find_folds(
    block: nn.Module,
    groups: Sequence[tuple[Sequence[Matrix], Sequence[Tensor]]],
    run: Callable[[], Tensor],
) -> list[Fold]:
    """Folds of a block, each proved by running it.

    Args:
        block: A decoder block with its weights loaded.
        groups: Per shared input, the matrices that read it and any other weights that do.
        run: Runs the block on a few fixed tokens and gives its output.

    Returns:
        At most one fold per group; norms are tried first, then earlier matrices.
    """
    before = run()
    every = [matrix for members, _ in groups for matrix in members]
    norms = [m for m in block.modules() if is_norm(m)]
    generator = torch.Generator().manual_seed(0)
    found = []
    for members, others in groups:
        if any(matrix.kind == "Expert" for matrix in members):
            continue
        channels = members[0].shape[1]
        producers: list[nn.Module | Matrix] = [n for n in norms if len(_norm_parameters(n)[0]) == channels]
        producers += [p for p in every if p not in members and p.kind != "Expert" and p.shape[0] >= channels]
        for producer in producers:
            offset = 0.0 if isinstance(producer, Matrix) else norm_offset(producer)
            fold = Fold(tuple(members), tuple(others), producer, offset)
            scales = 2.0 ** torch.randint(-1, 2, (channels,), generator=generator)
            if _preserves(fold, scales.to(before.device), before, run):
                found.append(fold)
                break
    return found


def is_norm(module: nn.Module) -> bool:
    """Does it hold a vector named weight and no further module?"""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


def _norm_parameters(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Any = norm.weight
    bias: Any = getattr(norm, "bias", None)
    return weight.data, None if bias is None else bias.data


def norm_offset(norm: nn.Module) -> float:
    """1.0 for a norm that multiplies by `1 + weight`, found by giving it a weight of zero.

    0.0 for one that reads a gate as well and so can't be asked: those of Qwen3-Next and its kin do not add 1.
    """
    weight, bias = _norm_parameters(norm)
    saved = weight.clone()
    weight.zero_()
    probe = torch.linspace(1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    try:
        output = norm(probe[None]) - (0 if bias is None else bias)
    except TypeError:
        return 0.0
    finally:
        weight.copy_(saved)
    return 0.0 if output.abs().max() == 0 else 1.0


def _preserves(fold: Fold, scales: Tensor, before: Tensor, run: Callable[[], Tensor]) -> bool:
    """Apply one half, run, apply the other, run, undo: did the second run lead back to `before`?"""
    touched = [matrix.weight for matrix in fold.consumers] + list(fold.others)
    if isinstance(fold.producer, Matrix):
        touched += [t for t in (fold.producer.weight, fold.producer.bias) if t is not None]
    else:
        touched += [parameter.data for parameter in fold.producer.parameters()]
    saved = [tensor.clone() for tensor in touched]
    fold.scale_consumers(scales)
    away = (run() - before).float().norm(dim=-1)
    fold.scale_producer(scales)
    left = (run() - before).float().norm(dim=-1)
    for tensor, value in zip(touched, saved, strict=True):
        tensor.copy_(value)
    tolerance = FOLD_TOLERANCE_OFFSET if fold.offset else FOLD_TOLERANCE
    return bool(away.any()) and bool((left / away.clamp(min=1e-30)).mean() <= tolerance)
