"""The command line: `lowbit quantize`, `eval`, `inspect`, `generate`, `bench`.

Every refusal is one line on stderr and exit code 2; a failed verification is exit code 1; Ctrl-C is
130. Heavy imports wait until a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lowbit import __version__
from lowbit.errors import LowbitError
from lowbit.scheme import QuantScheme

app = typer.Typer(
    name="lowbit",
    help="Quantize the weights of language models to a few bits, in formats that load everywhere.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTERRUPTED = 130


class Method(str, Enum):
    """Rounding algorithms."""

    rtn = "rtn"
    gptq = "gptq"
    awq = "awq"


class FormatName(str, Enum):
    """Formats on disk."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"


Model = Annotated[str, typer.Argument(help="Hub id, local folder, or .gguf file.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "lowbit quantize Qwen/Qwen3-8B --output qwen3-8b-w4\n\n"
    "lowbit quantize ./my-model --output my-model-w4 --dataset train.jsonl --group-size 64\n\n"
    "lowbit quantize model.gguf --output model-w8 --method rtn --bits 8\n\n"
    "lowbit quantize ./my-model --output my-model-awq --method awq --asymmetric --format awq"
)
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.", show_default=False)],
    method: Annotated[
        Method, typer.Option(help="rtn: seconds, no data. gptq, awq: minutes, calibrated.")
    ] = Method.gptq,
    bits: Annotated[int, typer.Option(help="Bits per weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        str, typer.Option(help="Input columns per scale; -1: the whole row; auto: 128, 64 or 32.")
    ] = "auto",
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Symmetric loads in every engine.")
    ] = True,
    format: Annotated[FormatName, typer.Option(help="Format on disk.")] = FormatName.compressed_tensors,
    dataset: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(
            help="Calibration text: hub id (org/name:config), .txt, .jsonl or .parquet file, or 'self' to "
            "sample it from the model. Default: a public data set, or self if it can't be reached.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of each.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    skip: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Modules to leave alone, as a pattern (*.down_proj); repeatable.", show_default=False
        ),
    ] = None,
    head_bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Quantize the output head too, to this many bits (unties it).", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Working precision: auto, bfloat16 or float32.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Size of a safetensors shard.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the result back and compare it.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a checkpoint that transformers, vLLM and SGLang load."""
    from lowbit.hardware import peak_memory
    from lowbit.pipeline import quantize as run
    from lowbit.terminal import progress_bar, show_report

    console = _console(as_json)
    auto_group = group_size == "auto"
    scheme = QuantScheme(bits, 128 if auto_group else _integer("--group-size", group_size), symmetric)
    with progress_bar(console) as progress:
        report = run(
            model,
            scheme,
            output=output,
            method=method.value,
            format=format.value,
            dataset=dataset,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            skip=skip or (),
            head_bits=head_bits,
            auto_group=auto_group,
            device=device,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            verify_output=verify,
            progress=progress,
        )
    if as_json:
        _print_json(dataclasses.asdict(report) | {"peak_memory": peak_memory()})
    else:
        show_report(console, report, peak_memory())


@app.command(
    name="eval",
    epilog="[bold]Examples[/]\n\n"
    "lowbit eval qwen3-8b-w4 --reference Qwen/Qwen3-8B\n\n"
    "lowbit eval my-model-w4 --dataset held-out.txt --seq-len 1024 --windows 32 --json",
)
def evaluate(
    model: Model,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The original, to measure KL divergence and top-1 agreement.", show_default=False),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Text: hub id (org/name:config:split) or a .txt, .jsonl or .parquet file.")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 2048,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="How many windows; all of the text by default.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Precision: auto (the checkpoint's), bfloat16 or float32.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and what quantization changed: KL divergence and top-1 agreement."""
    from lowbit import hf
    from lowbit.evaluate import perplexity
    from lowbit.hardware import find_device, find_dtype
    from lowbit.terminal import progress_bar, show_result

    console, where = _console(as_json), find_device(device)
    precision = dtype if dtype == "auto" else find_dtype(dtype, where)
    with progress_bar(console) as progress:
        original = hf.load(reference, packed=False, dtype=precision, device=where) if reference else None
        result = perplexity(
            hf.load(model, packed=False, dtype=precision, device=where),
            dataset,
            hf.load_tokenizer(model),
            reference=original,
            seq_len=seq_len,
            windows=windows,
            progress=lambda done, total: progress("evaluate", done, total, "windows"),
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        show_result(console, result)


@app.command(epilog="[bold]Examples[/]\n\nlowbit inspect qwen3-8b-w4\n\nlowbit inspect qwen3-8b-w4 --json")
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show the scheme, bits per weight and size of every part of a checkpoint."""
    from lowbit.inspection import inspect as run
    from lowbit.terminal import show_inspection

    result = run(folder)
    if as_json:
        _print_json(dataclasses.asdict(result) | {"bits_per_weight": result.bits_per_weight()})
    else:
        show_inspection(_console(False), result)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "lowbit generate qwen3-8b-w4 --prompt 'Why is the sky blue?'\n\n"
    "lowbit generate my-model-w4 --prompt 'def quicksort(' --raw --max-new-tokens 64"
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no chat template.")] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Precision: auto, bfloat16 or float32.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate text with the weights packed, and say how fast it was."""
    from lowbit import hf, speed
    from lowbit.hardware import find_device

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
        _print_json(dataclasses.asdict(done) | {"tokens_per_second": done.tokens_per_second})
    else:
        first = f"{done.prompt_tokens} in, first after {done.first_seconds:.2f} s"
        _console(True).print(
            f"[dim]{done.tokens_per_second:.1f} tokens/s, {done.new_tokens} tokens ({first})"
        )


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "lowbit bench qwen3-8b-w4 --reference Qwen/Qwen3-8B\n\nlowbit bench my-model-w4 --threads 1 --json"
)
def bench(
    model: Model,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The original, measured after it.", show_default=False),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="CPU threads.", show_default=False),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure speed, memory and energy, beside the original's."""
    from lowbit import speed
    from lowbit.terminal import show_speeds

    names = [model, *([reference] if reference else [])]
    found = speed.bench(
        names, prompt_tokens=prompt_tokens, new_tokens=new_tokens, threads=threads, device=device
    )
    if as_json:
        _print_json({name: dataclasses.asdict(one) for name, one in zip(names, found, strict=True)})
    else:
        show_speeds(_console(False), [Path(name).name for name in names], found)


def _console(as_json: bool) -> Any:
    """Tables go to stdout; with --json stdout is the object's alone and progress goes to stderr."""
    from rich.console import Console

    return Console(stderr=as_json)


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise LowbitError(f"{option} {text!r} is not a number: use 128, 64, 32, -1 or auto") from None


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2, default=str))


def _terminate(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)  # an exception, so that scratch folders are removed


def main() -> None:
    """Entry point of the `lowbit` command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted: nothing was left behind", INTERRUPTED)
    except LowbitError as error:
        _fail(str(error), 2)
    except OSError as error:  # a full disk, a folder that may not be read
        _fail(str(error), 2)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # a usage error of click's
            _fail(error.format_message(), error.exit_code)
        if type(error).__name__ == "VerificationError":
            _fail(str(error), 1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    if message:  # empty where click has shown the help instead
        print(f"lowbit: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
