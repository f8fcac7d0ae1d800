"""A checkpoint refined: closer to the original, the same codes, and it still loads everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit import QuantScheme, hf, quantize
from lowbit.blocks import fingerprint
from lowbit.distill import distill
from lowbit.errors import LowbitError
from lowbit.refine import refine


def rows(count: int = 64) -> Tensor:
    return torch.randint(3, 90, (count, 64), generator=torch.Generator().manual_seed(0))


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def divergence(folder: Path, original: Path) -> float:
    with torch.no_grad():
        p = hf.load_stock(original, torch.float32)(input_ids=rows()[-4:]).logits.log_softmax(-1)
        q = hf.load(folder, packed=False, dtype=torch.float32)(input_ids=rows()[-4:]).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_only_scales_and_norms_change(
    format: str, tiny_model: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = tiny_model("llama")
    folder = checkpoint("llama", QuantScheme(4, 32, format != "awq"), format=format)
    done = refine(
        folder, original, tmp_path / "refined", rows(), epochs=6, tokens_per_step=512, dtype=torch.float32
    )
    assert done.kept
    assert done.after < done.before
    before, after = tensors(folder), tensors(tmp_path / "refined")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"weight_scale", "scales", "weight"}
    assert changed & {"weight_scale", "scales"}
    assert all("norm" in n for n in before if n.endswith(".weight") and not torch.equal(before[n], after[n]))
    assert divergence(tmp_path / "refined", original) < divergence(folder, original)
    config = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "refined" / "config.json").read_text()) == config
    model = hf.load(tmp_path / "refined", packed=False)
    for name, digest in done.fingerprints.items():
        assert fingerprint(model.get_submodule(name).weight) == digest
    assert (tmp_path / "refined" / "tokenizer.json").is_file()


def test_norms_are_written_where_files_leave_out_a_prefix(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As `AutoModel.save_pretrained` does; what is read back is then what was trained."""
    original = Path(shutil.copytree(tiny_model("llama", tied=True), tmp_path / "base"))
    state = {key.removeprefix("model."): value for key, value in tensors(original).items()}
    save_file(state, original / "model.safetensors", {"format": "pt"})
    folder, found = tmp_path / "rounded", tmp_path / "refined"
    quantize(original, QuantScheme(2, 32), output=folder, method="rtn")
    done = refine(folder, original, found, rows(), epochs=3, tokens_per_step=512, dtype=torch.float32)
    assert done.kept
    before, after = tensors(folder), tensors(found)
    norms = [name for name in before if "norm" in name]
    assert len(norms) == 7
    assert not any(torch.equal(before[name], after[name]) for name in norms)


@pytest.mark.parametrize(("family", "told"), [("llama", "trained for"), ("gpt2", "were not trained: GPT2LM")])
def test_effort_high_trains_or_says_why_not(
    family: str, told: str, tiny_model: Callable[..., Path], text_file: str, tmp_path: Path
) -> None:
    report = quantize(
        tiny_model(family), QuantScheme(3, 32, False), output=tmp_path / "out", effort="high", epochs=20,
        format="gptq", dataset=text_file, samples=48, seq_len=64, dtype="float32",
    )  # fmt: skip
    assert report.method == "qronos"
    assert any(told in note for note in report.notes), report.notes
    assert report.verification is not None
    assert divergence(tmp_path / "out", tiny_model(family)) < 0.5


@pytest.mark.parametrize(
    ("asked", "taken"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)],
)
def test_training_works_in_the_precision_of_the_rounding(
    asked: str, taken: torch.dtype, tiny_model: Callable[..., Path], text_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = []

    def spy(model: Any, weights: Any, tokens: Tensor, targets: list[Tensor], **options: Any) -> Any:
        seen.append((model.dtype, targets[0].dtype))
        return distill(model, weights, tokens, targets, **options)

    monkeypatch.setattr("lowbit.refine.distill", spy)
    report = quantize(
        tiny_model("llama"), QuantScheme(4, 32), output=tmp_path / "out", effort="high", dtype=asked,
        dataset=text_file, samples=16, seq_len=32,
    )  # fmt: skip
    assert seen == [(taken, taken)]
    (told,) = [note for note in report.notes if "scales and norms" in note]
    assert ("steps, in bfloat16:" in told or "norms, in bfloat16 gained" in told) == (asked == "float16")


def test_a_model_that_is_not_quantized_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    with pytest.raises(LowbitError, match="not quantized"):
        refine(folder, folder, tmp_path / "refined", rows())
    assert not (tmp_path / "refined").exists()
