"""What stock transformers says of some checkpoints; as `vllm_client.py`, in the stock environment."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


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


@torch.no_grad()
def answer(path: str, ask: dict[str, Any]) -> dict[str, Any]:
    place = (path,)
    file = {}
    if path.endswith(".gguf"):
        folder, name = os.path.split(path)
        place, file = (folder,), {"gguf_file": name}
    model = AutoModelForCausalLM.from_pretrained(*place, **file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(*place, **file)
    ids = torch.tensor([ask["ids"]])
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    prompt = tokenizer(ask["prompt"], return_tensors="pt").input_ids
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=ask["new_tokens"], eos_token_id=None)
    return {"logprobs": logprobs.tolist(), "tokens": tokens[0].tolist()}


if __name__ == "__main__":
    main()
