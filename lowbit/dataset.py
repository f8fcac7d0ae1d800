"""Text in, token rows out, for calibration and for perplexity.

A *document* is a string or a chat (a list of `{"role", "content"}` turns). `read_documents` finds
them; two functions turn them into an int64 tensor `[rows, seq_len]` that never holds padding:

- `pack_tokens` for calibration: documents end to end, cut into full rows, rows drawn at random.
- `evaluation_windows` for perplexity: the whole text in order, windows that do not overlap.

A row begins with what the model's tokenizer puts before every text: BOS for Llama and Gemma,
nothing for Qwen and GPT-2. Gemma's perplexity without BOS is meaningless, and calibration must see
the outsized activations of the first token that the model sees in use.

Work is bounded by what is asked for, not by the size of the corpus: hub datasets are streamed as far as
needed, and only a seeded sample of a large text is tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document: TypeAlias = "str | list[dict[str, str]]"

EXTENSIONS = (".txt", ".jsonl", ".parquet")
CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "sentence")
# Texts that papers measure perplexity on: dataset, held-out split, and how many of its documents are read
# (c4's validation split has 365,000; the usual protocol stops at 1100). Calibration takes the train split.
SHORT_NAMES: dict[str, tuple[str, str, int | None]] = {
    "wikitext2": ("Salesforce/wikitext:wikitext-2-raw-v1", "test", None),
    "c4": ("allenai/c4:en", "validation", 1100),
    "ptb": ("ptb-text-only/ptb_text_only@refs/convert/parquet:penn_treebank", "test", None),
}
ROLES = {"human": "user", "gpt": "assistant"}  # the ShareGPT spelling of the usual roles
PIECE = 2**16  # characters of a long document that are kept or left out together


def characters_for(samples: int, seq_len: int) -> int:
    """Characters that are plenty for `samples` rows of `seq_len` tokens: no more are tokenized."""
    return max(2**21, 16 * samples * seq_len)


def full_name(spec: str, split: str = "test") -> str:
    """The dataset behind a short name; any other text stays as it is.

    >>> full_name("c4"), full_name("c4", "train"), full_name("held-out.txt")
    ('allenai/c4:en:validation', 'allenai/c4:en:train', 'held-out.txt')
    """
    if spec not in SHORT_NAMES:
        return spec
    dataset, held_out, _ = SHORT_NAMES[spec]
    return f"{dataset}:{held_out if split == 'test' else split}"


def read_documents(
    spec: str, split: str = "train", limit: int | None = None, max_characters: int | None = None
) -> list[Document]:
    """Read the documents of a local file or of a dataset on the Hugging Face hub.

    Args:
        spec: A `.txt` file (one document), a `.jsonl` or `.parquet` file, or a hub dataset (or its
            local folder) as `org/name`, `org/name:config` or `org/name:config:split`, its name
            followed by `@revision` if need be, or one of `SHORT_NAMES`. Rows need a column `text`,
            `sentence`, `messages` or `conversations`. Empty rows are kept, as the perplexity protocol
            of WikiText wants them.
        split: Split of a hub dataset where `spec` names none.
        limit: Read at most this many documents.
        max_characters: Stop after the document with which this many characters are reached; a
            `.txt` file is cut there.

    Raises:
        LowbitError: no such file, extension, dataset or column; the hub is out of reach; no text.
    """
    if spec in SHORT_NAMES and limit is None and split == "test":
        limit = SHORT_NAMES[spec][2]
    spec = full_name(spec, split)
    path = Path(spec)
    if path.suffix in EXTENSIONS and not path.is_file():
        raise LowbitError(f"{spec}: no such file")
    if path.is_file() and path.suffix not in EXTENSIONS:
        raise LowbitError(f"{spec}: unknown extension {path.suffix!r}: use one of {', '.join(EXTENSIONS)}")
    documents = _collect(each_document(spec, split, max_characters), limit, max_characters)
    if not any(d.strip() if isinstance(d, str) else d for d in documents):
        raise LowbitError(f"{spec}: holds no text")
    return documents


def _collect(documents: Iterator[Document], limit: int | None, max_characters: int | None) -> list[Document]:
    found: list[Document] = []
    characters = 0
    for document in islice(documents, limit):
        found.append(document)
        characters += characters_in(document)
        if max_characters is not None and characters >= max_characters:
            break
    return found


def each_document(spec: str, split: str = "train", part: int | None = None) -> Iterator[Document]:
    """What `read_documents` lists, one by one; with `part` a `.txt` file in parts of so many characters."""
    read = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(Path(spec).suffix)
    try:
        if Path(spec).suffix == ".txt":
            with open(spec, encoding="utf-8", newline="") as file:
                while text := file.read(part):
                    yield text
            return
        for row in read(spec) if read else _dataset_rows(spec, split):
            yield _document(row, spec)
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 8) : error.start + 8]
        raise LowbitError(f"{spec}: not UTF-8 text near {near!r}: convert it to UTF-8") from error


def _jsonl_rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise LowbitError(f"{path}:{number}: not JSON ({error.msg}): one object per line") from error
            if isinstance(row, dict):
                yield row
            elif row is not None:
                raise LowbitError(f"{path}:{number}: not a JSON object: one object per line")


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            wanted = [c for c in (*TEXT_COLUMNS, *CHAT_COLUMNS) if c in file.schema_arrow.names]
            for batch in file.iter_batches(256, columns=wanted or None):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise LowbitError(f"{path}: not a Parquet file ({_first_line(error)})") from error


def _dataset_rows(spec: str, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    name, _, rest = spec.partition(":")
    config, _, own_split = rest.partition(":")
    at = {}
    if not Path(name).exists():
        name, _, revision = name.partition("@")
        at = {"revision": revision} if revision else {}
    try:
        yield from load_dataset(name, config or None, split=own_split or split, streaming=True, **at)
    except Exception as error:  # the loader and its network stack raise a dozen unrelated types
        raise LowbitError(
            f"dataset {spec!r} (split {own_split or split!r}) can't be read: {_first_line(error)}; "
            f"give {', '.join(SHORT_NAMES)}, org/name:config:split of the hub, or a local .txt, .jsonl or "
            ".parquet file"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _document(row: dict[str, Any], spec: str) -> Document:
    for column in TEXT_COLUMNS:
        if column in row and isinstance(row[column], str | None):
            return row[column] or ""
    for column in CHAT_COLUMNS:
        if isinstance(row.get(column), list):
            try:
                return [_turn(turn) for turn in row[column]]
            except (KeyError, TypeError) as error:
                raise LowbitError(
                    f"{spec}: column {column!r} does not hold turns of role and text"
                ) from error
    raise LowbitError(
        f"{spec}: no text column among {', '.join(map(str, row))}: name it text, {' or '.join(CHAT_COLUMNS)}"
    )


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    if "from" in turn:
        return {"role": ROLES.get(turn["from"], str(turn["from"])), "content": str(turn["value"])}
    if not isinstance(turn["content"], str | None):  # parts of text and images
        raise TypeError(turn)
    return {"role": str(turn["role"]), "content": turn["content"] or ""}


def pack_tokens(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> Tensor:
    """Full rows of calibration tokens, drawn at random over all of the text.

    Documents are put end to end and cut into rows. EOS, where the tokenizer has one, stands
    between plain documents; a chat goes through the chat template and ends as that ends it. Of
    more than `characters_for(samples, seq_len)` characters a seeded sample is tokenized.

    Returns:
        int64 `[rows, seq_len]`. `rows` is less than `samples` where the text is short: the caller
        reports it.

    Raises:
        LowbitError: the text is shorter than one row, or a chat has no template.
    """
    prefix = prefix_ids(tokenizer)
    check_shape(samples, seq_len, prefix)
    pieces = _sample_pieces(documents, characters_for(samples, seq_len), seed)
    separated = len(documents) > 1 and tokenizer.eos_token_id is not None
    stream: list[int] = []
    for piece, ids in zip(pieces, _encode(pieces, tokenizer), strict=True):
        stream += ids
        if separated and isinstance(piece, str):
            stream.append(tokenizer.eos_token_id)
    rows = _rows(stream, prefix, seq_len)
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:samples]]


def evaluation_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    windows: int | None = None,
) -> Tensor:
    r"""The text in order, in windows that do not overlap: the usual perplexity protocol.

    Documents are joined by `"\n\n"` (chats by nothing) and tokenized as one text; the tail that
    fills no window is dropped. Where the tokenizer adds BOS, every window starts with one of its
    own and holds `seq_len - 1` tokens of the text (the common scripts give it to the first window
    only, which is not how Gemma or Llama were trained to read).

    Args:
        documents: All plain or all chats.
        tokenizer: The model's own.
        seq_len: Tokens in a window.
        windows: Keep the first so many; None keeps all.

    Returns:
        int64 `[n, seq_len]`, `n <= windows`.

    Raises:
        LowbitError: the text is shorter than one window, or a chat has no template.
    """
    prefix = prefix_ids(tokenizer)
    check_shape(1 if windows is None else windows, seq_len, prefix)
    joiner = "\n\n" if documents and isinstance(documents[0], str) else ""
    text = joiner.join(_render(d, tokenizer) for d in documents)
    return _rows(_encode([text], tokenizer)[0], prefix, seq_len)[:windows]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text: BOS, or nothing."""
    plain: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    full: list[int] = tokenizer("a").input_ids
    return full[: full.index(plain[0])]


