"""The quantized model beside the original in one block, on the same tokens: what each stage lacks.

Both streams of activations are in one `Stream`, the original's behind the quantized model's and the probe.
A block is looked at stage by stage (`correction.py`), each behind the rounding of the one before. Where the
block can be cut in two (`halves.py`), both streams carry the sum behind the first matrix that writes once
that is rounded, and what made it does not run again. What a matrix that writes has read is kept, up to a
size, so that carrying on needs no more than its product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor

from lowbit import correction, ranks
from lowbit.calibration import Group, watch
from lowbit.correction import Originals
from lowbit.halves import find_halves
from lowbit.stream import Stream
from lowbit.topology import Matrix

KEPT_BYTES = 2**30
"""Of what a matrix that writes has read, at most; nothing where memory is limited."""


class Pair:
    """One block of both models; a context, within which it may be left cut.

    Args:
        stream: Drives the block: batches of the quantized model, the probe, batches of the original.
        block: Its number.
        probe: Number of the probe among the batches.
        batches: Those of the quantized model that are this rank's.
        matrices: All of the block's that are quantized.
        groups: What they read.

    Attributes:
        stages: Groups in order of use.
        writers: Stages that write, by number, and the factor on what they write.
        uncut: Does the block run whole in every pass for want of a place to cut it? One in which nothing
            comes behind the first writer needs none.
    """

    def __init__(
        self,
        stream: Stream,
        block: int,
        probe: int,
        batches: Sequence[int],
        matrices: Sequence[Matrix],
        groups: Sequence[Group],
    ) -> None:
        self._stream, self._block, self._probe, self._batches = stream, block, probe, batches
        self._originals = Originals(matrices)
        self.stages = correction.stages(groups)
        self.writers = ranks.told(correction.find_writers(stream, block, probe, self.stages))
        first = min(self.writers, default=len(self.stages))
        last = first >= len(self.stages) - 1
        self._cut = None if last else find_halves(stream, block, probe, self.stages, first)
        self.uncut = self._cut is None and len(self.stages) > 1 and first + 1 != len(self.stages)
        self._inputs: dict[int, Tensor] = {}  # of the writer at the cut, then of the last
        self._behind = ExitStack()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *reason: object) -> None:
        self._behind.close()

    def twin(self, batch: int) -> int:
        """The same tokens, as the original carries them."""
        return self._probe + 1 + batch

    def look(self, done: int) -> None:
        """See what a stage reads and lacks, unless it was seen with the stage before."""
        for batch in self._batches:
            if done in self.writers:
                self._compare_sums(done, batch)
            elif done - 1 not in self.writers:
                self._compare_inputs(done, batch)

    def rounded(self, done: int) -> None:
        """A stage has its rounded weights: where the block is cut behind it, carry on from there."""
        if self._cut is None or self._cut.writer != done:
            return
        for batch in self._batches:
            known, stages = self._inputs.pop(batch, None), self.stages[done:]
            _, carried = self._cut.sum_behind(self._stream, self._block, batch, stages, known)
            self._stream.hidden[batch] = carried
        self._behind.enter_context(self._cut.head.silent())

    def carry(self) -> Iterator[int]:
        """Carry the quantized model's batches over the block, yielding each when it is through."""
        for batch in self._batches:
            known = self._inputs.pop(batch, None)
            if known is None or self._cut is None:
                yield from self._stream.advance(self._block, [batch])
                continue
            where, last = (self._stream, self._block, batch), self.stages[-1][0].matrices[0]
            self._stream.hidden[batch] = self._cut.output_behind(*where, last, known)
            yield batch

    def carry_twins(self) -> None:
        """Carry the original's batches over the block, where that was not done in looking at it."""
        if len(self.stages) - 1 not in self.writers:
            with self._originals:
                for _ in self._stream.advance(self._block, [self.twin(batch) for batch in self._batches]):
                    pass

    def _compare_inputs(self, done: int, batch: int) -> None:
        """What matrices that read lack: their inputs, beside the original's. If any write: only moments."""
        wanted: dict[Matrix, Tensor] = {}
        stage = self.stages[done]
        if not self.writers:
            with self._originals, watch(stage) as wanted:
                self._stream.visit(self._block, self.twin(batch))
        with watch(stage) as seen:
            self._stream.visit(self._block, batch)
        for group in stage:
            first = group.matrices[0]
            if first in seen:
                group.compare(seen[first], wanted.get(first), batch == self._probe - 1)

    def _compare_sums(self, done: int, batch: int) -> None:
        """What a stage that writes lacks: the sum behind it, beside the original's.

        The stage after it is observed on the way, unless it writes, too. Where the block is cut here or ends
        here, the twin carries its sum from now on, and what the matrix reads is kept to carry the batch.
        """
        cut = self._cut if self._cut and self._cut.writer == done else None
        sum_behind = cut.sum_behind if cut else correction.sum_behind
        stages, group = self.stages[done:], self.stages[done][0]
        with self._originals:
            _, wanted = sum_behind(self._stream, self._block, self.twin(batch), stages)
        seen, found = sum_behind(self._stream, self._block, batch, stages)
        x = seen[group.matrices[0]]
        lacking = (wanted.float() - found.float()).flatten(0, -2) / self.writers[done]
        group.lacks(x, lacking, batch == self._probe - 1)
        if done + 1 not in self.writers:
            for other in (group for stage in stages[1:2] for group in stage):
                if other.matrices[0] in seen:
                    other.add(seen[other.matrices[0]])
        if cut or len(stages) == 1:  # nothing was silent: it is the original's output
            self._stream.hidden[self.twin(batch)] = wanted
        if self._cut and (self._cut.head_direct if cut else len(stages) == 1 and self._cut.tail_direct):
            self._keep(batch, x)

    def _keep(self, batch: int, x: Tensor) -> None:
        """Remember what a matrix reads, if there is room: its half has nothing to give but its product."""
        kept = sum(known.nbytes for known in self._inputs.values())
        if not self._stream.hidden.is_limited and kept + x.nbytes <= KEPT_BYTES:
            self._inputs[batch] = x
