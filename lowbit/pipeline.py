"""The road: source, calibration, algorithm, format, file. `quantize` is these steps in order.

Refusals come first: target folder, source, plan, room on the disk and the calibration data are all
checked before the first block is touched. Everything is written beside the target and renamed at
the end, after it was read back and compared.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowbit import beside, checkpoint, hf
from lowbit import effort as effort_dial
from lowbit import source as sources
from lowbit.algorithms import ALGORITHMS, CORRECTIONS, rtn
from lowbit.batches import find_batches
from lowbit.blocks import BlockQuantizer, Progress, fingerprint
from lowbit.checkpoint import CheckpointWriter
from lowbit.effort import EFFORTS, Effort
from lowbit.errors import LowbitError
from lowbit.formats import FORMATS, Format
from lowbit.hardware import find_device, find_dtype
from lowbit.plan import Plan, head_name, make_plan
from lowbit.quantized import QuantizedWeight
from lowbit.quiet import quiet
from lowbit.refine import refine
from lowbit.results import Layer, Report
from lowbit.scheme import QuantScheme
from lowbit.source import Source
from lowbit.stream import Stream
from lowbit.verify import verify


def quantize(
    model: str | Path | PreTrainedModel,
    scheme: QuantScheme | None = None,
    *,
    output: str | Path,
    effort: str = effort_dial.DEFAULT,
    method: str | None = None,
    format: str = "compressed-tensors",
    dataset: str | None = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    skip: Sequence[str] = (),
    head_bits: int | None = None,
    auto_group: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify_output: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantized_by: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize a causal language model into a checkpoint that stock loaders read.

    Args:
        model: Hub id, local folder, `.gguf` file, or a loaded transformers model.
        scheme: The grid; None means 4 bits, symmetric, the largest group size that fits.
        output: Folder to create.
        effort: `fast`, `balanced`, `high` or `max`: how much work goes into the model.
        method: `rtn`, `gptq`, `awq` or `qronos`; None takes the effort's own.
        format: `compressed-tensors`, `gptq` or `awq`.
        dataset: Calibration text: a hub id (`org/name:config`), a `.txt`, `.jsonl` or `.parquet`
            file, or `self` to sample it from the model. None takes a public data set, or `self`
            where the hub can't be reached (the report says so).
        samples: Calibration sequences.
        seq_len: Tokens of each.
        seed: Seed of everything random.
        skip: Patterns of modules to leave in full precision (`*.down_proj`).
        head_bits: Also quantize the output head, to this many bits.
        auto_group: Let the model decide the group size.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: Working precision: `auto`, `float32`, `bfloat16`.
        max_shard_size: Size of a safetensors shard.
        overwrite: Replace an existing checkpoint.
        verify_output: Read the result back and compare it before it gets its name.
        tokenizer: Only for a loaded model without a folder of its own.
        quantized_by: Who publishes the checkpoint, for the model card.
        progress: Told about every step.

    Returns:
        A report of every layer, of what was skipped, and of how the result was verified.

    Raises:
        LowbitError: anything the user can mend; nothing is left behind.
        VerificationError: the written checkpoint is not what was computed; nothing is left behind.

    >>> report = quantize(tiny_model, QuantScheme(bits=4, group_size=32), output=folder / "w4",
    ...                   dataset="self", samples=8, seq_len=32)
    >>> report.scheme, report.verification.loader
    ('w4g32', 'stock transformers')
    """
    dial, method = _choose(effort, method, format, scheme)
    started, cpu = time.monotonic(), time.process_time()
    fmt, target, told = FORMATS[format], Path(output).expanduser().resolve(), progress or _silent
    checkpoint.check_target(target, _name(model), overwrite)
    shard_bytes = checkpoint.parse_size(max_shard_size)
    where = find_device(device)
    with checkpoint.scratch_beside(target) as scratch:
        folder = _find(model, tokenizer, scratch)
        opened = Source(folder, find_dtype(dtype, where))
        plan = make_plan(opened.model, scheme or QuantScheme(), fmt, skip=skip, head_bits=head_bits,
                         auto_group=auto_group or scheme is None)  # fmt: skip
        report = Report(target, str(plan.scheme), method, format, "none", source_bytes=opened.bytes)
        checkpoint.check_room(target.parent, _estimated_bytes(opened, plan))
        batches, rows = find_batches(
            opened, report, method, dataset, samples, seq_len, seed, told, dial.training * samples
        )
        report.end_stage("calibration data", time.monotonic() - started)
        road = _Road(opened, plan, fmt, report, where, told)
        road.write(scratch / "checkpoint", shard_bytes, batches)
        if rows is not None:
            road.refine(scratch / "checkpoint", rows, dial.epochs, shard_bytes, batches[-1])
        if verify_output:
            road.verify(scratch / "checkpoint", batches[-1])
        report.seconds["all"] = time.monotonic() - started
        report.cpu_seconds = time.process_time() - cpu
        beside.after_quantize(scratch / "checkpoint", report, _name(model), folder, quantized_by)
        checkpoint.put_in_place(scratch / "checkpoint", target)
    return report


