"""Model cards: read back by huggingface_hub, and never overwritten once edited."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from lowbit import card, record
from lowbit.results import Report
from tests.test_report import measure

Folders = Callable[..., Path]
Run = Callable[..., Report]

SOURCE_CARD = """---
license: other
license_name: river
license_link: https://example.org/licence
language:
- en
tags:
- theirs
base_model: someone/older
---
# The original
"""


@pytest.fixture
def source(tiny_model: Folders, tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


def test_metadata(quantize: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = quantize(source, quantized_by="me")
    found = ModelCard.load(done.output / "README.md")
    data = found.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "river")
    assert data["license_link"] == "https://example.org/licence"
    assert data["language"] == ["en"]
    assert data["quantized_by"] == "me"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert set(data["tags"]) == {"lowbit", "quantized", "rtn", "compressed-tensors", "4-bit"}
    assert "base_model" not in data, "a local folder is no base_model of the Hub"
    assert "model-index" not in data, "nothing was measured"
    assert "Not measured yet" in found.text
    assert found.content.startswith("---\n")


@pytest.mark.parametrize(("method", "shown"), [("rtn", "RTN"), ("quick", "QUICK (GPTQ in one pass)")])
def test_the_algorithm_is_named_as_it_is_asked_for(
    quantize: Run, tiny_model: Folders, method: str, shown: str
) -> None:
    made = quantize(tiny_model("llama"), method=method, verify_output=False).output
    assert dict(card._facts(record.load(made)))["algorithm"] == shown
    assert shown in (made / "README.md").read_text(encoding="utf-8")


def test_a_model_of_the_hub_is_the_base_model(quantize: Run, tiny_model: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--river-1.5B" / "snapshots" / "0123456789abcdef"
    shutil.copytree(tiny_model("llama"), folder)
    data = ModelCard.load(quantize(folder).output / "README.md").data.to_dict()
    assert data["base_model"] == "org/river-1.5B"
    assert data["base_model_relation"] == "quantized"
    assert "license" not in data


def test_the_model_index_round_trips(quantize: Run, source: Path, text_file: str) -> None:
    done = quantize(source)
    measure(done.output, source, text_file)
    found, kept = ModelCard.load(done.output / "README.md"), record.load(done.output)
    assert kept is not None
    name, results = model_index_to_eval_results(found.data.to_dict()["model-index"])
    assert name == "out"
    measured = kept["evaluations"][0]["result"]
    assert {result.metric_type: result.metric_value for result in results} == {
        metric: measured[metric] for metric in ("perplexity", "perplexity_ratio", "kl", "top1_agreement")
    }
    for result in results:
        assert result.metric_args == {"standard_error": measured[f"{result.metric_type}_se"]}
        assert (result.dataset_name, result.dataset_args) == ("text.txt", {"seq_len": 64, "windows": 5})
    assert "Not measured yet" not in found.text
    assert f"{measured['kl']:.2f}" in found.text


def test_an_evaluation_without_the_original(quantize: Run, source: Path) -> None:
    done = quantize(source)
    kept = record.load(done.output)
    assert kept is not None
    nothing = dict.fromkeys(("kl", "kl_se", "perplexity_ratio", "top1_agreement", "perplexity_se"))
    result = {"perplexity": 12.0, "windows": 1, "tokens": 63, **nothing}
    entry = {"dataset": "org/text:config:test", "seq_len": 64, "reference": None, "result": result,
             "run": record.this_run()}  # fmt: skip
    record.add_evaluation(kept, entry)
    (found,) = card.eval_results(kept)
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == ("org/text", "config", "test")
    assert (found.metric_type, found.metric_value, found.metric_args) == ("perplexity", 12.0, None)
    assert "| org/text:config:test, 1 x 64 tokens | 12.0 |" in card.render(kept)


def test_an_edited_card_keeps_its_text(quantize: Run, source: Path, text_file: str) -> None:
    done = quantize(source)
    path = done.output / "README.md"
    mine = path.read_text().replace("license: other", "license: mit").replace("# out", "# My model\n\nHello.")
    path.write_text(mine)
    _, note = measure(done.output, source, text_file)
    assert "was edited: its text is left as it is" in note
    found = ModelCard.load(path)
    assert found.text == ModelCard(mine).text
    assert found.data.license == "mit"
    assert len(found.data.eval_results) == 4


def test_a_card_without_a_sound_header_is_left_alone(quantize: Run, source: Path, text_file: str) -> None:
    done = quantize(source)
    path = done.output / "README.md"
    path.write_text("---\nlicense: [mit\n---\n# Mine\n")
    _, note = measure(done.output, source, text_file)
    assert "its header can't be read: left as it is" in note
    assert path.read_text() == "---\nlicense: [mit\n---\n# Mine\n"


def test_a_source_with_an_odd_card(quantize: Run, source: Path) -> None:
    for text in ("---\nlicense: [mit\n---\n", "no header", "---\n- a list\n---\n"):
        (source / "README.md").write_text(text)
        assert card.source_metadata(source) == {}
    assert "license" not in ModelCard.load(quantize(source).output / "README.md").data.to_dict()


def test_engines_that_do_not_load_it(quantize: Run, source: Path) -> None:
    from lowbit import QuantScheme

    done = quantize(source, QuantScheme(4, 32, symmetric=False), format="gptq")
    assert any("vLLM" in warning for warning in done.warnings)
    text = (done.output / "README.md").read_text()
    assert "vllm serve" not in text
    assert all(warning in text for warning in done.warnings)
    assert "vllm serve out" in card.render(_kept(quantize(source, overwrite=True).output))


def _kept(folder: Path) -> dict[str, object]:
    kept = record.load(folder)
    assert kept is not None
    return kept
