"""Tasks with right answers: statistics against brute force, the rest against a stand-in and the harness."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import QuantScheme, record, tasks
from lowbit.errors import LowbitError
from lowbit.tasks import mcnemar, measure
from tests.environment import INSTALL

Folders = Callable[..., Path]
HARNESS = "lm-eval==0.4.13"
ROOT = Path(__file__).parents[1]

RIGHT = {"original": [1, 1, 1, 1, 1, 0, 0, 1, 0, 1], "model": [1, 0, 1, 0, 1, 0, 1, 0, 0, 1]}
SCORES = {"original": [0.5, 0.25, 1.0], "model": [0.25, 0.25, 0.5]}


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (4, 1), (1, 6), (3, 3), (0, 9)])
def test_mcnemar_counts_all_ways_it_could_have_gone(lost: int, gained: int) -> None:
    ways = list(itertools.product((-1, 1), repeat=lost + gained))
    as_uneven = sum(abs(sum(way)) >= abs(lost - gained) for way in ways)
    assert mcnemar(lost, gained) == pytest.approx(as_uneven / len(ways))


def test_mcnemar_of_many_documents() -> None:
    assert mcnemar(2600, 2400) == pytest.approx(0.00491, rel=0.01)  # z = 200 / sqrt(5000), corrected by 1/2


class FakeHarness:
    """What `lm_eval` answers: a group of two subtasks, and a task of two filters with scores from 0 to 1."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def simple_evaluate(self, *, model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        self.asked.append({"tasks": tasks, **options})
        name = str(model.name)
        model._loglikelihood_tokens([1, 2, 3], disable_tqdm=True)
        samples = [
            {"doc_id": i % 5, "filter": "none", "metrics": ["acc", "ppl"], "acc": mark, "ppl": (0.1, 3)}
            for i, mark in enumerate(RIGHT[name])
        ]
        scored = [
            {"doc_id": i, "filter": f, "metrics": ["f1"], "f1": score}
            for f in ("strict", "loose")
            for i, score in enumerate(SCORES[name])
        ]
        found = {"river_a": samples[:5], "river_b": samples[5:], "mills": scored}
        return {"samples": found, "group_subtasks": {"river": ["river_a", "river_b"]}}


class Named(str):
    """A loaded model: its name, and its precision."""

    dtype = torch.bfloat16


class FakeModel:
    """The harness's wrapper around a model: asks two batches."""

    def __init__(self, pretrained: str, tokenizer: Any, batch_size: int) -> None:
        self.name = pretrained

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [self._model_call(torch.zeros(1, 4)) for _ in range(2)]

    def _model_call(self, inputs: torch.Tensor) -> float:
        return 0.0

    def generate_until(self, requests: list[Any]) -> list[str]:
        return []

    def _model_generate(self, context: torch.Tensor) -> None:
        return None


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> FakeHarness:
    """Stands in at the border: modules `lm_eval`, and models that are only names."""
    fake = FakeHarness()
    manager = types.SimpleNamespace(all_tasks=["river", "river_a", "mills", "arc_easy"])
    modules = {
        "lm_eval": types.ModuleType("lm_eval"),
        "lm_eval.tasks": types.ModuleType("lm_eval.tasks"),
        "lm_eval.models": types.ModuleType("lm_eval.models"),
        "lm_eval.models.huggingface": types.ModuleType("lm_eval.models.huggingface"),
    }
    vars(modules["lm_eval"])["simple_evaluate"] = fake.simple_evaluate
    vars(modules["lm_eval.tasks"])["TaskManager"] = lambda include_path: manager
    vars(modules["lm_eval.models.huggingface"])["HFLM"] = FakeModel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tasks.hf, "load", lambda name, **_: Named(name))
    monkeypatch.setattr(tasks.hf, "load_tokenizer", lambda name: None)
    return fake


def test_marks_are_paired_by_document(harness: FakeHarness) -> None:
    told: list[tuple[str, int, int]] = []
    results = measure(
        "model",
        ["river", "mills"],
        reference="original",
        limit=5,
        progress=lambda *step: told.append(step),
    )
    assert harness.asked[0]["tasks"] == ["river", "mills"]
    assert (harness.asked[0]["limit"], harness.asked[0]["num_fewshot"]) == (5, None)
    river, strict, loose = results
    assert (river.task, river.metric, river.documents) == ("river", "acc", 10)
    differences = [q - r for q, r in zip(RIGHT["model"], RIGHT["original"], strict=True)]
    assert river.value == pytest.approx(statistics.mean(RIGHT["model"]))
    assert river.reference == pytest.approx(statistics.mean(RIGHT["original"]))
    assert river.difference == pytest.approx(-0.2)
    assert river.difference_se == pytest.approx(statistics.stdev(differences) / 10**0.5)
    assert (river.lost, river.gained, river.p_value) == (3, 1, pytest.approx(0.625))
    assert (strict.metric, loose.metric) == ("f1 (strict)", "f1 (loose)")
    assert strict.value == pytest.approx(1 / 3)
    assert strict.lost is strict.p_value is None, "McNemar's test is for marks of 0 and 1"
    assert told == [(n, done, 3) for n in ("model", "original") for done in (1, 2, 3)]


def test_without_the_original(harness: FakeHarness) -> None:
    (alone, *_) = measure("model", ["river"])
    assert (alone.value, alone.difference, alone.p_value) == (0.5, None, None)
    assert alone.dtype == "bfloat16"


