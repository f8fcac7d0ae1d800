"""Several checkpoints against one original on the same windows: what `lowbit compare` shows.

The original runs once. Its activations after the last block are kept (`windows * seq_len * hidden`, not
`* vocabulary`), its blocks are let go, and norm and head make logits from them whenever a checkpoint
is measured. So two models are never in memory together, but for the original's head, and every
checkpoint is held against exactly the same numbers.

A checkpoint may be ours, another tool's, or a GGUF file: whatever lowbit or transformers loads.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import hf, topology, untrusted
from lowbit import source as sources
from lowbit.dataset import evaluation_windows, full_name, read_documents
from lowbit.divergence import Divergence
from lowbit.errors import LowbitError
from lowbit.evaluate import Result, check_model, compare
from lowbit.hardware import evaluation_dtype
from lowbit.inspection import inspect
from lowbit.progress import Progress, silent
from lowbit.record import public, this_run
from lowbit.stream import Stream

Precision: TypeAlias = "torch.dtype | str"


@dataclass(frozen=True)
class Measured:
    """One checkpoint, measured.

    Attributes:
        name: What the user called it, without folders.
        scheme: Grid and method where its configuration says them.
        bytes: Size of its weight files.
        bits_per_weight: `8 * bytes` over the number of weights of the original.
        result: Perplexity, divergence, agreement.
        divergence: Distribution over tokens and worst passages, as plain data.
    """

    name: str
    scheme: str
    bytes: int
    bits_per_weight: float
    result: Result
    divergence: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Checkpoints of one model, measured on the same windows.

    Attributes:
        reference: The original.
        reference_bytes: Size of its weight files.
        dataset: The text.
        seq_len: Tokens of a window.
        windows: How many.
        models: In the order given.
    """

    reference: str
    reference_bytes: int
    dataset: str
    seq_len: int
    windows: int
    models: list[Measured]

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON; distributions and passages are left to the page."""
        found = asdict(self)
        for model, measured in zip(found["models"], self.models, strict=True):
            del model["divergence"]
            model |= model.pop("result")
            model["kl_quantiles"] = measured.divergence["quantiles"]
        return found | {"run": this_run()}


class Original:
    """Logits of the original on given windows, made from its last activations; its blocks are let go.

    Args:
        model: The original; it can't be used for anything else afterwards.
        windows: int64 `[n, seq_len]`.
        progress: Told about every block.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, progress: Progress) -> None:
        check_model(model, windows.shape[1])
        _, blocks = topology.decoder_blocks(model)
        self._stream = Stream(model, blocks, [window[None].to(model.device) for window in windows])
        for number, block in enumerate(blocks):
            for _ in self._stream.advance(number):
                pass
            sources.free(block)
            progress("original", number + 1, len(blocks), "blocks")

    def __call__(self, index: int, window: Tensor) -> Tensor:
        """Logits for every token of window number `index` but the first, `[seq_len - 1, vocabulary]`."""
        return self._stream.logits(index)[0, :-1]


def compare_checkpoints(
    models: Sequence[str],
    reference: str,
    dataset: str,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    device: str | torch.device = "cpu",
    dtype: Precision = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Measure several checkpoints against one original.

    Args:
        models: Folders, hub ids or `.gguf` files; all with the original's vocabulary.
        reference: The original.
        dataset: Text, as `lowbit.dataset.read_documents` takes it, cut by the original's tokenizer.
        seq_len: Tokens of a window.
        windows: How many; None takes the whole text.
        device: Where to compute.
        dtype: Precision; "auto" is each checkpoint's own, or float32 on CPUs that have no bfloat16 products.
        progress: Told about every block of the original and every window.

    Raises:
        LowbitError: something can't be loaded, or does not belong to the original; no such precision.
    """
    dtype = evaluation_dtype(dtype, torch.device(device))
    told = progress or silent
    names = short_names(models)
    with tempfile.TemporaryDirectory() as scratch:
        opened = _folder(reference, Path(scratch) / "reference")
        tokens = evaluation_windows(
            read_documents(dataset, "test"), hf.load_tokenizer(opened), seq_len, windows
        )
        model = hf.load(opened, packed=False, dtype=dtype, device=device)
        weights = sum(parameter.numel() for parameter in model.parameters())
        original = Original(model, tokens, told)
        measured = []
        for number, (name, path) in enumerate(zip(names, models, strict=True)):
            folder = _folder(path, Path(scratch) / str(number))
            seen = Divergence()
            result = compare(
                hf.load(folder, packed=False, dtype=dtype, device=device),
                original,
                tokens,
                lambda done, total, name=name: told(name, done, total, "windows"),  # type: ignore[misc]
                seen,
            )
            gc.collect()
            plain, size = seen.to_dict(hf.load_tokenizer(opened)), weight_bytes(path, folder)
            measured.append(Measured(name, _scheme(path, folder), size, 8 * size / weights, result, plain))
        size = weight_bytes(reference, opened)
    return Comparison(public(reference), size, public(full_name(dataset)), seq_len, len(tokens), measured)


def short_names(models: Sequence[str]) -> list[str]:
    """Last names of paths; with as many folders before them as it takes to tell them apart.

    >>> short_names(["runs/a/w4", "runs/b/w4", "w8.gguf"])
    ['a/w4', 'b/w4', 'w8.gguf']
    """
    if len({str(Path(model)) for model in models}) < len(models):
        raise LowbitError("one checkpoint was given twice: name every checkpoint once")
    parts = [Path(model).parts for model in models]
    found = []
    for own in parts:
        length = next(n for n in range(1, len(own) + 1) if sum(p[-n:] == own[-n:] for p in parts) == 1)
        found.append("/".join(own[-length:]))
    return found


def weight_bytes(model: str, folder: Path) -> int:
    """Size of the weight files that are loaded; of the `.gguf` file itself where it is one."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.stat().st_size
    return sum(file.stat().st_size for file in untrusted.weight_files(folder))


def frontier(models: Sequence[Measured]) -> list[Measured]:
    """Those that no other beats in both size and KL, smallest first."""
    best: list[Measured] = []
    for model in sorted(models, key=lambda m: (m.bytes, m.result.kl or 0)):
        if not best or (model.result.kl or 0) < (best[-1].result.kl or 0):
            best.append(model)
    return best


def _folder(model: str, scratch: Path) -> Path:
    scratch.mkdir(parents=True)
    return sources.find(model, scratch)


def _scheme(model: str, folder: Path) -> str:
    """How its weights are stored, in a few words."""
    if Path(model).suffix == ".gguf":
        return "gguf"
    try:
        found = inspect(folder)
    except LowbitError:  # quantized by something that transformers alone reads
        quantization, _ = hf.quantization_of(folder)
        return str(quantization.get("quant_method", ""))
    schemes = list(dict.fromkeys(part.scheme for part in found.parts if part.quantized))
    return f"{'+'.join(schemes)} {found.method}" if schemes else found.parts[0].scheme
