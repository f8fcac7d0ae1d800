"""The token batches of a run: calibration data, and one short text to verify the result with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowbit import hf, passages, ranks, sampling
from lowbit.algorithms import ALGORITHMS, ONE_PASS
from lowbit.blocks import Progress
from lowbit.dataset import characters_for, pack_tokens, read_documents
from lowbit.effort import PASSAGES
from lowbit.errors import LowbitError
from lowbit.quiet import quiet
from lowbit.results import Report
from lowbit.source import Source

DEFAULT_DATASET = "NeelNanda/pile-10k"
TOKENS_PER_BATCH = 4096
PROBE = (
    "The river rises in the hills north of the town and runs for sixty miles to the sea. In 1412 "
    "there were three mills on its banks:\n\n    def area(width, height):\n        return width * height\n"
)


class Data(NamedTuple):
    """What to calibrate on.

    Attributes:
        dataset: Text, as in `quantize`.
        samples: Rows.
        seq_len: Tokens of each.
        seed: Which rows of the text.
        mix: Take a share of the rows from the passages.
    """

    dataset: str | None
    samples: int
    seq_len: int
    seed: int
    mix: bool = True


def find_batches(
    source: Source,
    report: Report,
    method: str,
    data: Data,
    progress: Progress,
    training_samples: int = 0,
    at_once: int | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The data of a run, in batches of `at_once` tokens; where that is None, memory is not limited.

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
    spec, tokens = _draw(source, report, tokenizer, data._replace(samples=samples), progress, at_once)
    name = "lowbit's passages" if spec == PASSAGES else spec
    if len(tokens) < samples:
        report.notes.append(f"{name} gives {len(tokens)} sequences of {seq_len} tokens, not {samples}")
    rounding = tokens[: data.samples if calibrated else 0]
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
        report.notes.append(f"{spec} has no more rows: scales are trained on rows that it was calibrated on")
        training = tokens
    return batches, training


def _draw(
    source: Source,
    report: Report,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    progress: Progress,
    at_once: int | None,
) -> tuple[str, Tensor]:
    """Which text it is in the end, and its rows."""
    spec, asked = data.dataset, (tokenizer, data.samples, data.seq_len, data.seed)
    if spec is None:
        try:
            return DEFAULT_DATASET, draw_rows(DEFAULT_DATASET, *asked)
        except LowbitError:
            if at_once is not None or not source.whole:
                raise
            report.notes.append(
                f"{DEFAULT_DATASET} could not be reached: calibrated on text sampled from the model itself"
            )
            spec = "self"
    if spec != "self":
        return spec, draw_rows(spec, *asked)
    with quiet():
        whole = hf.load_stock(source.folder, source.dtype)
    return spec, sampling.sample_from_model(
        whole, *asked, lambda n, of: progress("sample", n, of, "writing text")
    )


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
    documents = read_documents(spec, max_characters=characters_for(samples, seq_len))
    return pack_tokens(documents, tokenizer, samples, seq_len, seed)
