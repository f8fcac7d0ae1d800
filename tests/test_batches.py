"""What a run is calibrated on: the user's rows, and among them those of the passages."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from torch import Tensor

from lowbit import batches, dataset, hf, passages
from lowbit.batches import Data, draw_rows, find_batches
from lowbit.dataset import pack_tokens, read_documents
from lowbit.errors import LowbitError
from lowbit.results import Report
from lowbit.source import Source
from tests.tiny import make_tokenizer

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


@pytest.mark.parametrize(
    ("samples", "rounded", "trained"), [(16, 16, 16), (24, 24, 8), (30, 12, 20), (40, 12, 20)]
)
def test_a_text_too_short_for_both_leaves_rows_to_train_on(
    source: Source, monkeypatch: pytest.MonkeyPatch, samples: int, rounded: int, trained: int
) -> None:
    """It has 32 rows; as many as are calibrated on are to be trained on."""
    rows = torch.arange(32 * 8).reshape(32, 8)
    monkeypatch.setattr(batches, "draw_rows", lambda spec, tokenizer, samples, *rest: rows[:samples])
    report, data = Report(source.folder, "", "gptq", "", ""), Data("text", samples, 8, 0, mix=False)
    found, training = find_batches(source, report, "gptq", data, lambda *_: None, samples, least=12)
    assert training is not None
    assert (sum(map(len, found[:-1])), len(training)) == (rounded, trained)


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


# --- from where in a text the rows are drawn

LETTERS = string.ascii_lowercase[:20]
KINDS = ("txt", "jsonl", "one document", "chats", "parquet", "folder")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dataset.Document]:
    """Everything is small: 4000 characters are plenty, in pieces of 200. Holds what is tokenized."""
    for module in (batches, dataset):
        monkeypatch.setattr(module, "characters_for", lambda samples, seq_len: 4000)
        monkeypatch.setattr(module, "PIECE", 200, raising=False)
    seen: list[dataset.Document] = []
    encode = dataset._encode
    monkeypatch.setattr(dataset, "_encode", lambda pieces, t: (seen.extend(pieces), encode(pieces, t))[1])
    return seen


def write(folder: Path, kind: str, texts: list[str]) -> str:
    """One text after the other in a file, or a folder, of a kind."""
    path = folder / f"text.{kind if kind in ('txt', 'parquet') else 'jsonl'}"
    if kind == "txt":
        path.write_text("".join(texts), encoding="utf-8")
    elif kind in ("parquet", "folder"):
        path = path if kind == "parquet" else folder / "train-00000.parquet"
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        texts = ["".join(texts)] if kind == "one document" else texts
        rows = [
            {"messages": [{"role": "user", "content": t}]} if kind == "chats" else {"text": t} for t in texts
        ]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(folder if kind == "folder" else path)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_from_all_over_a_local_text(
    tmp_path: Path, seen: list[dataset.Document], kind: str
) -> None:
    """Sorted by topic, and ten times what is plenty: one letter after the other."""
    spec = write(tmp_path, kind, [f"{letter} " * 90 for letter in LETTERS for _ in range(11)])
    tokenizer = make_tokenizer(chat=True)
    rows = draw_rows(spec, tokenizer, 10**4, 16, seed=0)
    found = set(tokenizer.decode(rows.flatten()).replace("user", "").replace("</s>", "")) & set(LETTERS)
    assert len(found) >= 8  # of 20 pieces; fewer in one of a million draws
    assert found & set(LETTERS[:5])
    assert found & set(LETTERS[-5:])
    assert 3000 < sum(map(dataset.characters_in, seen)) <= 4000, "no more than is plenty is tokenized"
    assert torch.equal(draw_rows(spec, tokenizer, 10**4, 16, seed=0), rows)
    assert not torch.equal(draw_rows(spec, tokenizer, 10**4, 16, seed=1)[: len(rows)], rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_not_longer_is_read_whole(
    tmp_path: Path, seen: list[dataset.Document], kind: str
) -> None:
    texts = [f"{letter} of the mill\r\n" * 9 for letter in LETTERS]
    total = sum(map(len, texts))
    texts[3] += "x" * (4000 - total)
    assert sum(map(len, texts)) == 4000
    spec, tokenizer = write(tmp_path, kind, texts), make_tokenizer(chat=True)
    rows = draw_rows(spec, tokenizer, 100, 16, seed=5)
    assert torch.equal(rows, pack_tokens(read_documents(spec), tokenizer, 100, 16, seed=5))
    assert sum(map(dataset.characters_in, seen)) == 8000


@pytest.mark.parametrize("kind", ["txt", "one document"])
def test_no_word_is_cut(tmp_path: Path, seen: list[dataset.Document], kind: str) -> None:
    words = [f"{number:05}" for number in range(5000)]
    spec = write(tmp_path, kind, [" ".join(words)])
    draw_rows(spec, make_tokenizer(), 100, 16, seed=0)
    found = " ".join(map(str, seen)).split()
    assert set(found) <= set(words)
    assert found == sorted(found)
    assert " ".join(map(str, batches._pieces(spec))).split() == words


def test_a_text_without_blanks(tmp_path: Path, seen: list[dataset.Document]) -> None:
    spec = write(tmp_path, "txt", ["\u6cb3" * 9000])
    assert len(draw_rows(spec, make_tokenizer(), 4, 16, seed=0)) == 4
    assert seen == ["\u6cb3" * 4000]


def test_a_document_that_is_larger_than_the_sample(tmp_path: Path, seen: list[dataset.Document]) -> None:
    """A chat is never cut: of several too large ones one is drawn."""
    spec = write(tmp_path, "chats", [f"{letter} " * 3000 for letter in LETTERS])
    assert len(draw_rows(spec, make_tokenizer(chat=True), 10, 16, seed=0)) == 10
    assert len(seen) == 1


def test_every_piece_is_as_likely_as_any_other() -> None:
    counts = torch.zeros(50)
    for seed in range(600):
        taken = [int(piece) for piece in batches._sampled((f"{n:04}" for n in range(50)), 40, seed)]
        assert taken == sorted(taken)
        assert len(taken) == 10
        counts[taken] += 1
    assert counts.mean() == 120
    assert (counts - 120).abs().max() < 5 * (600 * 0.2 * 0.8) ** 0.5


def test_of_a_hub_only_the_beginning_is_fetched(
    seen: list[dataset.Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []

    def rows(*_: object, **__: object) -> Iterator[dict[str, str]]:
        for number in range(10**9):
            fetched.append(number)
            yield {"text": f"row {number} "}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert len(draw_rows("org/name", make_tokenizer(), 10, 16, seed=0)) == 10
    assert sum(map(len, map(str, seen))) == sum(len(f"row {n} ") for n in fetched) < 4010


# --- where there is no text


@pytest.mark.parametrize("spec", [None, "self"])
def test_the_model_writes_on_the_device_of_the_run_and_the_reason_is_told_first(
    source: Source, monkeypatch: pytest.MonkeyPatch, spec: str | None
) -> None:
    happened: list[object] = []

    def load(folder: Path, dtype: torch.dtype, device: object) -> object:
        happened.append(device)
        return hf_load_stock(folder, dtype)

    hf_load_stock = hf.load_stock
    monkeypatch.setattr(hf, "load_stock", load)
    report = Report(source.folder, "", "gptq", "", "")
    data, device = Data(spec, 4, LENGTH, 0), torch.device("cuda:1")
    find_batches(source, report, "gptq", data, lambda *told: happened.append(told), device=device)
    reason = "NeelNanda/pile-10k could not be reached: the model writes the text itself"
    detail = "writing text" if spec else reason
    total = 4 * LENGTH
    assert happened[:2] == [("sample", 0, total, detail), device]
    assert happened[-1] == ("sample", total, total, detail)
