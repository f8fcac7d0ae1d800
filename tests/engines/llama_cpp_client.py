"""What llama.cpp says of some GGUF files; as `vllm_client.py`, through the xllamacpp package.

llama.cpp gives probabilities of the next token only, so every prefix of the text is a prompt of its own.
Text goes in as text: it is cut into tokens by what the file says of the tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from typing import Any


def main() -> None:
    if importlib.util.find_spec("lowbit"):
        sys.exit("lowbit can be imported here: this proves nothing")
    ask = json.load(sys.stdin)
    answers = []
    for path in ask["paths"]:
        try:
            answers.append(answer(path, ask))
        except Exception as error:
            answers.append({"refused": f"{type(error).__name__}: {error}"})
    print(json.dumps(answers))


def answer(path: str, ask: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def tokenize(text: str, special: bool = True) -> list[int]:
        body = json.dumps({"content": text, "add_special": special}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]

    (plain,) = tokenize("a", special=False)

    def after(ids: list[int]) -> dict[int, float]:
        """Log-probability of every token; the server tells them only beside a token that is whole text."""
        question = {"prompt": ids, "n_predict": 1, "n_probs": ask["vocab"], "logit_bias": [[plain, 1000]]}
        (step,) = server.handle_completions(question)["choices"][0]["logprobs"]["content"]
        return {row["id"]: row["logprob"] for row in step["top_logprobs"]}

    assert tokenize(ask["text"]) == ask["text_ids"], "the text is cut into other tokens"
    logprobs = [after(ask["ids"][:place])[ask["ids"][place]] for place in range(1, len(ask["ids"]))]
    tokens = tokenize(ask["prompt"])
    for _ in range(ask["new_tokens"]):
        found = after(tokens)
        tokens.append(max(found, key=found.__getitem__))
    return {"logprobs": logprobs, "tokens": tokens}


if __name__ == "__main__":
    main()
