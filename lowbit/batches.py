"""The token batches of a run: calibration data, and one short text to verify the result with.

Rows are drawn from all of a local text, whatever its size: it is read to its end, and a sample of it is kept
and tokenized. Of a hub's dataset only the beginning is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from operator import itemgetter
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowbit import hf, passages, ranks, sampling
from lowbit.algorithms import ALGORITHMS, ONE_PASS
from lowbit.dataset import (
    PIECE,
    Document,
    characters_for,
    characters_in,
    each_document,
    full_name,
    pack_tokens,
    read_documents,
)
from lowbit.effort import PASSAGES
from lowbit.errors import LowbitError
from lowbit.progress import Progress
from lowbit.quiet import quiet
from lowbit.results import Report
from lowbit.source import Source

DEFAULT_DATASET = "NeelNanda/pile-10k"
TOKENS_PER_BATCH = 4096
PROBE = (
    "The river rises in the hills north of the town and runs for sixty miles to the sea. In 1412 "
    "there were three mills on its banks:\n\n    def area(width, height):\n        return width * height\n"
)


@dataclass(frozen=True)
class Data:
    """What to calibrate on.

    Attributes:
        dataset: Text, as in `quantize`.
        samples: Rows.
        seq_len: Tokens of each.
        seed: Which rows of the text.
        mix: Take a share of the rows from the passages.

    Raises:
        LowbitError: no generator takes that seed.
    """

    dataset: str | None
    samples: int
    seq_len: int
    seed: int
    mix: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise LowbitError(f"--seed {self.seed} can't be used: give one from 0 to {2**63 - 1}")


def find_batches(
    source: Source,
    report: Report,
    method: str,
    data: Data,
    progress: Progress,
    training_samples: int = 0,
    at_once: int | None = None,
    device: str | torch.device = "cpu",
    least: int | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The data of a run, in batches of `at_once` tokens; where that is None, memory is not limited.

    On `device` the model writes text, where it has to write its own. Where the text is too short for both,
    calibration makes do with `least` rows, if that leaves some to train on.

    Returns:
        Calibration batches, then one short text that serves to verify the result; and rows for
        training, int64 `[rows, seq_len]`, None where none were asked for. They are other rows than
        those of the calibration, to which the rounded model is fitted already; where the text is too
        short for that, a note says so and they are the same. None of them is a passage.
    """
    tokenizer = hf.load_tokenizer(source.folder)
    probe = torch.tensor([tokenizer(PROBE).input_ids[:64]])
    calibrated = ALGORITHMS[method].NEEDS_HESSIAN
    if not calibrated and not training_samples:
        report.calibration = f"none: {method} uses no data"
        return [probe], None
    samples, seq_len = data.samples * calibrated + training_samples, data.seq_len
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise LowbitError(
            f"--seq-len {seq_len} is more than the model's {longest} positions: use at most that"
        )
    asked = replace(data, samples=samples)
    spec, tokens = _draw(source, report, tokenizer, asked, progress, at_once, device)
    name = "lowbit's passages" if spec == PASSAGES else spec
    if len(tokens) < samples:
        report.notes.append(f"{name} gives {len(tokens)} sequences of {seq_len} tokens, not {samples}")
    wanted = data.samples * calibrated
    if len(tokens) - wanted < training_samples // 4:
        wanted = min(wanted, max(least or wanted, len(tokens) - training_samples))
    rounding = tokens[:wanted]
    report.calibration = f"{name}: {len(rounding) or len(tokens)} x {seq_len} tokens, seed {data.seed}"
    if data.mix and spec != PASSAGES:
        rounding = _mix(rounding, tokenizer, data, report)
    # Eight batches or more where that can be had: one of them is held out by a method that corrects.
    # Who is in a hurry takes all at once.
    least = ranks.size() if method in ONE_PASS else 8
    per_batch = max(1, min((at_once or TOKENS_PER_BATCH) // seq_len, len(rounding) // least))
    batches = [*rounding.split(per_batch), probe] if calibrated else [probe]
    if not training_samples:
        return batches, None
    training = tokens[len(rounding) :]
    if len(training) < training_samples // 4:
        report.notes.append(
            f"{spec} has no more rows: scales are trained and judged on rows that it was calibrated on"
        )
        training = tokens
    return batches, training


def _draw(
    source: Source,
    report: Report,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    progress: Progress,
    at_once: int | None,
    device: str | torch.device,
) -> tuple[str, Tensor]:
    """Which text it is in the end, and its rows."""
    spec, asked = data.dataset, (tokenizer, data.samples, data.seq_len, data.seed)
    told = "writing text"
    if spec is None:
        try:
            return DEFAULT_DATASET, draw_rows(DEFAULT_DATASET, *asked)
        except LowbitError:
            if at_once is not None or not source.whole:
                raise
            reason = f"{DEFAULT_DATASET} could not be reached"
            report.notes.append(f"{reason}: calibrated on text sampled from the model itself")
            spec, told = "self", f"{reason}: the model writes the text itself"
    if spec != "self":
        return spec, draw_rows(spec, *asked)
    # Loading and the first tokens take a while: who waits for them knows why.
    progress("sample", 0, data.samples * data.seq_len, told)
    with quiet():
        whole = hf.load_stock(source.folder, source.dtype, device)
    return spec, sampling.sample_from_model(whole, *asked, lambda n, of: progress("sample", n, of, told))


def _mix(rows: Tensor, tokenizer: PreTrainedTokenizerBase, data: Data, report: Report) -> Tensor:
    """Rows with the passages' share among them; the report says how many."""
    rows, mixed = passages.mixed(rows, tokenizer, data.seed)
    wanted = passages.share_of(len(rows))
    if mixed < wanted:
        report.notes.append(f"lowbit's passages fill {mixed} rows of {data.seq_len} tokens, not {wanted}")
    report.calibration += f", {mixed} of the rows from lowbit's passages" if mixed else ""
    return rows


def draw_rows(spec: str, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int) -> Tensor:
    """Calibration rows of a text or of the passages, int64 `[rows, seq_len]`; `samples` of them, or all."""
    if spec == PASSAGES:
        return passages.read_tokens(tokenizer, samples, seq_len, seed)
    documents = _documents(full_name(spec, "train"), characters_for(samples, seq_len), seed)
    return pack_tokens(documents, tokenizer, samples, seq_len, seed)


def _documents(spec: str, characters: int, seed: int) -> list[Document]:
    """All of a local text or, where it is longer, so many characters from all over it; a hub's first ones."""
    if not Path(spec).is_file() and not Path(spec.partition(":")[0]).is_dir():
        return read_documents(spec, max_characters=characters)
    documents = read_documents(spec, max_characters=characters + 1)
    if sum(map(characters_in, documents)) <= characters:
        return documents
    found = _sampled(_pieces(spec), characters, seed)
    return ["".join(map(str, found))] if Path(spec).suffix == ".txt" else found


def _pieces(spec: str) -> Iterator[Document]:
    """A local text to its end, in pieces that are kept or left out together."""
    if Path(spec).suffix == ".txt":
        yield from _between_words(map(str, each_document(spec, part=PIECE)))
        return
    for document in each_document(spec):
        if isinstance(document, str) and len(document) > PIECE:
            yield from _between_words(document[at : at + PIECE] for at in range(0, len(document), PIECE))
        elif characters_in(document):
            yield document


def _between_words(parts: Iterable[str]) -> Iterator[str]:
    """The same text, without words that are cut in two; one without blanks is cut anywhere."""
    rest = ""
    for part in parts:
        text = rest + part
        end = max(text.rfind(" "), 0) if len(part) == PIECE else 0
        yield text[: end or None]
        rest = text[end:] if end else ""
    if rest:
        yield rest


def _sampled(pieces: Iterable[Document], characters: int, seed: int) -> list[Document]:
    """A seeded sample of so many characters at most, in order; memory holds no more than that.

    Every piece draws a number, and those with the lowest ones stay.
    """
    random, limit, size = Random(seed), 1.0, 0
    kept: list[tuple[float, int, Document]] = []  # a heap with the highest number on top
    for place, piece in enumerate(pieces):
        number = random.random()
        if number >= limit:
            continue
        heappush(kept, (-number, place, piece))
        size += characters_in(piece)
        while size > characters and len(kept) > 1:
            highest, _, dropped = heappop(kept)
            limit, size = -highest, size - characters_in(dropped)
    return [piece for *_, piece in sorted(kept, key=itemgetter(1))]
