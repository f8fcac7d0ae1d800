"""What a user without lowbit does; runs in the stock environment, by path, in isolated mode.

Reads `{"folders", "ids", "prompt", "new_tokens"}` from stdin, prints `{"logits", "text"}` of each folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import torch
from transformers import pipeline


@torch.no_grad()
def main() -> None:
    if importlib.util.find_spec("lowbit") or importlib.util.find_spec("lowbit_kernels"):
        sys.exit("lowbit can be imported here: this proves nothing")
    ask = json.load(sys.stdin)
    answers = []
    for folder in ask["folders"]:
        generate = pipeline("text-generation", model=folder)
        logits = generate.model(torch.tensor([ask["ids"]])).logits[0].float()
        answer = generate(ask["prompt"], do_sample=False, max_new_tokens=ask["new_tokens"])
        answers.append({"logits": logits.tolist(), "text": answer[0]["generated_text"]})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
