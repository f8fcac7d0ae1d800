"""The steps from an opened model to a verified checkpoint: blocks, head, training, reading back.

What they share (schemes, shapes, digests of what was written) is in `Road`; what is decided before the
first block, and what happens after the last step, is in `pipeline.py`.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit import checkpoint, hf
from lowbit import source as sources
from lowbit.algorithms import CORRECTIONS, rtn
from lowbit.blocks import BlockQuantizer, Progress, fingerprint
from lowbit.checkpoint import CheckpointWriter
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.plan import Plan, head_name
from lowbit.quantized import QuantizedWeight
from lowbit.refine import refine
from lowbit.results import Layer, Report
from lowbit.scheme import QuantScheme, text_of
from lowbit.source import Source
from lowbit.stream import Stream
from lowbit.verify import verify


class Road:
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
        report.scheme = text_of(scheme for name, scheme in self.schemes.items() if name != head)
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