def _choose(effort: str, method: str | None, format: str, scheme: QuantScheme | None) -> tuple[Effort, str]:
    """What an effort stands for, and the method; refuses what does not exist or fit together."""
    if effort not in EFFORTS:
        raise LowbitError(f"effort={effort!r} is unknown: use one of {list(EFFORTS)}")
    dial, rounded_inputs = EFFORTS[effort], scheme is not None and scheme.activation_bits is not None
    if rounded_inputs and dial.training:
        raise LowbitError(f"effort={effort!r} trains for exact activations, not {scheme}: use balanced")
    method = method or ("gptq" if rounded_inputs and dial.method in CORRECTIONS else dial.method)
    if method not in ALGORITHMS:
        raise LowbitError(f"method={method!r} is unknown: use one of {sorted(ALGORITHMS)}")
    if method not in ("rtn", "gptq") and rounded_inputs:
        raise LowbitError(f"method={method!r} knows no rounded activations ({scheme}): use gptq or rtn")
    if format not in FORMATS:
        raise LowbitError(f"format={format!r} is unknown: use one of {sorted(FORMATS)}")
    return dial, method


class _Road:
    """The steps from an opened source to a verified checkpoint, and what they share."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        fmt: Format,
        report: Report,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.source, self.plan, self.fmt, self.report = source, plan, fmt, report
        self.device, self.progress = device, progress
        self.schemes: dict[str, QuantScheme] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.fingerprints: dict[str, bytes] = {}
        self.logits: Tensor | None = None

    def write(self, folder: Path, shard_bytes: int, batches: list[Tensor]) -> None:
        """Quantize block after block into `folder`."""
        source, plan, started = self.source, self.plan, time.monotonic()
        head = head_name(source.model)
        outside = source.keys_outside([plan.path])
        head_keys = source.keys_under([head])
        source.load([key for key in outside if key not in head_keys], self.device)
        twins = batches[:-1] if self.report.method in CORRECTIONS else []  # see BlockQuantizer
        on_device = [batch.to(self.device) for batch in (*batches, *twins)]
        stream = Stream(source.model, plan.blocks, on_device)
        writer = CheckpointWriter(folder, shard_bytes)
        for key in outside:
            if key not in head_keys:
                self._copy(writer, key)
        for key in source.extra_keys:
            writer.add(key, source.read(key))
        blocks = BlockQuantizer(
            source, plan, stream, self.report.method, self.fmt.SCALE_DTYPE, self.device, self.progress
        )
        for block in blocks:
            for name, weight in block.weights.items():
                self._pack(writer, name, weight)
            for key, tensor in block.tensors.items():
                self._copy(writer, key, tensor)
            self.report.layers += block.layers
            self.report.notes += block.notes
            self.fingerprints |= block.fingerprints
        self._write_head(writer, head, head_keys)
        self.logits = stream.logits(len(batches) - 1)
        stream.hidden.clear()
        self._finish(writer, head)
        self.report.end_stage("quantization", time.monotonic() - started)

    def _copy(self, writer: CheckpointWriter, key: str, tensor: Tensor | None = None) -> None:
        original = self.source.read(key)
        dtype = checkpoint.stored_dtype(original.dtype, self.source.stored_dtype)
        writer.add(key, (original if tensor is None else tensor).to(dtype))

    def _pack(self, writer: CheckpointWriter, name: str, weight: QuantizedWeight) -> None:
        self.schemes[name], self.shapes[name] = weight.scheme, weight.shape
        for suffix, tensor in self.fmt.pack(weight).items():
            writer.add(f"{name}.{suffix}", tensor)

    def _write_head(self, writer: CheckpointWriter, head: str, head_keys: list[str]) -> None:
        """Load the head (tied or not); quantize it where asked, copy it where it is its own tensor."""
        source, scheme = self.source, self.plan.head
        source.load(head_keys, self.device)
        if scheme is None:
            for key in head_keys:
                self._copy(writer, key)
            return
        module = source.model.get_output_embeddings()
        weight, note = rtn.quantize_weight(module.weight.data, None, scheme, self.fmt.SCALE_DTYPE)
        self._pack(writer, head, weight)
        for key in head_keys:
            if not key.endswith(".weight"):
                self._copy(writer, key)
        dense = weight.dequantize(torch.bfloat16)
        original = module.weight.detach().float()
        lost = (dense.float() - original).square().sum() / original.square().sum()
        self.report.layers.append(Layer(head, weight.shape, str(scheme), float(lost), note))
        # A new parameter, so that a tied embedding stays as it is.
        module.weight = nn.Parameter(dense.to(module.weight.dtype), requires_grad=False)
        self.fingerprints[head] = fingerprint(dense)

    def _finish(self, writer: CheckpointWriter, head: str) -> None:
        source, plan, report = self.source, self.plan, self.report
        ignore = [name for name, module in source.model.named_modules()
                  if isinstance(module, nn.Linear) and name not in self.schemes]  # fmt: skip
        if plan.head is None and head not in ignore:
            ignore.append(head)
        config = checkpoint.quantized_config(
            source.folder / "config.json",
            self.fmt.quantization_config(self.schemes, ignore),
            tied=False if plan.head else None,
        )
        writer.finish(config, sources.sidecars(source.folder))
        report.warnings = self.fmt.warnings(self.schemes, self.shapes)
        report.skipped = plan.skipped
        report.output_bytes = writer.total_size
        report.notes += [
            f"{key} is not used by the architecture: copied as it is" for key in source.extra_keys
        ]
        fallen = Counter(layer.note for layer in report.layers if layer.note)
        report.notes += [f"{count} layers: {note}" for note, count in fallen.items()]

    def refine(self, folder: Path, rows: Tensor, epochs: int, shard_bytes: int, ids: Tensor) -> None:
        """Train the scales and norms of what is in `folder`; see `refine.py`."""
        started, refined = time.monotonic(), folder.with_name("refined")
        self.source.release()
        try:
            done = refine(
                folder, self.source.folder, refined, rows, epochs=epochs, max_shard_size=shard_bytes,
                device=self.device, progress=self.progress,
            )  # fmt: skip
        except LowbitError as error:  # what was rounded stands, and took longer
            self.report.notes.append(f"scales and norms were not trained: {error}")
            return
        told = f"KL on {done.held_out} rows that were not trained on {done.before:.4f} -> {done.after:.4f}"
        if done.kept:
            shutil.rmtree(folder)
            refined.rename(folder)
            self.fingerprints |= done.fingerprints
            self.logits = hf.load(folder, packed=False)(input_ids=ids).logits.detach()
            self.report.notes.append(f"scales and norms trained for {done.steps} steps: {told}")
        else:
            self.report.notes.append(f"training scales and norms gained nothing and was dropped: {told}")
        self.report.end_stage("training", time.monotonic() - started)

    def verify(self, folder: Path, ids: Tensor) -> None:
        """Read `folder` back; raises `VerificationError` unless it is what was computed."""
        started = time.monotonic()
        self.progress("verify", 0, 1, "reading the checkpoint back")
        logits = self.logits
        assert logits is not None
        self.source.release()
        self.report.verification = verify(folder, self.report.format, ids, logits, self.fingerprints)
        self.progress("verify", 1, 1, "verified")
        self.report.end_stage("verification", time.monotonic() - started)


def _name(model: str | Path | PreTrainedModel) -> str:
    return str(getattr(model, "name_or_path", model))


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    pass


def _find(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, scratch: Path
) -> Path:
    """The folder of `model`; one that is in memory is saved first."""
    if not isinstance(model, PreTrainedModel):
        return sources.find(str(model), scratch)
    if getattr(model.config, "quantization_config", None):
        raise LowbitError("the loaded model is already quantized: start from the original model")
    folder = scratch / "source"
    with quiet():
        model.save_pretrained(folder)
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
            except (OSError, ValueError):
                raise LowbitError(
                    "the model has no folder to take its tokenizer from: pass tokenizer="
                ) from None
        tokenizer.save_pretrained(folder)
    return folder


def _estimated_bytes(source: Source, plan: Plan) -> int:
    """Generous size of the result, with room for the copy that a rename replaces."""
    bits = 0.0
    for block in range(len(plan.blocks)):
        for matrix in plan.matrices(block):
            out, width = matrix.shape
            dense = matrix.module_name in plan.skipped
            bits += out * width * (16 if dense else plan.scheme.bits_per_weight(width))
    blocks = sum(p.numel() for p in plan.blocks.parameters())
    rest = sum(p.numel() for p in source.model.parameters()) - blocks
    return int(1.1 * (bits / 8 + 2 * rest)) + 50_000_000
