"""Perplexity, divergence and agreement against naive float64 loops."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowbit import evaluate, hf
from lowbit.dataset import evaluation_windows
from lowbit.errors import LowbitError
from lowbit.evaluate import compare, perplexity
from lowbit.hardware import find_dtype
from tests.tiny import FAMILIES, TEXT

SCRIPT = Path(__file__).parents[1] / "scripts" / "eval_perplexity.py"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def perturbed(folder: Path, amount: float = 0.05) -> PreTrainedModel:
    model = load(folder)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return model


def windows_for(folder: Path, seq_len: int = 32, count: int | None = 6) -> Tensor:
    return evaluation_windows([TEXT], AutoTokenizer.from_pretrained(folder), seq_len, count)


@torch.no_grad()
def naive(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Log-probabilities of every prediction, float64 `[windows, seq_len - 1, vocabulary]`, all at once."""
    return model(input_ids=windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def naive_nll(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window, token by token."""
    log_probabilities = naive(model, windows)
    return torch.tensor(
        [
            sum(-log_probabilities[w, t, windows[w, t + 1]].item() for t in range(windows.shape[1] - 1))
            / (windows.shape[1] - 1)
            for w in range(len(windows))
        ],
        dtype=torch.float64,
    )


def standard_error(values: Tensor) -> float:
    mean = sum(values.tolist()) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values.tolist()) / (len(values) - 1) / len(values))


@pytest.fixture
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_a_naive_loop(tiny_model: Callable[..., Path], family: str) -> None:
    folder = tiny_model(family)
    model, windows = load(folder), windows_for(folder)
    result = compare(model, None, windows)
    nll = naive_nll(model, windows)
    assert result.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert result.perplexity_se == pytest.approx(nll.mean().exp().item() * standard_error(nll), rel=1e-4)
    assert (result.windows, result.tokens) == (6, 6 * 31)
    assert result.kl is result.reference_perplexity is result.top1_agreement is None


def test_comparison_equals_torch_distributions(folder: Path) -> None:
    model, reference, windows = perturbed(folder), load(folder), windows_for(folder)
    result = compare(model, reference, windows)
    p, q = naive(reference, windows), naive(model, windows)
    divergence = kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean(1)
    assert result.kl == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert result.kl_se == pytest.approx(standard_error(divergence), rel=1e-3)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert 0 < agreement.mean() < 1
    assert result.top1_agreement == pytest.approx(agreement.mean().item())
    assert result.top1_agreement_se == pytest.approx(standard_error(agreement))


def test_ratio_has_the_error_of_paired_differences(folder: Path) -> None:
    model, reference, windows = perturbed(folder, 0.005), load(folder), windows_for(folder)
    result = compare(model, reference, windows)
    nll, original = naive_nll(model, windows), naive_nll(reference, windows)
    assert result.reference_perplexity == pytest.approx(original.mean().exp().item(), rel=1e-5)
    assert result.reference_perplexity_se == pytest.approx(
        original.mean().exp().item() * standard_error(original), rel=1e-4
    )
    ratio = (nll.mean() - original.mean()).exp().item()
    assert result.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert result.perplexity_ratio_se == pytest.approx(ratio * standard_error(nll - original), rel=1e-3)
    assert result.perplexity_ratio_se < result.perplexity_se / result.perplexity / 2


def test_a_model_against_itself(folder: Path) -> None:
    model, windows = load(folder, torch.bfloat16), windows_for(folder)
    result = compare(model, load(folder, torch.bfloat16), windows)
    assert (result.kl, result.kl_se) == (0, 0)
    assert (result.top1_agreement, result.perplexity_ratio) == (1, 1)
    assert result.perplexity == result.reference_perplexity == compare(model, None, windows).perplexity


@pytest.mark.parametrize("rows", [1, 7, 31])
def test_chunks_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    model, reference, windows = perturbed(folder), load(folder), windows_for(folder)
    whole = compare(model, reference, windows)
    sizes: list[int] = []
    token_values = evaluate._token_values

    def spy(logits: Tensor, others: Tensor, targets: Tensor) -> evaluate._Tokens:
        sizes.append(len(logits))
        return token_values(logits, others, targets)

    monkeypatch.setattr(evaluate, "_token_values", spy)
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", 4 * 352 * rows)
    parts = compare(model, reference, windows)
    assert max(sizes) == rows
    assert sum(sizes) == 6 * 31
    for name, value in whole.to_dict().items():
        if name not in ("seconds", "dtype"):
            assert getattr(parts, name) == pytest.approx(value, rel=1e-6), name


def test_one_window_has_no_standard_error(folder: Path) -> None:
    result = compare(perturbed(folder), load(folder), windows_for(folder, count=1))
    assert result.perplexity > 1
    assert {v for k, v in result.to_dict().items() if k.endswith("_se")} == {None}


def test_a_token_that_the_original_rules_out_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]])
    targets = torch.tensor([0, 1])
    nll, other_nll, kl, top1 = evaluate._token_values(logits, logits, targets).means()
    assert (kl, top1) == (0, 1)
    assert 2 * nll == 2 * other_nll == pytest.approx(math.log(1 + math.e) + math.log(1 + math.exp(2)))


def test_progress_and_json(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    result = compare(load(folder), None, windows_for(folder), lambda done, total: told.append((done, total)))
    assert told == [(n, 6) for n in range(1, 7)]
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_precision_is_told(folder: Path, dtype: torch.dtype) -> None:
    result = compare(load(folder).to(dtype), None, windows_for(folder, count=1))
    assert result.dtype == str(dtype).removeprefix("torch.")


class TestRefusals:
    def test_nan(self, folder: Path) -> None:
        good, bad = load(folder), load(folder)
        bad.lm_head.weight.data[5] = torch.nan
        for model, reference in ((bad, None), (bad, good), (good, bad)):
            with pytest.raises(LowbitError, match=r"llama.* gives NaN logits: load it in bfloat16"):
                compare(model, reference, windows_for(folder))

    @pytest.mark.parametrize(
        ("value", "what"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")]
    )
    def test_an_original_that_gives_no_numbers(self, folder: Path, value: float, what: str) -> None:
        """Normalized they are NaN, of which the divergence would make a 0."""

        def original(index: int, window: Tensor) -> Tensor:
            logits = torch.zeros(len(window) - 1, 352)
            logits[3] = value
            return logits

        with pytest.raises(LowbitError) as caught:
            compare(load(folder), original, windows_for(folder))
        assert str(caught.value) == f"the original gives {what} logits: load it in bfloat16 or float32"

    def test_training_mode(self, folder: Path) -> None:
        with pytest.raises(LowbitError, match=r"is in training mode: call model.eval"):
            compare(load(folder), load(folder).train(), windows_for(folder))

    def test_windows_longer_than_the_context(self, folder: Path) -> None:
        with pytest.raises(LowbitError, match="windows of 513 tokens exceed the 512 positions"):
            compare(load(folder), None, torch.zeros(1, 513, dtype=torch.int64))

    def test_different_vocabularies(self, folder: Path) -> None:
        other = load(folder)
        other.resize_token_embeddings(360)
        with pytest.raises(LowbitError, match=r"has 352 logits and .* 360"):
            compare(load(folder), other, windows_for(folder))

    def test_a_loaded_model_without_tokenizer(self, folder: Path) -> None:
        with pytest.raises(LowbitError, match="needs its tokenizer"):
            perplexity(load(folder), "text.txt")


def test_perplexity_of_a_folder_and_of_a_model(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    model, tokenizer = load(folder, torch.bfloat16), AutoTokenizer.from_pretrained(folder)
    expected = compare(model, None, windows_for(folder)).perplexity
    assert perplexity(model, str(text), tokenizer, seq_len=32, windows=6).perplexity == expected
    result = perplexity(str(folder), str(text), reference=folder, seq_len=32, windows=6)
    assert result.perplexity == expected
    assert result.kl == 0


@pytest.mark.slow
def test_script(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    command = [sys.executable, SCRIPT, folder, "--dataset", "text.txt", "--reference", folder]
    command += ["--seq-len", "32"]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = run("--windows", "6", "--json")
    assert done.returncode == 0, done.stderr
    saved = json.loads(done.stdout)
    assert (saved["perplexity_ratio"], saved["kl"]) == (1, 0)
    monkeypatch.undo()  # the script is a process of its own, which knows this CPU
    dtype = find_dtype("auto", torch.device("cpu"))
    assert saved["perplexity"] == compare(load(folder, dtype), None, windows_for(folder)).perplexity
    refused = run("--seq-len", "4096")
    assert refused.returncode == 2
    assert refused.stderr.strip().startswith("lowbit: the text has")


@pytest.mark.parametrize("named", ["model", "reference", "both"])
def test_what_is_named_is_put_where_it_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    asked: list[tuple[object, object]] = []
    original = hf.load

    def spy(name: Path, *, packed: bool, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        asked.append((dtype, device))
        return original(name, packed=packed, dtype=dtype)

    monkeypatch.setattr(evaluate.hf, "load", spy)
    given, tokenizer = load(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    model = given if named == "reference" else folder
    reference = given if named == "model" else folder
    found = perplexity(model, str(text), tokenizer, reference=reference, seq_len=32, windows=1,
                       device=torch.device("cuda:1"), dtype="float16")  # fmt: skip
    assert asked == [(torch.float16, torch.device("cuda:1"))] * (1 + (named == "both"))
    assert found.kl is not None
    asked.clear()
    monkeypatch.setattr(
        evaluate, "find_device", lambda name: torch.device("cuda:0" if name == "auto" else name)
    )
    monkeypatch.setattr(evaluate, "evaluation_dtype", lambda name, device: (name, device))
    monkeypatch.setattr(
        evaluate.hf, "load", lambda *_, dtype, device, packed: asked.append((dtype, device)) or given
    )
    perplexity(model, str(text), tokenizer, reference=reference, seq_len=32, windows=1)
    if named == "both":  # a GPU where there is one
        assert asked == [(("auto", torch.device("cuda:0")), torch.device("cuda:0"))] * 2
    else:  # like what was given
        assert asked == [(torch.float32, torch.device("cpu"))]


def test_a_precision_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(LowbitError, match="--dtype int4 is not supported"):
        perplexity(folder, str(text), seq_len=32, windows=1, dtype="int4")
