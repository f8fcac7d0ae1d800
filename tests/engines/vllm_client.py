"""What vLLM says of some checkpoints; runs in the engines' environment, by path, in isolated mode.

Reads `{"paths", "ids", "prompt", "new_tokens"}` from stdin; its last line is a list of
`{"logprobs", "tokens"}` or `{"refused"}`, one for every path. vLLM is imported once, which takes longer than
all the rest; every checkpoint is loaded in a child of its own, and what a refused one leaves behind ends
with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
from typing import Any

os.environ |= {
    "VLLM_CACHE_ROOT": os.path.join(sys.prefix, "vllm-cache"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",  # a sampler compiled for every checkpoint would take most of the time
}
PATIENCE = 900  # seconds for one checkpoint; two are usual


def main() -> None:
    if importlib.util.find_spec("lowbit"):
        sys.exit("lowbit can be imported here: this proves nothing")
    ask = json.load(sys.stdin)
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("compressed-tensors")  # imports all of them
    for name in (
        "model_executor.models.llama",
        "v1.worker.cpu_worker",
        "v1.engine.llm_engine",
        "entrypoints.llm",
    ):
        importlib.import_module(f"vllm.{name}")
    print(json.dumps([in_child(path, ask) for path in ask["paths"]]))


def in_child(path: str, ask: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            signal.alarm(PATIENCE)
            try:
                found = answer(path, ask)
            except BaseException as error:
                found = {"refused": f"{type(error).__name__}: {error}"}
            json.dump(found, file)
            file.flush()
            os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        found = file.read()
    return json.loads(found) if found else {"refused": "the process died"}


def answer(path: str, ask: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path,
        dtype="float16",
        max_model_len=512,
        enforce_eager=True,
        max_num_seqs=4,
        enable_prefix_caching=False,
        num_gpu_blocks_override=32,
    )
    scored = llm.generate(
        {"prompt_token_ids": ask["ids"]}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )[0]
    written = llm.generate(
        ask["prompt"],
        SamplingParams(temperature=0, max_tokens=ask["new_tokens"], ignore_eos=True),
        use_tqdm=False,
    )[0]
    logprobs = [
        float(places[token].logprob)
        for token, places in zip(ask["ids"][1:], scored.prompt_logprobs[1:], strict=True)
    ]
    return {"logprobs": logprobs, "tokens": [*written.prompt_token_ids, *written.outputs[0].token_ids]}


if __name__ == "__main__":
    main()
