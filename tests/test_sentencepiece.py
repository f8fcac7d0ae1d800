"""A tokenizer that is a `tokenizer.model` alone, as Llama's first models had it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from lowbit import hf
from lowbit.results import Report
from tests.tiny import TEXT


def test_it_is_read_and_carried_over(
    quantize: Callable[..., Report], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "text").write_text(5 * TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    output = quantize(folder, method="gptq").output
    assert (output / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    words = "The river rises in the hills"
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert hf.load_tokenizer(output)(words, add_special_tokens=False)["input_ids"] == own.encode(words)
