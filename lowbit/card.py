"""The model card beside a checkpoint: `README.md`, with the metadata that the Hub reads.

Metadata (base model, licence, tags, and `model-index` once something was measured) goes through
huggingface_hub's own classes; the text is `templates/model_card.md.jinja`. A card that was edited
since it was written keeps its text: only the measured figures in its metadata are renewed.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lowbit.record import hub_id
from lowbit.report import evaluation_runs, grouped, significant, size, with_error

NAME = "README.md"
TASK = "text-generation"
# Taken over from the card of the original.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# What transformers itself needs to read a format.
REQUIRES = {"compressed-tensors": "compressed-tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}
NOT_VLLM = "vLLM"


def write(record: dict[str, Any], folder: Path) -> str | None:
    """Write or renew the card of a record; a card that is not as we left it keeps its text.

    Returns:
        A note where the card was not renewed as a whole.
    """
    path = folder / NAME
    if record["quantization"] is None:  # someone else's checkpoint: its card is theirs
        return None
    if path.is_file() and _digest(path.read_bytes()) != record.get("card"):
        return _renew_metadata(record, path)
    content = render(record).encode()
    path.write_bytes(content)
    record["card"] = _digest(content)
    return None


def render(record: Mapping[str, Any]) -> str:
    """The card of a record as text."""
    quantization, evaluations = record["quantization"], record["evaluations"]
    return _template().render(
        card_data=metadata(record).to_yaml(),
        name=record["name"],
        repo=record.get("repo_id") or record["name"],
        model=record["model"],
        base_model=record["base_model"],
        commit=record.get("commit"),  # older records lack it
        lowbit_version=record["run"]["versions"].get("lowbit"),
        facts=list(_facts(record)),
        requires=REQUIRES.get(quantization["format"]),
        vllm=not any(NOT_VLLM in warning for warning in quantization["warnings"]),
        warnings=quantization["warnings"],
        evaluations=[_row(entry) for entry in evaluations],
        tasks=[_task_row(row) for row in record.get("tasks", [])],
        evaluation_commands=[run["command"] for run in evaluation_runs(record) if run["command"]],
        command=record["run"]["command"],
        versions=", ".join(f"{name} {version}" for name, version in record["run"]["versions"].items()),
    )


def metadata(record: Mapping[str, Any]) -> ModelCardData:
    """The header of the card."""
    quantization = record["quantization"]
    scheme, method, form = quantization["scheme"], quantization["method"], quantization["format"]
    bits = [f"{width}-bit" for width in sorted(set(re.findall(r"\bw(\d+)", scheme)))]
    dataset = hub_id(quantization["calibration"].partition(":")[0])
    given = {name: value for name, value in record.get("source", {}).items() if value}
    if record["base_model"]:
        given |= {"base_model": record["base_model"], "base_model_relation": "quantized"}
    if record["quantized_by"]:
        given["quantized_by"] = record["quantized_by"]
    results = list(eval_results(record))
    if results:
        given |= {"eval_results": results, "model_name": record["name"]}
    return ModelCardData(
        library_name="transformers",
        datasets=[dataset] if dataset else None,
        tags=list(dict.fromkeys(["lowbit", "quantized", method, form, *bits])),
        **({"pipeline_tag": TASK} | given),
    )


def eval_results(record: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Everything measured, as `model-index` holds it; a standard error is an argument of its metric."""
    for entry in record["evaluations"]:
        result = entry["result"]
        spec, _, rest = entry["dataset"].partition(":")
        spec, _, revision = spec.partition("@")
        config, _, split = rest.partition(":")
        for metric, title in (
            ("perplexity", "Perplexity"),
            ("perplexity_ratio", "Perplexity over the original's"),
            ("kl", "KL divergence from the original, nats per token"),
            ("top1_agreement", "Same most likely token as the original"),
        ):
            if result[metric] is None:
                continue
            error = result[f"{metric}_se"]
            yield EvalResult(
                task_type=TASK,
                dataset_type=spec,
                dataset_name=Path(spec).name,
                dataset_config=config or None,
                dataset_split=split or None,
                dataset_revision=revision or None,
                dataset_args={"seq_len": entry["seq_len"], "windows": result["windows"]},
                metric_type=metric,
                metric_name=title,
                metric_value=result[metric],
                metric_args=None if error is None else {"standard_error": error},
            )
    for row in record.get("tasks", []):
        arguments = {"documents": row["documents"], "num_fewshot": row["fewshot"]}
        yield EvalResult(
            task_type=TASK,
            dataset_type=row["task"],
            dataset_name=row["task"],
            dataset_args={name: value for name, value in arguments.items() if value is not None},
            metric_type=row["metric"],
            metric_name=f"{row['metric']} (lm-evaluation-harness)",
            metric_value=row["value"],
            metric_args=None if row["value_se"] is None else {"standard_error": row["value_se"]},
        )


