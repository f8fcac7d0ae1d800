"""Text that is part of the package, and how it gets among the calibration rows.

Whatever text a model is calibrated on, it will read other text, too. So up to one calibration row in five
comes from passages of many kinds and languages: what they have in common with the text costs it nothing, and
what they hold besides is what the text alone would leave to chance (docs/ACCURACY.md). Alone they serve
`--effort fast`, which needs no data then.

They were written for this and hold some 20,000 tokens, most of them English: prose, code, mathematics,
conversations, and some in 26 other languages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.dataset import pack_tokens
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = Path(__file__).with_suffix(".txt")
SHARE = 0.2
"""Of the calibration rows."""


def read_tokens(tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int) -> Tensor:
    """Rows of passages, int64 `[rows, seq_len]`: as many as asked for, or as there are.

    Raises:
        LowbitError: they are shorter than one row.
    """
    return pack_tokens([FILE.read_text(encoding="utf-8")], tokenizer, samples, seq_len, seed)


def share_of(rows: int) -> int:
    """How many of so many calibration rows are to be passages."""
    return int(rows * SHARE)


def mixed(rows: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Tensor, int]:
    """Calibration rows, int64 `[rows, length]`, some of them replaced by passages; and how many.

    They lie at even distances. No more are replaced than the passages fill, none where a fifth of the rows is
    less than one.
    """
    wanted, length = share_of(len(rows)), rows.shape[1]
    if not wanted:
        return rows, 0
    try:
        found = read_tokens(tokenizer, wanted, length, seed)
    except LowbitError:
        return rows, 0
    middles = (torch.arange(len(found), dtype=torch.float64) + 0.5) * (len(rows) / len(found))
    return rows.index_copy(0, middles.long(), found), len(found)
