"""What a run is calibrated on: the user's rows, and among them those of the passages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit import hf, passages
from lowbit.batches import Data, find_batches
from lowbit.dataset import pack_tokens
from lowbit.errors import LowbitError
from lowbit.results import Report
from lowbit.source import Source

Folders = Callable[..., Path]
LENGTH = 24


@pytest.fixture
def source(tiny_model: Folders) -> Source:
    return Source(tiny_model("llama"), torch.float32)


def drawn(
    source: Source, spec: str, samples: int, length: int = LENGTH, mix: bool = True, method: str = "gptq"
) -> tuple[Tensor, Report]:
    """All calibration rows, in order, and the report that was told about them."""
    report = Report(source.folder, "", method, "", "")
    data = Data(spec, samples, length, 3, mix)
    found, training = find_batches(source, report, method, data, lambda *_: None)
    assert training is None
    return torch.cat(found[:-1]) if len(found) > 1 else torch.empty(0, length, dtype=torch.int64), report


def test_one_row_in_five_comes_from_the_passages(source: Source, text_file: str) -> None:
    own, told = drawn(source, text_file, 13, mix=False)
    drawn_so = f"{text_file}: 13 x {LENGTH} tokens, seed 3"
    assert told.calibration == drawn_so
    rows, told = drawn(source, text_file, 13)
    assert told.calibration == f"{drawn_so}, 2 of the rows from lowbit's passages"
    changed = [number for number, row in enumerate(rows) if not torch.equal(row, own[number])]
    assert changed == [3, 9]  # the middle of each half
    text = passages.FILE.read_text(encoding="utf-8")
    tokenizer = hf.load_tokenizer(source.folder)
    assert torch.equal(rows[changed], pack_tokens([text], tokenizer, 2, LENGTH, 3))


@pytest.mark.parametrize("samples", [1, 4])
def test_of_few_rows_none_is_taken(source: Source, text_file: str, samples: int) -> None:
    (own, _), (rows, told) = drawn(source, text_file, samples, mix=False), drawn(source, text_file, samples)
    assert torch.equal(rows, own)
    assert "passages" not in told.calibration


def test_passages_that_fill_no_row_are_left_out(
    source: Source, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    monkeypatch.setattr(passages, "FILE", tmp_path / "short.txt")
    (own, _), (rows, told) = drawn(source, text_file, 10, mix=False), drawn(source, text_file, 10)
    assert torch.equal(rows, own)
    assert told.notes == [f"lowbit's passages fill 0 rows of {LENGTH} tokens, not 2"]
    with pytest.raises(LowbitError, match="fewer than one row"):
        drawn(source, "passages", 8)


def test_the_passages_alone(source: Source) -> None:
    rows, told = drawn(source, "passages", 8, 512)
    assert told.calibration == "lowbit's passages: 8 x 512 tokens, seed 3"
    assert rows.shape == (8, 512)
    assert told.notes == []
    everything, told = drawn(source, "passages", 10**4, 512)
    assert len(everything) > 8
    assert told.notes == [f"lowbit's passages gives {len(everything)} sequences of 512 tokens, not 10000"]


def test_a_method_without_data_reads_none(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "FILE", Path("no-such-file"))
    rows, told = drawn(source, "passages", 8, method="rtn")
    assert not len(rows)
    assert told.calibration == "none: rtn uses no data"


def test_passages_are_of_many_kinds() -> None:
    """Text as anybody writes it: no control characters, no broken encoding; several scripts; enough of it."""
    text = passages.FILE.read_text(encoding="utf-8")
    assert len(text) > 50_000
    assert all(character.isprintable() or character in "\n\t\u3000\u200c\u200d" for character in text)
    for letter in "щ的まقह":
        assert letter in text
    for code in ("def ", "#include", "SELECT ", "</"):
        assert code in text
    assert 0.1 < passages.SHARE < 0.4
