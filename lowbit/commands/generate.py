"""`lowbit generate`: text from packed weights."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lowbit.commands.options import AsJson, Checkpoint, Device, Native, open_console, print_json

EXAMPLES = (
    "lowbit generate qwen3-8b-w4 --prompt 'Why is the sky blue?'",
    "lowbit generate my-model-w4 --prompt 'def quicksort(' --raw --max-new-tokens 64",
)


def run(
    model: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no chat template.")] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Precision: auto, bfloat16 or float32.")] = "auto",
    native: Native = None,
    as_json: AsJson = False,
) -> None:
    """Generate text with the weights packed, and say how fast it was."""
    from lowbit import hf, speed
    from lowbit import native as kernels
    from lowbit.hardware import find_device

    kernels.choose(native)
    loaded = hf.load(model, dtype=dtype, device=find_device(device))
    done = speed.generate(
        loaded,
        hf.load_tokenizer(model),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=not raw,
        write=(lambda text: None) if as_json else (lambda text: print(text, end="", flush=True)),
    )
    if as_json:
        print_json(dataclasses.asdict(done) | {"tokens_per_second": done.tokens_per_second})
    else:
        print(flush=True)
        first = f"{done.prompt_tokens} in, first after {done.first_seconds:.2f} s"
        open_console(True).print(
            f"[dim]{done.tokens_per_second:.1f} tokens/s, {done.new_tokens} tokens ({first}); "
            f"{speed.kernels_of(loaded)} kernels"
        )
        if kernels.lacking():
            open_console(True).print(f"[dim]{kernels.lacking()}", markup=True, soft_wrap=True)
