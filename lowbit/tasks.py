"""What quantization cost on tasks with right answers: arc, hellaswag, whatever lm-evaluation-harness knows.

The harness (extra `tasks`) reads the data, asks the model and marks every document; both models are asked the
same documents. Two accuracies of a few hundred documents have standard errors of several percent each and say
nothing about a good 4-bit quantization; but most documents are marked alike, so what counts is

- the mean of the differences document by document, whose error is theirs (paired), and
- where marks are 0 or 1, McNemar's exact test on the documents that are marked differently: if quantization
  changed nothing but luck, each of them went either way with probability 1/2 (Q. McNemar, Psychometrika 12,
  1947; the binomial form, not its normal approximation).

One model is in memory at a time. Documents of a group (mmlu) are pooled.
"""

from __future__ import annotations

import difflib
import gc
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowbit import hf
from lowbit.errors import LowbitError
from lowbit.hardware import evaluation_dtype
from lowbit.quiet import quiet

Progress: TypeAlias = Callable[[str, int, int], None]
Marks: TypeAlias = dict[tuple[str, str], dict[tuple[str, int], float]]  # (task, metric): document: its mark


@dataclass(frozen=True)
class TaskResult:
    """A model on a task, and against the original model where one was given.

    Every `_se` is a standard error over documents, None where there is only one. The fields from
    `reference` on are None without a reference.

    Attributes:
        task: Name of the task or group, as it was asked for.
        metric: Name of the metric, with its filter where the task has several.
        documents: Documents that were marked.
        value: Mean mark.
        value_se: Its standard error.
        reference: Mean mark of the original on the same documents.
        reference_se: Its standard error.
        difference: `value - reference`.
        difference_se: Its standard error, from paired differences of the documents.
        lost: Documents that the original has right and the model wrong; None unless marks are 0 or 1.
        gained: The other way round.
        p_value: McNemar's exact test, two-sided: how likely so uneven a split is by chance alone.
        dtype: Precision in which the model computed, `bfloat16` or another of torch's names.
    """

    task: str
    metric: str
    documents: int
    value: float
    value_se: float | None
    reference: float | None = None
    reference_se: float | None = None
    difference: float | None = None
    difference_se: float | None = None
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def measure(
    model: str | Path,
    tasks: Sequence[str],
    *,
    reference: str | Path | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Mark a model on tasks of lm-evaluation-harness, and the original on the same documents.

    Args:
        model: A checkpoint folder or hub id.
        tasks: Names of tasks, groups or tags.
        reference: The original model.
        include_path: A folder with more tasks (YAML files of the harness).
        limit: Take the first so many documents of every task.
        fewshot: Examples before every question; None leaves it to the task.
        batch_size: Questions asked together. Padding changes a bfloat16 answer a little.
        dtype: Precision, as `hf.load` takes it; but "auto" is float32 on CPUs that have no bfloat16 products,
            and each model's own elsewhere.
        device: Where to run.
        progress: Called with (model, answers so far, answers in all).

    Raises:
        LowbitError: the harness is not installed, there is no such task or precision, its data can't be
            read, or no metric marks single documents.
    """
    dtype = evaluation_dtype(dtype, torch.device(device))
    harness, manager = _open_harness(tasks, include_path)
    ask = {"limit": limit, "num_fewshot": fewshot, "task_manager": manager}
    marks = []
    for name in (model, *([reference] if reference else [])):
        loaded = hf.load(name, packed=False, dtype=dtype, device=device)
        told = (lambda done, total, name=name: progress(str(name), done, total)) if progress else None
        marks.append(_mark(harness, loaded, hf.load_tokenizer(name), tasks, batch_size, ask, told))
        precision = str(loaded.dtype).removeprefix("torch.")
        del loaded
        gc.collect()
    own, original = marks[0], marks[1] if reference else None
    if not own:
        raise LowbitError(f"{', '.join(tasks)}: no metric that marks single documents: choose other tasks")
    rows = [_result(*key, own[key], original[key] if original else None) for key in own]
    return [replace(row, dtype=precision) for row in rows]


def _open_harness(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, Any]:
    """The module `lm_eval`, and its list of tasks, which must hold all of `tasks`."""
    if include_path is not None and not Path(include_path).is_dir():
        raise LowbitError(f"--include-path {include_path} is no folder: give one with YAML files of tasks")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LowbitError(f"tasks need lm-eval ({error}): pip install 'lowbit[tasks]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise LowbitError(f"no task {name!r}: {hint}")
    return lm_eval, manager


def _mark(
    harness: Any,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    batch_size: int,
    ask: Mapping[str, Any],
    told: Callable[[int, int], None] | None,
) -> Marks:
    """Ask one model; marks of single documents by the names that were asked for."""
    from lm_eval.models.huggingface import HFLM

    try:
        with quiet(stderr=True):
            asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        if told:
            _watch(asked, told)
        with quiet(stderr=True):
            found = harness.simple_evaluate(
                model=asked, tasks=list(tasks), bootstrap_iters=0, log_samples=True, **ask
            )
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LowbitError(f"the data of {', '.join(tasks)} can't be read: {reason}") from error
    return _collect(found, tasks)


def _watch(asked: Any, told: Callable[[int, int], None]) -> None:
    """Count answers as they come: both kinds of request go through a method for all and one per batch."""
    count = {"done": 0, "total": 0}

    def watch(of_all: Any, of_batch: Any) -> tuple[Any, Any]:
        def all_of_them(requests: Any, *rest: Any, **options: Any) -> Any:
            count["total"] += len(requests)
            answers = of_all(requests, *rest, **options)
            count["done"] = count["total"]  # questions that share their beginning were answered together
            told(count["done"], count["total"])
            return answers

        def batch(inputs: Any, *rest: Any, **options: Any) -> Any:
            count["done"] += len(inputs)
            told(min(count["done"], count["total"]), count["total"])
            return of_batch(inputs, *rest, **options)

        return all_of_them, batch

    for name, inner in (("_loglikelihood_tokens", "_model_call"), ("generate_until", "_model_generate")):
        outside, inside = watch(getattr(asked, name), getattr(asked, inner))
        setattr(asked, name, outside)
        setattr(asked, inner, inside)


def _collect(found: Mapping[str, Any], tasks: Sequence[str]) -> Marks:
    """The harness's samples, by the name that was asked for: a group's subtasks together, a tag's apart."""
    groups = found.get("group_subtasks") or {}
    asked_as = {leaf: name for name in tasks for leaf in _leaves(name, groups)}
    marks: Marks = defaultdict(dict)
    for task, samples in found["samples"].items():
        several = len({sample["filter"] for sample in samples}) > 1
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, bool | int | float):
                    name = f"{metric} ({sample['filter']})" if several else metric
                    marks[asked_as.get(task, task), name][task, sample["doc_id"]] = float(value)
    return dict(marks)


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if not groups.get(name):
        yield name
    for child in groups.get(name, ()):
        yield from _leaves(child, groups)


