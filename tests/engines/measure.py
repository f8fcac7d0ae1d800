"""Every checkpoint put to every engine, and the answers held against the dequantized model in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lowbit
from lowbit import hf
from lowbit.packed import Packed
from tests import environment
from tests.engines import checkpoints
from tests.tiny import TEXT, VOCAB

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
PROMPT, NEW_TOKENS, SCORED = "The river rises in the hills", 24, 128

Key = tuple[str, str]  # format, scheme
FOLDERS, FILES = ("compressed-tensors", "gptq", "gptq-v2", "awq"), ("gguf",)
READS = {"transformers": FOLDERS + FILES, "vLLM": FOLDERS, "llama.cpp": FILES}
"""Formats that an engine is asked to load; vLLM 0.32 knows no GGUF at all."""


@dataclass
class Answer:
    """What an engine said of a checkpoint.

    Attributes:
        refused: Its message; None where it loaded the checkpoint, which the rest is about.
        mean: Mean difference of the log-probabilities of a text, in nats.
        lag: How far the worst token of its greedy text lies behind the best one of the reference, in nats:
            0 where the texts are equal, and small where two tokens were nearly tied.
    """

    refused: str | None
    mean: float = 0.0
    lag: float = 0.0


def measure(folder: Path, factory: pytest.TempPathFactory) -> tuple[dict[str, dict[Key, Answer]], ...]:
    """Answers by engine and checkpoint: of the checkpoints, and of their spoiled copies."""
    install = ["--no-deps", "--only-binary", ":all:", "--requirement", str(REQUIREMENTS)]
    engines = environment.build("LOWBIT_ENGINES_VENV", [install], REQUIREMENTS, factory)
    pythons = {"transformers": environment.stock(factory), "vLLM": engines, "llama.cpp": engines}
    made = checkpoints.make_all(folder)
    spoiled = checkpoints.make_spoiled(made, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    asked = {
        engine: [(key, path) for paths in (made, spoiled) for key, path in paths.items() if key[0] in reads]
        for engine, reads in READS.items()
    }
    with ThreadPoolExecutor() as pool:  # side by side
        running = {
            engine: pool.submit(ask, pythons[engine], engine, [path for _, path in rows], tokenizer, folder)
            for engine, rows in asked.items()
        }
    replies = {engine: client.result() for engine, client in running.items()}
    references = {key: Reference(checkpoints.origin(key, path), tokenizer) for key, path in made.items()}
    found: tuple[dict[str, dict[Key, Answer]], ...] = ({}, {})
    for engine, answers in replies.items():
        for (key, path), answer in zip(asked[engine], answers, strict=True):
            which = found[path != made[key]].setdefault(engine, {})
            which[key] = references[key].judge(answer)
    return found


def ask(python: Path, engine: str, paths: list[Path], tokenizer: Any, cwd: Path) -> list[dict[str, Any]]:
    """What the client of `engine` answers."""
    ids = tokenizer(TEXT)["input_ids"]
    question = {
        "paths": [str(path) for path in paths],
        "ids": ids[:SCORED],
        "text": TEXT,
        "text_ids": ids,
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "vocab": VOCAB,
    }
    client = environment.start(python, HERE / f"{engine.lower().replace('.', '_')}_client.py", cwd)
    out, errors = client.communicate(json.dumps(question))
    assert client.returncode == 0, errors[-3000:]
    answers: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    return answers


def dequantized(folder: Path) -> PreTrainedModel:
    """`(codes - zeros) * scales`, exactly; where inputs are rounded too, lowbit's integer product."""
    opened = Packed(folder)
    if any(scheme.activation_bits for scheme in opened.schemes.values()):
        return lowbit.load(folder, dtype=torch.float32)
    state = {}
    for name, found in hf.layers(folder, opened.fmt):
        if isinstance(found, torch.Tensor):
            state[name] = found
        else:
            state[f"{name}.weight"] = opened.read(name, found)[0].dequantize()
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(state)
    return model


class Reference:
    """The dequantized model in float32, its weights not rounded again."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.model = dequantized(folder)
        self.ids = tokenizer(TEXT)["input_ids"][:SCORED]
        self.prompt = tokenizer(PROMPT)["input_ids"]

    @torch.no_grad()
    def judge(self, answer: Mapping[str, Any]) -> Answer:
        if "refused" in answer:
            return Answer(answer["refused"])
        ids = torch.tensor(self.ids)
        logprobs = self.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        mean = (torch.tensor(answer["logprobs"]) - logprobs).abs().mean().item()
        tokens, start = torch.tensor(answer["tokens"]), len(self.prompt)
        assert tokens[:start].tolist() == self.prompt, "the prompt was cut into other tokens"
        assert len(tokens) == start + NEW_TOKENS
        logits = self.model(tokens[None, :-1]).logits[0, start - 1 :]
        lag = logits.max(-1).values - logits.gather(1, tokens[start:, None])[:, 0]
        return Answer(None, mean, lag.max().item())
