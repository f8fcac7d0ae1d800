"""What a user without lowbit does; runs in the stock environment, by path, in isolated mode.

Reads `{"folder", "ids", "prompt", "new_tokens"}` from stdin, prints `{"logits", "text"}`.
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
    generate = pipeline("text-generation", model=ask["folder"])
    logits = generate.model(torch.tensor([ask["ids"]])).logits[0].float()
    answer = generate(ask["prompt"], do_sample=False, max_new_tokens=ask["new_tokens"])
    print(json.dumps({"logits": logits.tolist(), "text": answer[0]["generated_text"]}))


if __name__ == "__main__":
    main()