def source_metadata(folder: Path) -> dict[str, Any]:
    """Licence, languages and task in the card of the original, where it has one."""
    path = folder / NAME
    if not path.is_file():
        return {}
    data = _load(path)
    return {name: data[name] for name in INHERITED if data.get(name)}


def _load(path: Path) -> dict[str, Any]:
    """The header of any card; empty where it can't be read."""
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # it may have no header at all
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):
        return {}
    return vars(card.data)


def _renew_metadata(record: Mapping[str, Any], path: Path) -> str:
    try:
        card = ModelCard(path.read_bytes().decode("utf-8"))
        data: Any = card.data
        data.model_name, data.eval_results = record["name"], list(eval_results(record))
        card.save(path)
    except (ValueError, yaml.YAMLError):
        return f"{path} was edited and its header can't be read: left as it is"
    return f"{path} was edited: its text is left as it is, the measured figures in its header are new"


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader("lowbit"), undefined=StrictUndefined, autoescape=False)
    return environment.get_template("model_card.md.jinja")


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    quantization = record["quantization"]
    parts = [part for part in record["parts"] if part["quantized"]]
    bits = 8 * sum(p["bytes"] for p in parts) / max(1, sum(p["weights"] for p in parts))
    yield "scheme", f"`{quantization['scheme']}`: {bits:.2f} bits per quantized weight"
    yield "algorithm", quantization["method"].upper().replace("QUICK", "QUICK (GPTQ in one pass)")
    digest = quantization.get("tokens") and f" (SHA-256 of their ids: `{quantization['tokens']}...`)"
    yield "calibration", quantization["calibration"] + (digest or "")
    yield "format", quantization["format"]
    yield "weights", f"{size(quantization['output_bytes'])}, from {size(quantization['source_bytes'])}"
    verified = quantization["verification"]
    if verified:
        yield "verified", f"{verified['weights']} layers equal to the bit, read back by {verified['loader']}"
    if quantization["skipped"]:
        yield "in full precision", _collapsed(quantization["skipped"])


def _collapsed(skipped: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}`" for name, _ in grouped(skipped.items()))


def _row(entry: Mapping[str, Any]) -> list[str]:
    result = entry["result"]
    precision = f", in {result['dtype']}" if result.get("dtype") else ""  # older records lack it
    row = [f"{entry['dataset']}, {result['windows']} x {entry['seq_len']} tokens{precision}"]
    row.append(with_error(result["perplexity"], result["perplexity_se"]))
    if result["kl"] is None:
        return [*row, "", "", "", ""]
    for name in ("reference_perplexity", "perplexity_ratio", "kl"):
        row.append(with_error(result[name], result[f"{name}_se"]))
    return [*row, with_error(result["top1_agreement"], result["top1_agreement_se"], 100) + " %"]


def _task_row(row: Mapping[str, Any]) -> list[str]:
    shown = [row["task"], row["metric"], str(row["documents"]), with_error(row["value"], row["value_se"])]
    if row["difference"] is None:
        return [*shown, "", "", ""]
    for name in ("reference", "difference"):
        shown.append(with_error(row[name], row[f"{name}_se"]))
    return [*shown, "" if row["p_value"] is None else significant(row["p_value"])]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
