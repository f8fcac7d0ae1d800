"""The tokenizer of a Hugging Face folder as llama.cpp's metadata.

The gguf package reads vocabularies, special tokens, merges and the chat template. What is left to do is to
name the splitting of text before byte pairs are merged: llama.cpp has its regular expressions compiled
in, under names. The names below are given where the tokenizer's own expression is the same; any other
tokenizer is refused, since a wrong split changes the text that a model sees and nobody notices.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowbit.errors import LowbitError
from lowbit.quiet import quiet
from lowbit.untrusted import NEVER_TRUSTED

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
"""Regular expression of the first step of `pre_tokenizer` -> llama.cpp's name."""


def add_vocab(writer: Any, folder: Path, size: int) -> None:
    """Write the vocabulary of `folder`, filled up to `size` tokens (rows of the embedding).

    Args:
        writer: A `gguf.GGUFWriter`.
        folder: With `tokenizer.json` (byte-level BPE) or `tokenizer.model` (SentencePiece).
        size: Rows of the embedding.

    Raises:
        LowbitError: there is no tokenizer, or llama.cpp has none that splits text in the same way.
    """
    from gguf import SpecialVocab, TokenType

    logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of templates for pairs of texts
    if (folder / "tokenizer.model").is_file():
        from gguf.vocab import SentencePieceVocab

        entries = list(SentencePieceVocab(folder).all_tokens())
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([score for _, score, _ in entries] + [-10000.0] * (size - len(entries)))
        tokens, types = [text for text, _, _ in entries], [int(kind) for _, _, kind in entries]
    elif (folder / "tokenizer.json").is_file():
        tokenizer = _loaded(folder)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(folder, tokenizer))
        tokens, types = _byte_level(tokenizer)
    else:
        raise LowbitError(
            f"{folder} has no tokenizer.json and no tokenizer.model: copy it beside the weights"
        )
    if len(tokens) > size:
        raise LowbitError(
            f"{folder} has {len(tokens)} tokens and an embedding of {size}: get a complete copy"
        )
    padding = range(size - len(tokens))
    writer.add_token_list([*tokens, *(f"[PAD{i}]".encode() for i in padding)])
    writer.add_token_types([*types, *(int(TokenType.UNUSED) for _ in padding)])
    SpecialVocab(folder, load_merges=not (folder / "tokenizer.model").is_file()).add_to_gguf(
        writer, quiet=True
    )


def _loaded(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` as transformers runs it: some of its classes put in a splitting of their own."""
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **NEVER_TRUSTED)
        return json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LowbitError(f"{folder} has no tokenizer that transformers can load: {first_line}") from error


def _byte_level(tokenizer: dict[str, Any]) -> tuple[list[bytes], list[int]]:
    """Text and type of every token; ids that no token has are filled."""
    from gguf import TokenType

    text = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    kind = dict.fromkeys(text, TokenType.NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        text[added["id"]] = added["content"]
        kind[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    ids = range(max(text) + 1)
    tokens = [text.get(i, f"[PAD{i}]").encode() for i in ids]
    return tokens, [int(kind.get(i, TokenType.UNUSED)) for i in ids]


def _split_name(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's `pre_tokenizer`."""
    splitter = tokenizer.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    if tokenizer["model"]["type"] == "BPE" and not tokenizer["model"].get("byte_fallback"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if (
            kinds == ["Digits", "ByteLevel"]
            and steps[0]["individual_digits"]
            and steps[1].get("use_regex", True)
        ):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in SPLITS:
            return SPLITS[steps[0]["pattern"]["Regex"]]
    raise LowbitError(
        f"{folder}/tokenizer.json splits text in a way that lowbit can't name to llama.cpp: "
        "use a tokenizer of GPT-2's, SmolLM's, Llama 3's or Qwen's kind, or tokenizer.model"
    )