def check_shape(rows: int, seq_len: int, prefix: Sequence[int]) -> None:
    """Raise `LowbitError` unless there are rows, with room for two tokens after the prefix."""
    if rows < 1:
        raise LowbitError(f"{rows} samples asked for: use at least 1")
    if seq_len < len(prefix) + 2:
        raise LowbitError(f"seq_len={seq_len} is too short: use at least {len(prefix) + 2}")


def characters_in(document: Document) -> int:
    """Its length; of a chat that of all turns."""
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document)


def _sample_pieces(documents: Sequence[Document], budget: int, seed: int) -> list[Document]:
    """All non-empty documents, or a seeded sample of them (long ones cut up) of about `budget` characters."""
    if sum(map(characters_in, documents)) <= budget:
        return [d for d in documents if characters_in(d)]
    spans = [
        (index, start)
        for index, d in enumerate(documents)
        for start in range(0, characters_in(d) if isinstance(d, str) else min(1, characters_in(d)), PIECE)
    ]
    chosen: list[tuple[int, int]] = []
    characters = 0
    for i in torch.randperm(len(spans), generator=torch.Generator().manual_seed(seed)).tolist():
        index, start = spans[i]
        chosen.append(spans[i])
        characters += min(PIECE, characters_in(documents[index]) - start)
        if characters >= budget:
            break
    return [_piece(documents[index], start) for index, start in sorted(chosen)]


