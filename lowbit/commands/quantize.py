"""`lowbit quantize`: a model in, a checkpoint out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lowbit import interruption
from lowbit.commands.options import (
    AsJson,
    Device,
    Model,
    TargetBpw,
    TargetSize,
    group_size_of,
    open_console,
    print_json,
    target_of,
)
from lowbit.errors import INTERRUPTED, LowbitError, Stopped
from lowbit.places import check_target
from lowbit.scheme import WHOLE_ROW, QuantScheme

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = (
    "lowbit quantize Qwen/Qwen3-8B --output qwen3-8b-w4",
    "lowbit quantize ./my-model --output my-model-w4 --dataset train.jsonl --group-size 64",
    "lowbit quantize ./my-model --output my-model-mixed --target-size 3.9GB",
    "lowbit quantize Qwen/Qwen3-32B --output qwen3-32b-w4 --drop-source",
    "lowbit quantize model.gguf --output model-w8 --method rtn --bits 8",
    "lowbit quantize ./my-model --output my-model-w8a8 --activation-bits 8",
    "lowbit quantize ./my-model --output my-model-awq --method awq --asymmetric --format awq",
    "lowbit quantize ./my-model -o my-model-w2 --method qat --bits 2 --group-size 64 --dataset train.jsonl",
)


class Method(str, Enum):
    """Rounding algorithms."""

    rtn = "rtn"
    quick = "quick"
    gptq = "gptq"
    awq = "awq"
    qronos = "qronos"
    qat = "qat"


class EffortName(str, Enum):
    """How much work goes into the model."""

    fast = "fast"
    balanced = "balanced"
    high = "high"
    max = "max"


class FormatName(str, Enum):
    """Formats on disk."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"


def run(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.", show_default=False)],
    effort: Annotated[
        EffortName,
        typer.Option(
            help="fast: one pass on some pages that come with lowbit, seconds. balanced: calibrated, "
            "minutes; the best for its cost. high, max: scales trained end to end on top, for the most "
            "accurate model."
        ),
    ] = EffortName.balanced,
    method: Annotated[
        Optional[Method],  # noqa: UP045
        typer.Option(
            help="Rounding algorithm, in place of the effort's own (quick: GPTQ in one pass); or qat: what "
            "that one rounds is trained on --dataset, weights included.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        Optional[int],  # noqa: UP045  (typer reads this at run time on Python 3.10)
        typer.Option(
            help="Bits per weight: 2, 3, 4 or 8. Default: 4, or 8 with --activation-bits. With a target: the "
            "fewest that may be used.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        str, typer.Option(help="Input columns per scale; -1: the whole row; auto: 128, 64 or 32.")
    ] = "auto",
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    activation_bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="8: round activations too, per token as the model runs (w8a8), for engines that multiply "
            "integers.",
            show_default=False,
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Symmetric loads in every engine.")
    ] = True,
    format: Annotated[FormatName, typer.Option(help="Format on disk.")] = FormatName.compressed_tensors,
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Calibration text: hub id (org/name:config), .txt, .jsonl or .parquet file, 'self' to "
            "sample it from the model, or 'passages', some pages that come with lowbit. Default: those with "
            "--effort fast, and else a public data set, or self if it can't be reached.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            help="Calibration sequences. Default: 128, or 6 with --effort fast; max takes twice as many.",
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens of each.")] = 512,
    mix: Annotated[
        bool,
        typer.Option(
            "--mix/--no-mix",
            help="Take up to one calibration row in five from the passages, so that other text than yours "
            "does not suffer.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")] = 0,
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
    dtype: Annotated[
        str, typer.Option(help="Working precision: auto, bfloat16, float16 or float32.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Size of a safetensors shard.")] = "5GB",
    max_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Memory that the process may take, such as 8GB; kept or refused.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted run left, and start over.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the result back and compare it.")
    ] = True,
    quantized_by: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Your name on the Hub, for the model card.", show_default=False),
    ] = None,
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source/--drop-source",
            help="Drop: the weight files of a hub id are downloaded one at a time and removed once they were "
            "read, for a disk that does not hold the whole model.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a checkpoint that transformers, vLLM and SGLang load."""
    whole = output.expanduser().resolve()
    if not whole.with_name(whole.name + ".lowbit-work").exists():  # else it may be this run's own
        check_target(whole, model, overwrite)
    auto_group = group_size == "auto" and activation_bits is None
    if target_bpw is None and target_size is None:
        _scheme(bits, group_size, symmetric, activation_bits)  # a refusal needs none of what follows
    from lowbit import ranks
    from lowbit.hardware import peak_memory
    from lowbit.pipeline import quantize
    from lowbit.terminal import progress_bar, show_report

    console = open_console(as_json)
    target = target_of(target_bpw, target_size, bits, group_size)
    if target and (activation_bits or not symmetric):
        raise LowbitError(f"{target.option} mixes symmetric weight-only schemes: drop the other option")
    scheme = None if target else _scheme(bits, group_size, symmetric, activation_bits)
    with stopped(), ranks.joined(), _heard(console, ranks.is_first()), progress_bar(console) as progress:
        report = quantize(
            model,
            scheme,
            output=output,
            effort=effort.value,
            method=method.value if method else None,
            format=format.value,
            dataset=dataset,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            mix=mix,
            skip=skip or (),
            head_bits=head_bits,
            auto_group=auto_group,
            within=target,
            device=device,
            dtype=dtype,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            overwrite=overwrite,
            restart=restart,
            verify_output=verify,
            quantized_by=quantized_by,
            keep_source=keep_source,
            progress=progress,
        )
    if console.quiet:
        return
    if as_json:
        print_json(dataclasses.asdict(report) | {"peak_memory": peak_memory()})
    else:
        show_report(console, report, peak_memory())


@contextmanager
def _heard(console: Console, first: bool) -> Iterator[None]:
    """Of several ranks the first alone says anything."""
    console.quiet = not first
    yield


@contextmanager
def stopped() -> Iterator[None]:
    """What ends a run that can go on becomes `Stopped`, with a line that says how."""
    try:
        yield
    except (LowbitError, OSError, KeyboardInterrupt, SystemExit) as error:
        kept = getattr(error, "kept", None)
        if kept is None:
            raise
        reason, code = str(error), 2
        cause = interruption.received() or error
        if isinstance(error, ConnectionError):  # what ends the other ranks sends signals, too
            cause = error
        if isinstance(cause, KeyboardInterrupt):
            reason, code = "interrupted", INTERRUPTED
        elif isinstance(cause, SystemExit):
            reason, code = "terminated", int(cause.code or 0)
        raise Stopped(
            f"{reason}; what is done is kept in {kept}: run the same command to continue, "
            "add --restart to start over",
            code,
        ) from error


def _scheme(bits: int | None, group_size: str, symmetric: bool, activation_bits: int | None) -> QuantScheme:
    """The grid; what the user left open is what the activations need."""
    if activation_bits is None:
        usual_bits, usual_group = 4, 128
    else:
        usual_bits, usual_group = 8, WHOLE_ROW
    group = usual_group if group_size == "auto" else group_size_of(group_size)
    return QuantScheme(usual_bits if bits is None else bits, group, symmetric, activation_bits)
