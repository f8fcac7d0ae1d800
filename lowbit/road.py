"""The steps from an opened model to a verified checkpoint: blocks, head, training, reading back.

What they share (schemes, shapes, digests of what was written) is in `Road`; what is decided before the
first block, and what happens after the last step, is in `pipeline.py`. After every block and every later
step all of it is committed to the work folder (`work.py`), so every step begins where a commit left off.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import checkpoint, durable, hf, ranks, record
from lowbit import source as sources
from lowbit.algorithms import ALGORITHMS, BY_COLUMN, CORRECTIONS, columns
from lowbit.blocks import BlockQuantizer, fingerprint
from lowbit.budget import Budget
from lowbit.carried import Carried
from lowbit.checkpoint import CheckpointWriter
from lowbit.effort import QAT, Effort
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.head import observe_head, round_head
from lowbit.plan import Plan, head_name
from lowbit.progress import Progress
from lowbit.quantized import QuantizedWeight
from lowbit.refine import refine
from lowbit.results import Layer, Report
from lowbit.scheme import QuantScheme, text_of
from lowbit.source import Source
from lowbit.stream import Stream
from lowbit.verify import verify
from lowbit.work import Work


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
        work: Work,
        budget: Budget | None = None,
    ) -> None:
        self.source, self.plan, self.fmt, self.report = source, plan, fmt, report
        self.device, self.progress, self.work = device, progress, work
        self.budget, facts = budget or Budget(), work.facts
        plan.skipped.update(facts.get("skipped", {}))
        self.schemes = {name: QuantScheme(**scheme) for name, scheme in facts.get("schemes", {}).items()}
        self.shapes: dict[str, tuple[int, int]] = dict(facts.get("shapes", {}))
        source.seen.update(facts.get("seen", {}))
        self.fingerprints = {name: bytes.fromhex(d) for name, d in facts.get("fingerprints", {}).items()}
        self._ranks = ranks.Tally(report.ranks)
        self.logits: Tensor | None = work.load("logits").get("logits")

    def _commit(self, facts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make what is done so far the state to go on from."""
        everything = {
            "report": self.report.to_json(),
            "budget": dataclasses.asdict(self.budget),
            "skipped": self.plan.skipped,
            "schemes": {name: dataclasses.asdict(scheme) for name, scheme in self.schemes.items()},
            "shapes": self.shapes,
            "seen": self.source.seen,
            "fingerprints": {name: digest.hex() for name, digest in self.fingerprints.items()},
        }
        self.work.commit({**everything, **facts}, tensors)

    def inputs(self) -> dict[str, Any]:
        """What the result depends on; the model by a digest that every copy of it has."""
        return {**self.work.inputs, **self.source.known()}

    def write(self, shard_bytes: int, batches: list[Tensor]) -> None:
        """Quantize block after block into the work folder's checkpoint; goes on after what is done."""
        facts = self.work.facts
        if not ranks.is_first():
            return self._follow(batches)
        if "result" in facts:
            checkpoint.drop_parts(self.work.checkpoint)
            return
        done, started = (
            facts.get("blocks", 0),
            time.monotonic() - self.report.seconds.get("quantization", 0.0),
        )
        head = head_name(self.source.model)
        head_keys = self.source.keys_under([head])
        stream = self._begin(batches)
        writer = CheckpointWriter(self.work.checkpoint, shard_bytes, facts.get("shards", []))
        if not done:
            self._copy_outside(writer, self._outside(head_keys))
        for number, block in enumerate(self._blocks(stream), start=done + 1):
            for name, weight in block.weights.items():
                self._pack(writer, name, weight)
            for key, tensor in block.tensors.items():
                self._copy(writer, key, tensor)
            self.report.layers += block.layers
            self.report.notes += block.notes
            self.fingerprints |= block.fingerprints
            self.report.end_stage("quantization", time.monotonic() - started)
            self._commit_block(number, writer, stream)
        self._write_head(writer, head, head_keys, stream)
        self.logits = stream.logits(len(batches) - 1)
        stream.hidden.clear()
        self._finish(writer, head)
        self.report.end_stage("quantization", time.monotonic() - started)
        durable.sync_folder(writer.folder)
        self._commit({"result": writer.folder.name}, {"carried": {}, "logits": {"logits": self.logits}})
        checkpoint.drop_parts(writer.folder)

    def _follow(self, batches: list[Tensor]) -> None:
        """The same on the other ranks: their part of every block, and nothing written."""
        if "result" not in self.work.facts:
            stream = self._begin(batches)
            for _ in self._blocks(stream):
                self._collect(stream)
            if self.plan.head:
                self._observe_head(stream)
        self.source.release()

    def _outside(self, head_keys: Sequence[str]) -> list[str]:
        """What lies outside the blocks and the head."""
        return [key for key in self.source.keys_outside([self.plan.path]) if key not in head_keys]

    def _begin(self, batches: list[Tensor]) -> Stream:
        """Load what is outside the blocks, and carry this rank's batches as far as blocks are done."""
        source, facts = self.source, self.work.facts
        source.load(self._outside(source.keys_under([head_name(source.model)])), self.device)
        source.rest()
        twins = batches[:-1] if self.report.method in CORRECTIONS else []  # see BlockQuantizer
        on_device = [batch.to(self.device) for batch in (*batches, *twins)]
        of_rank = [ranks.owner(number) for number in range(len(batches) - 1)]
        self._owners, self._probe = [*of_rank, 0, *of_rank[: len(twins)]], len(batches) - 1
        carried = Carried(len(on_device), self.budget.carried, self.work.folder)
        stream = Stream(source.model, self.plan.blocks, on_device, carried)
        if facts.get("blocks"):
            for number, kept in enumerate(self.work.each("carried")):
                if self._owners[number] == ranks.rank() or number == self._probe:
                    carried[number] = kept.to(self.device)
            stream.extra_outputs = facts["extra_outputs"]
        ranks.gathered(None)  # what is kept may be replaced once all have read it
        return stream

    def _blocks(self, stream: Stream) -> BlockQuantizer:
        return BlockQuantizer(
            self.source, self.plan, stream, self.report.method, self.fmt.SCALE_DTYPE, self.device,
            self.progress, self.work.facts.get("blocks", 0), self.budget.rows,
        )  # fmt: skip

    def _collect(self, stream: Stream) -> Mapping[str, Tensor]:
        """Bring what the ranks carry to the first one."""
        named, probe = stream.hidden.named(), stream.hidden[self._probe]
        assert probe is not None
        owners = {f"{number:06}": whose for number, whose in enumerate(self._owners)}
        shapes = {f"{n:06}": (*ids.shape, probe.shape[-1]) for n, ids in enumerate(stream.batches)}
        self.report.ranks = self._ranks.now()
        return ranks.collected(named, owners, shapes, probe.dtype)

    def _commit_block(self, done: int, writer: CheckpointWriter, stream: Stream) -> None:
        facts = {"blocks": done, "shards": writer.mark(), "extra_outputs": stream.extra_outputs}
        self._commit(facts, {"carried": self._collect(stream)})
        writer.tidy()

    def _copy_outside(self, writer: CheckpointWriter, keys: Sequence[str]) -> None:
        for key in keys:
            self._copy(writer, key)
        for key in self.source.extra_keys:
            writer.add(key, self.source.read(key))

    def _copy(self, writer: CheckpointWriter, key: str, tensor: Tensor | None = None) -> None:
        original = self.source.read(key)
        dtype = checkpoint.stored_dtype(original.dtype, self.source.stored_dtype)
        writer.add(key, (original if tensor is None else tensor).to(dtype))

    def _pack(self, writer: CheckpointWriter, name: str, weight: QuantizedWeight) -> None:
        self.schemes[name], self.shapes[name] = weight.scheme, weight.shape
        for suffix, tensor in self.fmt.pack(weight).items():
            writer.add(f"{name}.{suffix}", tensor)

    def _write_head(self, writer: CheckpointWriter, head: str, head_keys: list[str], stream: Stream) -> None:
        """Load the head (tied or not); quantize it where asked, copy it where it is its own tensor."""
        source, scheme = self.source, self.plan.head
        source.load(head_keys, self.device)
        if scheme is None:
            for key in head_keys:
                self._copy(writer, key)
            return
        module, method = source.model.get_output_embeddings(), self.report.method
        weight, error, note = round_head(
            module.weight.data,
            self._observe_head(stream),
            scheme,
            method,
            self.fmt.SCALE_DTYPE,
            self.progress,
        )
        self._pack(writer, head, weight)
        for key in head_keys:
            if not key.endswith(".weight"):
                self._copy(writer, key)
        self.report.layers.append(Layer(head, weight.shape, str(scheme), error, note))
        dense = weight.dequantize(torch.bfloat16)
        # A new parameter, so that a tied embedding stays as it is.
        module.weight = nn.Parameter(dense.to(module.weight.dtype), requires_grad=False)
        self.fingerprints[head] = fingerprint(dense)

    def _observe_head(self, stream: Stream) -> Tensor | None:
        if not ALGORITHMS[self.report.method].NEEDS_HESSIAN:
            return None
        own = [number for number in range(self._probe) if self._owners[number] == ranks.rank()]
        tokens = sum(batch.numel() for batch in stream.batches[: self._probe])
        return observe_head(stream, own, tokens, self.device, self.progress)

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
        config["lowbit"] = record.provenance(self.inputs(), report.tokens)
        writer.finish(config, sources.sidecars(source.folder))
        report.warnings = self.fmt.warnings(self.schemes, self.shapes)
        report.scheme = text_of(scheme for name, scheme in self.schemes.items() if name != head)
        report.skipped = plan.skipped
        report.output_bytes = writer.total_size
        report.notes += [
            f"{part}.* ({count} tensors) is not used by the architecture: copied as it is"
            for part, count in source.extra_parts().items()
        ]
        # What blocks told alike is said once.
        report.notes = [f"{note} (x{n})" if n > 1 else note for note, n in Counter(report.notes).items()]
        fallen = Counter(layer.note for layer in report.layers if layer.note)
        report.notes += [f"{count} layers: {note}" for note, count in fallen.items()]
        report.notes += source.notes()
        report.notes += columns.notes(self.device) if report.method in BY_COLUMN else []

    def refine(self, rows: Tensor | None, dial: Effort, shard_bytes: int, ids: Tensor) -> None:
        """Train what was written, its weights too where the dial says so; see `refine.py`."""
        work, report = self.work, self.report
        if rows is None or "trained" in work.facts:
            return
        started = time.monotonic() - report.seconds.get("training", 0.0)
        refined = work.folder / "refined"
        shutil.rmtree(refined, ignore_errors=True)
        self.source.release()

        def keep(tensors: Mapping[str, Tensor]) -> None:
            report.end_stage("training", time.monotonic() - started)
            self._commit({}, {"training": tensors})

        result: dict[str, Any] = {"trained": True}
        alone = f", on the first of {ranks.size()} ranks alone" if ranks.size() > 1 else ""
        what = "weights, scales and norms" if dial.weights else "scales and norms"
        try:
            done = refine(
                work.checkpoint, self.source.folder, refined, rows, epochs=dial.epochs,
                weights_too=dial.weights, loss=dial.loss, dtype=self.source.dtype,
                max_shard_size=shard_bytes, device=self.device, progress=self.progress,
                resume_from=work.load("training"), keep=keep,
            )  # fmt: skip
        except LowbitError as error:  # what was rounded stands, and took longer
            if dial.weights:  # but training was asked for by name
                raise
            report.notes.append(f"scales and norms were not trained: {error}")
        else:
            loss = "KL" if dial.loss == "original" else "cross-entropy"
            other = done.dtype != self.source.dtype
            how = alone + (f", in {str(done.dtype).removeprefix('torch.')}" if other else "")
            told = f"{loss} on {done.held_out} rows not trained on {done.before:.4f} -> {done.after:.4f}"
            if done.kept:
                result["result"] = refined.name
                self.fingerprints |= done.fingerprints
                self.logits = hf.load(refined, packed=False)(input_ids=ids).logits.detach()
                report.notes.append(f"{what} trained for {done.steps} steps{how}: {told}")
                report.method = QAT if dial.weights else report.method
                durable.sync_folder(refined)
            else:
                report.notes.append(f"training {what}{how} gained nothing and was dropped: {told}")
            report.end_stage("training", time.monotonic() - started)
        assert self.logits is not None
        self._commit(result, {"training": {}, "logits": {"logits": self.logits}})

    def verify(self, ids: Tensor) -> None:
        """Read the result back; raises `VerificationError` unless it is what was computed."""
        if self.report.verification is not None:
            return
        started, logits = time.monotonic(), self.logits
        self.progress("verify", 0, 1, "reading the checkpoint back")
        assert logits is not None
        self.source.release()
        self.report.verification = verify(
            self.work.checkpoint, self.report.format, ids, logits, self.fingerprints
        )
        self.progress("verify", 1, 1, "verified")
        self.report.end_stage("verification", time.monotonic() - started)
        self._commit({}, {})
