"""Tokens per second: text as it is generated, and the benchmark.

Two clocks: wall time, which other processes spoil, and CPU seconds of this process, which is what a
machine has to pay. Energy is read from the counters that GPUs (NVML) and Intel and AMD processors
(RAPL) keep, where they can be read; both count everything that the chip does.

The benchmark runs every model in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lowbit import hf
from lowbit import native as kernels
from lowbit.errors import LowbitError
from lowbit.hardware import find_device, peak_memory
from lowbit.nn import PackedWeight
from lowbit.quantizer import packed_modules

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Generated:
    """What `generate` did.

    Attributes:
        text: All that was generated.
        prompt_tokens: Tokens that went in, the chat template's among them.
        new_tokens: Tokens that came out.
        first_seconds: Wall seconds up to the first token.
        decode_seconds: Wall seconds from the first token to the last.
        decode_cpu_seconds: CPU seconds of this process in the same time.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    decode_seconds: float
    decode_cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there was no second one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class _Clock(TextStreamer):
    """Passes text on as it comes and keeps the time of every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.pieces = write, list[str]()
        self.times = [(time.perf_counter(), time.process_time())]

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append((time.perf_counter(), time.process_time()))
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        del stream_end
        self.pieces.append(text)
        self.write(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chat: bool = True,
    write: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Continue `prompt`, handing on text as it comes.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        prompt: What the user says, or the beginning of a text.
        max_new_tokens: At most so many.
        temperature: 0 takes the likeliest token.
        chat: Put the prompt through the tokenizer's chat template, if it has one.
        write: Called with every piece of text.

    Raises:
        LowbitError: the prompt holds no token.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    count = inputs["input_ids"].shape[-1]
    if not count:
        raise LowbitError(f"the prompt {prompt!r} holds no token: write one")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    clock = _Clock(tokenizer, write)
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=max_new_tokens, max_length=None, **sampling)
    if temperature <= 0:
        settings.update(temperature=1.0, top_p=1.0, top_k=50)  # what greedy decoding doesn't warn about
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    generating: Any = model
    generating.generate(**inputs, generation_config=settings, streamer=clock)
    (begin, _), (first, first_cpu), (last, last_cpu) = clock.times[0], clock.times[1], clock.times[-1]
    return Generated(
        "".join(clock.pieces), count, len(clock.times) - 1, first - begin, last - first, last_cpu - first_cpu
    )


@dataclass(frozen=True)
class Speed:
    """A model's speed; the best of several runs.

    Attributes:
        prefill: Prompt tokens per wall second.
        prefill_cpu: The same per CPU second of the process.
        decode: Generated tokens per wall second, one at a time.
        decode_cpu: The same per CPU second.
        weight_bytes: What the weights take in memory, but for the input embedding.
        peak_memory: Largest resident size of the process, Python and its libraries included.
        joules_per_token: Energy of the whole chip per generated token; None where nothing counts it.
        kernels: As `kernels_of`.
        lacking: Why it is not `native` on a CPU; empty where it is, or no weight is packed.
    """

    prefill: float
    prefill_cpu: float
    decode: float
    decode_cpu: float
    weight_bytes: int
    peak_memory: int
    joules_per_token: float | None
    kernels: str
    lacking: str


def bench(
    models: list[str],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    threads: int | None = None,
    device: str = "auto",
    runs: int = 2,
    native: bool | None = None,
) -> list[Speed]:
    """Measure models one after the other, each in a fresh process.

    Args:
        models: Folders or hub ids; quantized ones run packed.
        prompt_tokens: Tokens of the prefill.
        new_tokens: Tokens that are decoded.
        threads: CPU threads; torch's own number by default.
        device: Where to run.
        runs: The best of so many counts.
        native: Packed weights on a CPU run through `native.c`; None: where that works.

    Raises:
        LowbitError: a model can't be loaded, or the native kernels can't be compiled here.
    """
    for model in models:
        hf.quantization_of(model)  # refuses what is not there before minutes go into the others
    kernels.choose(native)  # refused before a model is loaded
    results = []
    for model in models:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            job = pool.submit(_measure, model, prompt_tokens, new_tokens, threads, device, runs, native)
            results.append(job.result())
    return results


def _measure(
    name: str,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    device: str,
    runs: int,
    native: bool | None,
) -> Speed:
    kernels.choose(native)
    if threads:
        torch.set_num_threads(threads)
    model = hf.load(name, device=find_device(device))
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    _time(model, prompt[:, :8], 2)  # everything is loaded and compiled
    best: dict[str, float] = {}
    joules = None
    for _ in range(runs):
        first = _time(model, prompt, 1)
        short = _time(model, prompt[:, :8], 1)
        long = _time(model, prompt[:, :8], 1 + new_tokens)
        found = {
            "prefill": prompt_tokens / first[0],
            "prefill_cpu": prompt_tokens / first[1],
            "decode": new_tokens / max(long[0] - short[0], 1e-9),
            "decode_cpu": new_tokens / max(long[1] - short[1], 1e-9),
        }
        best = {key: max(value, best.get(key, 0.0)) for key, value in found.items()}
        if long[2] is not None and short[2] is not None:
            joules = (long[2] - short[2]) / new_tokens
    memory = peak_memory()
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(model.device)
    return Speed(
        **best, weight_bytes=weight_bytes(model), peak_memory=memory, joules_per_token=joules,
        kernels=kernels_of(model), lacking=kernels.lacking() if packed_modules(model) else "",
    )  # fmt: skip


def kernels_of(model: PreTrainedModel) -> str:
    """Whose kernels multiply by the packed weights: `native`, `torch` or `triton`; `torch` without any."""
    if model.device.type == "cpu":
        return "native" if packed_modules(model) and kernels.enabled() else "torch"
    return "triton" if packed_modules(model) else "torch"


def weight_bytes(model: PreTrainedModel) -> int:
    """Memory of all weights as they are multiplied; the input embedding counts only where it is tied."""
    seen, total = set(), 0
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for module in packed_modules(model):
        if module.operands:
            total += sum(operand.nbytes for operand in module.operands)
            weights = (layer for layer in module.modules() if isinstance(layer, PackedWeight))
            seen |= {id(getattr(layer, suffix)) for layer in weights for suffix in layer.suffixes}
    tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
    if embedding is not None and not tied:
        seen.add(id(embedding))
    return total + sum(p.nbytes for p in model.parameters() if id(p) not in seen)


def _time(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, float | None]:
    """Wall seconds, CPU seconds and joules of generating exactly `new_tokens`."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=new_tokens, max_length=None, do_sample=False, eos_token_id=None)
    settings.update(temperature=1.0, top_p=1.0, top_k=50)
    generating: Any = model
    energy = _energy(model.device)
    begin, cpu = time.perf_counter(), time.process_time()
    generating.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    after = _energy(model.device)
    return wall, cpu, None if energy is None or after is None or after < energy else after - energy


def _energy(device: torch.device) -> float | None:
    """Joules on the device's counter; None where there is none or it can't be read."""
    try:
        if device.type == "cuda":
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        packages = [path / "energy_uj" for path in _RAPL.glob("intel-rapl:?")]
        return sum(int(path.read_text()) for path in packages) / 1e6 if packages else None
    except (ImportError, OSError, RuntimeError, ValueError):
        return None
