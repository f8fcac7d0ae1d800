"""The token rows made of documents: cut, separated, begun with BOS, never padded."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lowbit import dataset
from lowbit.dataset import characters_for, evaluation_windows, pack_tokens
from lowbit.errors import LowbitError
from tests.tiny import TEXT, make_tokenizer

PAD, BOS, EOS = 0, 1, 2
CHAT = [{"role": "user", "content": "Who built the mill?"}, {"role": "assistant", "content": "Nobody knows."}]
LINES = [f"{line}\n" for line in TEXT.splitlines()]


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def with_bos() -> PreTrainedTokenizerFast:
    return make_tokenizer(with_bos=True, chat=True)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


class TestPackTokens:
    def test_rows_are_the_text_cut_up(self, plain: PreTrainedTokenizerFast) -> None:
        stream = ids(plain, TEXT)
        rows = pack_tokens([TEXT], plain, 10**6, 16, seed=0)
        assert rows.dtype == torch.int64
        assert len(rows) == len(stream) // 16
        expected = sorted(stream[i : i + 16] for i in range(0, len(stream) - 15, 16))
        assert sorted(rows.tolist()) == expected

    def test_one_document_ends_without_eos(self, plain: PreTrainedTokenizerFast) -> None:
        with pytest.raises(LowbitError, match="fewer than one row"):
            pack_tokens([TEXT], plain, 1, len(ids(plain, TEXT)) + 1, seed=0)

    def test_eos_stands_between_documents_and_pad_nowhere(self, plain: PreTrainedTokenizerFast) -> None:
        rows = pack_tokens([LINES[0], "", LINES[1]], plain, 1000, 8, seed=0)
        stream = [*ids(plain, LINES[0]), EOS, *ids(plain, LINES[1]), EOS]
        assert sorted(rows.tolist()) == sorted(stream[i : i + 8] for i in range(0, len(stream) - 7, 8))
        assert PAD not in rows

    def test_every_row_starts_with_bos_where_the_tokenizer_adds_it(
        self, with_bos: PreTrainedTokenizerFast
    ) -> None:
        rows = pack_tokens(LINES, with_bos, 1000, 16, seed=0)
        assert (rows[:, 0] == BOS).all()
        assert not (rows[:, 1:] == BOS).any()
        stream = [t for line in LINES for t in (*ids(with_bos, line), EOS)]
        assert sorted(rows[:, 1:].tolist()) == sorted(
            stream[i : i + 15] for i in range(0, len(stream) - 14, 15)
        )

    def test_chats_go_through_the_template(self, with_bos: PreTrainedTokenizerFast) -> None:
        rows = pack_tokens([CHAT] * 20, with_bos, 1000, 16, seed=0)
        rendered = "<|user|>\nWho built the mill?</s>\n<|assistant|>\nNobody knows.</s>\n"
        stream = ids(with_bos, rendered) * 20  # the template's own end of turn, no EOS more
        assert sorted(rows[:, 1:].tolist()) == sorted(
            stream[i : i + 15] for i in range(0, len(stream) - 14, 15)
        )

    def test_a_template_that_writes_bos_does_not_double_it(self) -> None:
        tokenizer = make_tokenizer(with_bos=True, chat=True)
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        rows = pack_tokens([CHAT] * 20, tokenizer, 1000, 16, seed=0)
        assert (rows == BOS).sum() == len(rows)

    def test_seed_decides(self, plain: PreTrainedTokenizerFast) -> None:
        first, again, other = (pack_tokens([TEXT * 4], plain, 6, 16, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == (6, 16)

    def test_rows_come_from_all_over_the_text(self, plain: PreTrainedTokenizerFast) -> None:
        text = "".join(f"{chr(97 + i // 1000)} " for i in range(26000))
        letters = set(plain.decode(pack_tokens([text], plain, 200, 16, seed=0).flatten()))
        assert len(letters - {" "}) >= 24  # the odds of missing three of 26 are below one in a million

    def test_fewer_rows_than_asked_for_are_returned(self, plain: PreTrainedTokenizerFast) -> None:
        assert len(pack_tokens([TEXT], plain, 10**6, 64, seed=0)) == len(ids(plain, TEXT)) // 64

    @staticmethod
    def spy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Every piece that is tokenized from here on."""
        seen: list[Any] = []
        encode = dataset._encode

        def record(pieces: Any, tokenizer: Any) -> Any:
            seen.extend(pieces)
            return encode(pieces, tokenizer)

        monkeypatch.setattr(dataset, "_encode", record)
        return seen

    @pytest.mark.parametrize("documents", [1, 50])
    def test_a_large_corpus_is_not_tokenized_whole(
        self, plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, documents: int
    ) -> None:
        monkeypatch.setattr(dataset, "PIECE", 500)
        monkeypatch.setattr(dataset, "characters_for", lambda samples, seq_len: 5000)
        seen = self.spy(monkeypatch)
        corpus = [TEXT * (200 // documents)] * documents
        rows = pack_tokens(corpus, plain, 8, 16, seed=0)
        assert rows.shape == (8, 16)
        assert sum(map(len, seen)) <= 5000 + 500 < sum(map(len, corpus)) / 10
        assert all(piece in corpus[0] for piece in seen)
        words = set(TEXT.split())
        assert all(word in words for piece in seen for word in piece.split()), "a word was cut"
        first = seen.copy()
        pack_tokens(corpus, plain, 8, 16, seed=1)
        assert seen[len(first) :] != first, "the seed does not decide which pieces are read"

    def test_a_text_without_blanks_can_be_cut(
        self, plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dataset, "PIECE", 100)
        monkeypatch.setattr(dataset, "characters_for", lambda samples, seq_len: 1000)
        seen = self.spy(monkeypatch)
        assert pack_tokens(["河" * 10000], plain, 4, 16, seed=0).shape == (4, 16)
        assert seen == ["河" * 100] * 10

    def test_budget_is_ample(self) -> None:
        assert characters_for(128, 2048) >= 8 * 128 * 2048
        assert characters_for(1, 8) >= 10**6

    def test_long_text_does_not_warn(
        self, plain: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        transformers_logger = logging.getLogger("transformers")
        transformers_logger.addHandler(caplog.handler)
        level = transformers_logger.level
        transformers_logger.setLevel(logging.WARNING)
        try:
            text = TEXT * 20
            assert len(ids(make_tokenizer(), text)) > plain.model_max_length
            assert "longer than" in caplog.text  # the warning exists, and the capture works
            caplog.clear()
            pack_tokens([text], make_tokenizer(), 4, 16, seed=0)
            evaluation_windows([text], make_tokenizer(), 16)
            assert not caplog.text
        finally:
            transformers_logger.setLevel(level)
            transformers_logger.removeHandler(caplog.handler)

    @pytest.mark.parametrize(
        ("documents", "samples", "seq_len", "message"),
        [
            (["mill"], 4, 64, r"the text has \d tokens, fewer than one row of seq_len=64: .* --seq-len"),
            ([""], 4, 64, "has 0 tokens"),
            ([TEXT], 0, 64, "0 samples asked for"),
            ([TEXT], 4, 2, "seq_len=2 is too short: use at least 3"),
        ],
    )
    def test_refusals(
        self,
        with_bos: PreTrainedTokenizerFast,
        documents: list[Any],
        samples: int,
        seq_len: int,
        message: str,
    ) -> None:
        with pytest.raises(LowbitError, match=message):
            pack_tokens(documents, with_bos, samples, seq_len, seed=0)

    def test_chat_refusals(self, plain: PreTrainedTokenizerFast) -> None:
        with pytest.raises(LowbitError, match="chat template, which this tokenizer lacks"):
            pack_tokens([CHAT], plain, 1, 8, seed=0)
        tokenizer = make_tokenizer(chat=True)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(LowbitError, match="roles must alternate"):
            pack_tokens([CHAT], tokenizer, 1, 8, seed=0)


class TestEvaluationWindows:
    def test_windows_cover_the_text_in_order(self, plain: PreTrainedTokenizerFast) -> None:
        stream = ids(plain, TEXT)
        windows = evaluation_windows([TEXT], plain, 16)
        assert windows.flatten().tolist() == stream[: len(stream) // 16 * 16]

    def test_documents_are_joined_by_blank_lines(self, plain: PreTrainedTokenizerFast) -> None:
        windows = evaluation_windows(["One.\n", "", " Two."] * 10, plain, 8)
        stream = ids(plain, "\n\n".join(["One.\n", "", " Two."] * 10))
        assert windows.flatten().tolist() == stream[: len(stream) // 8 * 8]

    def test_bos_opens_every_window(self, with_bos: PreTrainedTokenizerFast) -> None:
        windows = evaluation_windows([TEXT], with_bos, 16)
        stream = ids(with_bos, TEXT)
        assert (windows[:, 0] == BOS).all()
        assert windows[:, 1:].flatten().tolist() == stream[: len(stream) // 15 * 15]
        assert not (windows == PAD).any()

    def test_chats(self, with_bos: PreTrainedTokenizerFast) -> None:
        windows = evaluation_windows([CHAT] * 4, with_bos, 16)
        stream = ids(with_bos, with_bos.apply_chat_template(CHAT, tokenize=False) * 4)
        assert windows[:, 1:].flatten().tolist() == stream[: len(stream) // 15 * 15]

    def test_the_first_windows(self, plain: PreTrainedTokenizerFast) -> None:
        everything = evaluation_windows([TEXT], plain, 16)
        assert torch.equal(evaluation_windows([TEXT], plain, 16, windows=3), everything[:3])
        assert torch.equal(evaluation_windows([TEXT], plain, 16, windows=10**6), everything)

    def test_refusals(self, plain: PreTrainedTokenizerFast) -> None:
        with pytest.raises(LowbitError, match="fewer than one row of seq_len=2048"):
            evaluation_windows([TEXT], plain, 2048)
        with pytest.raises(LowbitError, match="0 samples"):
            evaluation_windows([TEXT], plain, 16, windows=0)