def _piece(document: Document, start: int) -> Document:
    if not isinstance(document, str):
        return document
    piece = document[start : start + PIECE]
    if start:  # drop the half word at either cut; a text without blanks is cut anywhere
        piece = piece[max(piece.find(" "), 0) :]
    if start + PIECE < len(document):
        piece = piece[: max(piece.rfind(" "), 0) or None]
    return piece


def _render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        raise LowbitError("chats need a chat template, which this tokenizer lacks: give plain text")
    try:
        text = str(tokenizer.apply_chat_template(document, tokenize=False))
    except TemplateError as error:
        raise LowbitError(f"the chat template refuses a chat: {_first_line(error)}") from error
    # Every row gets the tokenizer's prefix; a template that writes BOS too would double it.
    return text.removeprefix(tokenizer.bos_token or "") if prefix_ids(tokenizer) else text


def _encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [_render(d, tokenizer) for d in documents]
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is meant, not a mistake to warn about.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return ids


def _rows(stream: list[int], prefix: list[int], seq_len: int) -> Tensor:
    """Cut a stream of tokens into full rows `[rows, seq_len]`, each begun by `prefix`."""
    body = seq_len - len(prefix)
    count = len(stream) // body
    if not count:
        raise LowbitError(
            f"the text has {len(stream)} tokens, fewer than one row of seq_len={seq_len}: "
            "give more text or a smaller --seq-len"
        )
    rows = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), rows], dim=1)
