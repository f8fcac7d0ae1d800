"""Documents from files, dataset folders and the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from lowbit.dataset import full_name, read_documents
from lowbit.errors import LowbitError

CHAT = [{"role": "user", "content": "Who built the mill?"}, {"role": "assistant", "content": "Nobody knows."}]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


class TestReadDocuments:
    def test_txt_is_one_document_byte_for_byte(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("één\r\n\n two\n".encode())
        assert read_documents(str(path)) == ["één\r\n\n two\n"]
        assert read_documents(str(path), max_characters=4) == ["één\r"]

    def test_jsonl_text(self, tmp_path: Path) -> None:
        path = write_jsonl(
            tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": None}, {"text": "four"}]
        )
        assert read_documents(path) == ["one", "", "", "four"]
        assert read_documents(path, limit=1) == ["one"]
        assert read_documents(path, max_characters=4) == ["one", "", "", "four"]
        assert read_documents(path, max_characters=3) == ["one"]

    @pytest.mark.parametrize("column", ["messages", "conversations"])
    def test_parquet_chat(self, tmp_path: Path, column: str) -> None:
        path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], column: [CHAT, CHAT[:1]]})
        assert read_documents(path) == [CHAT, CHAT[:1]]

    def test_parquet_text(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"], "n": [1, 2]})
        assert read_documents(path) == ["one", "two"]

    def test_sentences(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", {"sentence": ["one", "two"], "n": [1, 2]})
        assert read_documents(path) == ["one", "two"]

    def test_sharegpt_spelling_becomes_roles(self, tmp_path: Path) -> None:
        chat = [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Ho"},
            {"from": "system", "value": "x"},
        ]
        [found] = read_documents(write_jsonl(tmp_path / "a.jsonl", [{"conversations": chat}]))
        assert [turn["role"] for turn in found] == ["user", "assistant", "system"]
        assert [turn["content"] for turn in found] == ["Hi", "Ho", "x"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.txt", None, "no such file"),
            ("a.csv", b"text\nx\n", r"unknown extension '.csv': use one of .txt, .jsonl, .parquet"),
            ("a.txt", b" \n", "holds no text"),
            ("a.txt", b"ab\xff", r"not UTF-8 text near b'ab\\xff': convert it"),
            (
                "a.txt",
                b"x" * 9000 + b"caf\xe9 au lait" + b"y" * 9000,
                r"near b'xxxxxcaf\\xe9 au lai': convert it",
            ),
            ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON"),
            ("a.jsonl", b"[1]\n", r"a.jsonl:1: not a JSON object"),
            ("a.jsonl", b"\n", "holds no text"),
            (
                "a.jsonl",
                b'{"body": "x", "id": 1}\n',
                "no text column among body, id: name it text, messages or",
            ),
            ("a.jsonl", b'{"messages": ["x"]}\n', "'messages' does not hold turns of role and text"),
            ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "does not hold turns of role and text"),
            ("a.jsonl", b'{"messages": [{"role": "user", "content": [{}]}]}\n', "does not hold turns"),
            ("a.parquet", b"PAR", "not a Parquet file"),
        ],
    )
    def test_refusals(self, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LowbitError, match=message) as caught:
            read_documents(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_local_dataset_folder(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}-00000.parquet", {"text": [split, "more"]})
        assert read_documents(str(tmp_path)) == ["train", "more"]
        assert read_documents(str(tmp_path), "test", limit=1) == ["test"]
        assert read_documents(f"{tmp_path}::test") == ["test", "more"]
        with pytest.raises(LowbitError, match="split 'absent'"):
            read_documents(str(tmp_path), "absent")


class TestHub:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Stand in for the hub; what was asked for and how many rows were pulled."""
        calls: list[Any] = []

        def rows() -> Iterator[dict[str, str]]:
            for number in range(10**9):
                calls.append(number)
                yield {"text": f"row {number}"}

        def load_dataset(
            name: str, config: str | None, *, split: str, streaming: bool, **at: str
        ) -> Iterator[dict[str, str]]:
            calls.append((name, config, split, streaming, *at.values()))
            return rows()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    @pytest.mark.parametrize(
        ("spec", "asked"),
        [
            ("org/name", ("org/name", None, "train", True)),
            ("org/name:config", ("org/name", "config", "train", True)),
            ("org/name:config:test", ("org/name", "config", "test", True)),
            ("org/name::test", ("org/name", None, "test", True)),
        ],
    )
    def test_fetches_only_what_is_needed(self, calls: list[Any], spec: str, asked: tuple[Any, ...]) -> None:
        assert read_documents(spec, limit=3) == ["row 0", "row 1", "row 2"]
        assert calls == [asked, 0, 1, 2]

    @pytest.mark.parametrize(
        ("name", "asked"),
        [
            ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True)),
            ("c4", ("allenai/c4", "en", "validation", True)),
            (
                "ptb",
                ("ptb-text-only/ptb_text_only", "penn_treebank", "test", True, "refs/convert/parquet"),
            ),
        ],
    )
    def test_short_names(self, calls: list[Any], name: str, asked: tuple[Any, ...]) -> None:
        assert read_documents(name, "test", limit=2) == ["row 0", "row 1"]
        assert read_documents(full_name(name), limit=1) == ["row 0"]
        assert calls == [asked, 0, 1, asked, 0]

    def test_a_short_name_never_calibrates_on_what_it_measures(self, calls: list[Any]) -> None:
        read_documents("wikitext2", max_characters=1)
        assert calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True)

    def test_c4_stops_where_the_usual_protocol_does(self, calls: list[Any]) -> None:
        assert len(read_documents("c4", "test")) == 1100
        assert calls[-1] == 1099

    def test_stops_at_characters(self, calls: list[Any]) -> None:
        assert len(read_documents("org/name", max_characters=11)) == 3
        assert calls[-1] == 2

    def test_failure_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("Couldn't reach 'org/name' on the Hub\nand more")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            LowbitError, match=r"'org/name:c'.*Couldn't reach.*Hub; give wikitext2, c4, ptb, org/name:config"
        ) as caught:
            read_documents("org/name:c")
        assert "\n" not in str(caught.value)
