"""The token batches of a run: calibration data, and one short text to verify the result with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowbit import hf, passages, sampling
from lowbit.algorithms import ALGORITHMS
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


def find_batches(
    source: Source,
    report: Report,
    method: str,
    dataset: str | None,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress,
    training_samples: int = 0,
    at_once: int | None = None,
    mix: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """The data of a run, in batches of `at_once` tokens; where that is None, memory is not limited.

    With `mix`, a share of the calibration rows is replaced by rows of the passages.

    Returns:
        Calibration batches, then one short text that serves to verify the result; and rows for
        training, int64 `[rows, seq_len]`, None where none were asked for. They are other rows than
        those of the calibration, to which the rounded model is fitted already; where the text is too
        short for that, a note says so and they are the same.
    """
    tokenizer = hf.load_tokenizer(source.folder)
    probe = torch.tensor([tokenizer(PROBE).input_ids[:64]])
    calibrated = ALGORITHMS[method].NEEDS_HESSIAN
    if not calibrated and not training_samples:
        report.calibration = f"none: {method} uses no data"
        return [probe], None
    wanted, samples = samples, samples * calibrated + training_samples
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise LowbitError(
            f"--seq-len {seq_len} is more than the model's {longest} positions: use at most that"
        )
    spec, tokens = _draw(source, report, tokenizer, dataset, samples, seq_len, seed, progress, at_once)
    if len(tokens) < samples and spec != PASSAGES:  # all of it was asked for
        report.notes.append(f"{spec} gives {len(tokens)} sequences of {seq_len} tokens, not {samples}")
    rounding, mixed = tokens[: wanted if calibrated else 0], 0
    if mix and spec != PASSAGES:
        rounding, mixed = passages.mixed(rounding, tokenizer, seed)
    report.calibration = f"{spec}: {len(rounding) or len(tokens)} x {seq_len} tokens, seed {seed}"
    report.calibration += f", {mixed} of the rows from lowbit's passages" if mixed else ""
    # Eight batches or more where that can be had: one of them is held out by a method that corrects.
    per_batch = max(1, min((at_once or TOKENS_PER_BATCH) // seq_len, len(rounding) // 8))
    batches = [*rounding.split(per_batch), probe] if calibrated else [probe]
    if not training_samples:
        return batches, None
    training = tokens[len(rounding) :]
    if len(training) < training_samples // 4:
        report.notes.append(f"{spec} has no more rows: scales are trained on the calibration's own")
        training = tokens
    return batches, training


def _draw(
    source: Source,
    report: Report,
    tokenizer: PreTrainedTokenizerBase,
    spec: str | None,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress,
    at_once: int | None,
) -> tuple[str, Tensor]:
    """Which text it is in the end, and its rows."""
    if spec is None:
        try:
            return DEFAULT_DATASET, draw_rows(DEFAULT_DATASET, tokenizer, samples, seq_len, seed)
        except LowbitError:
            if at_once is not None or not source.whole:
                raise
            report.notes.append(
                f"{DEFAULT_DATASET} could not be reached: calibrated on text sampled from the model itself"
            )
            spec = "self"
    if spec != "self":
        return spec, draw_rows(spec, tokenizer, samples, seq_len, seed)
    with quiet():
        whole = hf.load_stock(source.folder, source.dtype)
    return spec, sampling.sample_from_model(
        whole, tokenizer, samples, seq_len, seed, lambda n, of: progress("sample", n, of, "writing text")
    )


def draw_rows(spec: str, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int) -> Tensor:
    """Calibration rows of a text or of the passages, int64 `[rows, seq_len]`; `samples` of them, or all."""
    if spec == PASSAGES:
        return passages.read_tokens(tokenizer, samples, seq_len, seed)
    documents = read_documents(spec, max_characters=characters_for(samples, seq_len))
    return pack_tokens(documents, tokenizer, samples, seq_len, seed)