def _result(
    task: str,
    metric: str,
    own: Mapping[tuple[str, int], float],
    original: Mapping[tuple[str, int], float] | None,
) -> TaskResult:
    documents = list(own)
    value, value_se = _mean([own[document] for document in documents])
    alone = TaskResult(task, metric, len(documents), value, value_se)
    if original is None:
        return alone
    if original.keys() != own.keys():
        raise LowbitError(f"{task}: the two models were asked different documents: measure them again")
    reference, reference_se = _mean([original[document] for document in documents])
    differences = [own[document] - original[document] for document in documents]
    difference, difference_se = _mean(differences)
    paired = replace(
        alone,
        reference=reference,
        reference_se=reference_se,
        difference=difference,
        difference_se=difference_se,
    )
    if not {*own.values(), *original.values()} <= {0.0, 1.0}:
        return paired
    lost, gained = differences.count(-1.0), differences.count(1.0)
    return replace(paired, lost=lost, gained=gained, p_value=mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p-value: `min(1, 2 P(Binomial(lost + gained, 1/2) <= min(lost, gained)))`.

    >>> mcnemar(9, 1), mcnemar(5, 5), mcnemar(0, 0)
    (0.021484375, 1.0, 1.0)
    """
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, `std / sqrt(n)` with the unbiased variance."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