@pytest.mark.parametrize(("fast", "measured"), [(True, "auto"), (False, torch.float32)])
def test_measured_in_what_the_command_measures_in(
    harness: FakeHarness, monkeypatch: pytest.MonkeyPatch, fast: bool, measured: torch.dtype | str
) -> None:
    asked = []

    def load(name: str, *, dtype: torch.dtype | str, **_: Any) -> Named:
        asked.append(dtype)
        return Named(name)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(tasks.hf, "load", load)
    measure("model", ["river"], reference="original")
    assert asked == [measured] * 2


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["arc_esay"], {}, r"no task 'arc_esay': did you mean arc_easy\?"),
        (["zzz"], {}, "no task 'zzz': `lm-eval ls tasks` lists them"),
        (["mills"], {"include_path": "no-such-folder"}, "--include-path no-such-folder is no folder"),
    ],
)
def test_refusals(harness: FakeHarness, names: list[str], options: Any, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        measure("model", names, **options)


def test_no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[tasks\]'"):
        measure("model", ["arc_easy"])


def test_data_out_of_reach_is_one_line(harness: FakeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nand more")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", offline)
    with pytest.raises(LowbitError, match="the data of arc_easy can't be read: Couldn't reach") as caught:
        measure("model", ["arc_easy"])
    assert "\n" not in str(caught.value)


def test_the_record_keeps_the_newest_of_the_same_documents() -> None:
    kept: dict[str, Any] = {"evaluations": []}
    row = {"task": "river", "metric": "acc", "value": 0.5}
    common = {"reference": "original", "limit": None, "fewshot": None}
    record.add_tasks(kept, {"tasks": [row, row | {"metric": "f1"}], **common, "run": {"date": "1"}})
    record.add_tasks(kept, {"tasks": [row | {"value": 0.6}], **common, "run": {"date": "2"}})
    record.add_tasks(kept, {"tasks": [row], **common, "limit": 10, "run": {"date": "3"}})
    assert [(r["metric"], r["value"], r["limit"]) for r in kept["tasks"]] == [
        ("f1", 0.5, None),
        ("acc", 0.6, None),
        ("acc", 0.5, 10),
    ]
    assert kept["tasks"][0]["original"] == "original"


# The real harness.

QUESTIONS = [
    {"question": f"The {noun} of the town", "choices": choices, "answer": i % 3}
    for i, (noun, choices) in enumerate(
        itertools.product(
            ("river", "mill", "wheel", "miller", "stones", "corn", "sea", "bank"),
            (
                ["rises in the hills", "is old", "turned"],
                ["laughed", "grinds from morning to night", "is high"],
            ),
        )
    )
]


@pytest.fixture(scope="session")
def python_with_harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the harness over this environment's packages, which stay as they are."""
    home = tmp_path_factory.mktemp("harness") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    paths = {"base": str(home), "platbase": str(home)}
    own = Path(sysconfig.get_path("purelib", "posix_prefix", vars=paths))
    (own / "below.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    pins = [
        f"{name}=={sys.modules[name].__version__.partition('+')[0]}" for name in ("torch", "transformers")
    ]
    subprocess.run([str(python), *INSTALL, HARNESS, *pins], check=True)
    return python


def marks_by_hand(folder: Path) -> dict[str, list[float]]:
    """Accuracy as the harness defines it: the likeliest answer, and the likeliest per byte of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"]).input_ids
            whole = tokenizer(f"{row['question']} {choice}").input_ids
            assert whole[: len(start)] == start
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logits[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
        normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        for metric, values in (("acc", scores), ("acc_norm", normed)):
            marks[metric].append(float(values.index(max(values)) == row["answer"]))
    return marks


@pytest.mark.slow
def test_the_real_harness_marks_as_we_do_by_hand(
    python_with_harness: Path, tiny_model: Folders, tmp_path: Path
) -> None:
    import lowbit

    (tmp_path / "tasks").mkdir()
    data = tmp_path / "questions.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (tmp_path / "tasks" / "mills.yaml").write_text(
        f"task: mills\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        encoding="utf-8",
    )
    original, folder = tiny_model("llama"), tmp_path / "w2"
    lowbit.quantize(original, QuantScheme(2, 32), output=folder, method="rtn", verify_output=False)
    command = [str(python_with_harness), "-m", "lowbit", "eval", str(folder), "--reference", str(original),
               "--tasks", "mills", "--include-path", str(tmp_path / "tasks"), "--dtype", "float32",
               "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "triton_kernels")))}
    environment |= {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["metric"]: row for row in json.loads(done.stdout)["tasks"]}
    own, reference = marks_by_hand(dense(folder, tmp_path)), marks_by_hand(original)
    assert own != reference, "quantizing to 2 bits changes answers"
    for metric, row in rows.items():
        pairs = list(zip(own[metric], reference[metric], strict=True))
        assert row["documents"] == len(QUESTIONS)
        assert row["value"] == pytest.approx(statistics.mean(own[metric]))
        assert row["reference"] == pytest.approx(statistics.mean(reference[metric]))
        assert (row["lost"], row["gained"]) == (pairs.count((0.0, 1.0)), pairs.count((1.0, 0.0)))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "mills" in page
    assert "McNemar" in page
    assert "| mills | acc |" in (folder / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in page


def dense(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint's weights in a plain folder."""
    import lowbit

    model = lowbit.load(folder, packed=False)
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"
