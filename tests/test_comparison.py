"""Several checkpoints on one page: the same numbers as one by one, and the right curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowbit import QuantScheme, hf
from lowbit.comparison import (
    Comparison,
    Measured,
    Original,
    compare_checkpoints,
    frontier,
    short_names,
    weight_bytes,
)
from lowbit.comparison_page import render
from lowbit.errors import LowbitError
from lowbit.evaluate import Result, compare, perplexity
from tests.page import Page
from tests.test_evaluate import windows_for
from tests.tiny import FAMILIES

Folders = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kept_original_gives_the_same_logits(tiny_model: Folders, family: str) -> None:
    folder = tiny_model(family)
    windows = windows_for(folder, 32, 2)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [whole(input_ids=window[None], use_cache=False).logits[0, :-1] for window in windows]
    told: list[tuple[str, int, int, str]] = []
    kept = Original(hf.load(folder, dtype=torch.float32), windows, lambda *step: told.append(step))
    for index in (1, 0, 1):
        assert torch.equal(kept(index, windows[index]), expected[index])
    assert told[-1][1] == told[-1][2] == len(told)
    blocks = kept._stream.blocks
    assert all(parameter.is_meta for parameter in blocks.parameters()), "the blocks are let go"


@pytest.fixture(scope="module")
def compared(tiny_model: Folders, checkpoint: Folders, text_file: str) -> tuple[Comparison, list[Path]]:
    folders = [checkpoint(scheme=QuantScheme(bits, 32)) for bits in (8, 4)]
    folders.append(checkpoint(scheme=QuantScheme(4, 32), format="gptq"))
    names = [str(folder) for folder in folders]
    with pytest.MonkeyPatch.context() as patch:  # made before what patches single tests
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        return compare_checkpoints(names, str(tiny_model("llama")), text_file, seq_len=64, windows=3), folders


def test_each_is_measured_as_alone(
    compared: tuple[Comparison, list[Path]], tiny_model: Folders, text_file: str
) -> None:
    found, folders = compared
    for model, folder in zip(found.models, folders, strict=True):
        alone = perplexity(folder, text_file, reference=tiny_model("llama"), seq_len=64, windows=3)
        for name, value in alone.to_dict().items():
            if name != "seconds":
                assert getattr(model.result, name) == value, name
        assert model.bytes == (folder / "model.safetensors").stat().st_size
    eight, four, gptq = found.models
    assert (eight.result.kl or 0) < (four.result.kl or 0)
    assert eight.bytes > four.bytes
    assert four.result.kl == gptq.result.kl, "the same grid in another format"
    assert four.scheme == "w4g32 compressed-tensors"
    weights = hf.load(tiny_model("llama")).num_parameters()
    assert four.bits_per_weight == pytest.approx(8 * four.bytes / weights)


def test_the_page(compared: tuple[Comparison, list[Path]]) -> None:
    found, _ = compared
    html = render(found)
    page = Page(html)
    assert page.fetched == []
    assert len(html) < 300_000
    (table,) = [table for table in page.tables if table[0][0] == "checkpoint"]
    assert [row[0].replace("on the line", "") for row in table[2:]] == [model.name for model in found.models]
    for model, row in zip(found.models, table[2:], strict=True):
        assert f"{model.bits_per_weight:.2f}" == row[3]
        assert float(row[4].split(" ")[0]) == pytest.approx(model.result.kl, rel=0.05)
    svg = [attributes["aria-label"] or "" for tag, attributes in page.tags if attributes.get("aria-label")]
    assert any("against the size" in label for label in svg)
    assert html.count('class="point s') == 3
    assert "size of the weight files, MB" in page.text
    assert "KL divergence, nats per token (log scale)" in page.text


def test_as_json(compared: tuple[Comparison, list[Path]]) -> None:
    found, _ = compared
    plain = json.loads(json.dumps(found.to_dict()))
    assert [model["kl"] for model in plain["models"]] == [model.result.kl for model in found.models]
    assert set(plain["models"][0]) >= {"name", "bytes", "bits_per_weight", "kl_se", "perplexity_ratio"}


def test_the_frontier() -> None:
    def model(name: str, size: int, kl: float) -> Measured:
        return Measured(name, "", size, 4.0, Result(1.0, None, 1, 1, 0.0, kl=kl), {})

    models = [
        model("a", 4, 0.1),
        model("b", 3, 0.2),
        model("worse", 4, 0.15),
        model("c", 2, 0.5),
        model("d", 9, 0.1),
    ]
    assert [one.name for one in frontier(models)] == ["c", "b", "a"]


def test_names() -> None:
    assert short_names(["x/w4", "y/w4", "org/model"]) == ["x/w4", "y/w4", "model"]
    with pytest.raises(LowbitError, match="given twice"):
        short_names(["x/w4", "x/w4/"])


def test_another_models_checkpoint(tiny_model: Folders) -> None:
    other = hf.load(tiny_model("llama"))
    other.resize_token_embeddings(360)
    windows = windows_for(tiny_model("llama"), 32, 1)
    original = Original(hf.load(tiny_model("llama")), windows, lambda *_: None)
    with pytest.raises(LowbitError, match="the one it was made from"):
        compare(other, original, windows)


def test_an_original_that_gives_no_numbers(tiny_model: Folders) -> None:
    folder = tiny_model("llama")
    bad, windows = hf.load(folder), windows_for(folder, 32, 2)
    bad.lm_head.weight.data[5] = torch.nan
    original = Original(bad, windows, lambda *_: None)
    with pytest.raises(LowbitError, match=r"^the original gives NaN logits: load it in bfloat16 or float32$"):
        compare(hf.load(folder), original, windows)


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_second_copy_of_the_weights_is_not_counted(tiny_model: Folders, tmp_path: Path, size: str) -> None:
    """Mistral's repositories hold `consolidated.safetensors` beside what loaders read."""
    folder = shutil.copytree(tiny_model("mistral", max_shard_size=size), tmp_path / "model")
    expected = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    save_file({"layers.0.attention.wq.weight": torch.ones(64, 64)}, folder / "consolidated.safetensors")
    assert weight_bytes(str(folder), folder) == expected


def test_a_shard_that_is_not_there_is_one_line(tiny_model: Folders, text_file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama", max_shard_size="60KB"), tmp_path / "model")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(LowbitError, match=f"model can't be loaded: .*{gone.name}"):
        compare_checkpoints([str(folder)], str(tiny_model("llama")), text_file, seq_len=32, windows=1)
