"""`lowbit.quantize` from end to end: what it loses, what it says and what it costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import QuantScheme, hf, reach
from lowbit.algorithms import REWRITES, awq
from lowbit.calibration import STARVED
from lowbit.dataset import evaluation_windows
from lowbit.evaluate import compare
from lowbit.results import Report
from lowbit.road import Road
from tests.tiny import TEXT, make_model, make_tokenizer

Folders = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


# --- what quantization costs


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "mixtral"])
def test_calibrated_methods_lose_less_than_rounding(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family)
    windows = evaluation_windows([TEXT * 2], hf.load_tokenizer(folder), 64)
    original = hf.load(folder, packed=False)
    kl = {}
    for method in ("rtn", "gptq", "awq"):
        output = tmp_path / method
        quantize(folder, method=method, output=output, samples=16, seq_len=64, verify_output=False)
        found = compare(hf.load(output, packed=False), original, windows).kl
        assert found is not None
        kl[method] = found
    assert kl["gptq"] < 0.75 * kl["rtn"]
    assert kl["awq"] < 0.9 * kl["rtn"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_second_moments_follow_the_folds_of_awq(
    quantize: Callable[..., Report],
    tiny_model: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """A fold changes W and H and leaves the output's moments W H W^T, of the block's first matrices."""
    round_weight = awq.quantize_weight
    seen: list[tuple[Tensor, Tensor]] = []

    def record(weight: Tensor, hessian: Tensor, *rest: Any) -> Any:
        seen.append((weight.clone(), hessian.clone()))
        return round_weight(weight, hessian, *rest)

    def random_factors(weights: list[Tensor], hessian: Tensor, *_: object) -> Tensor:
        return torch.rand(len(hessian), generator=torch.Generator().manual_seed(7)) * 1.5 + 0.5

    monkeypatch.setattr(awq, "quantize_weight", record)
    for name, factors in (("plain", lambda *_: None), ("folded", random_factors)):
        monkeypatch.setitem(REWRITES, "awq", factors)
        quantize(tiny_model(family), output=tmp_path / name, method="awq", format="gptq", dtype="float32")
    (old, before), (new, after) = seen[0], seen[len(seen) // 2]
    assert (new - old).norm() > 0.1 * old.norm()
    assert (after - before).norm() > 0.1 * before.norm()
    values = 2 * len(new) // 3 if family == "gpt2" else len(new)  # GPT-2's values are scaled once more
    expected, found = (w[:values] @ h @ w[:values].T for w, h in ((old, before), (new, after)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_more_bits_lose_less(quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path) -> None:
    errors = []
    for bits in (2, 3, 4, 8):
        report = quantize(tiny_model("llama"), QuantScheme(bits, 32), output=tmp_path / str(bits))
        errors.append(sum(layer.error for layer in report.layers))
    assert all(worse > 3 * better for worse, better in pairwise(errors))


def test_the_reported_error_is_that_of_the_weight(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    report = quantize(tiny_model("llama"))
    assert not report.calibration_used
    before = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    before, after = (
        before.requires_grad_(False),
        hf.load(report.output, packed=False, dtype=torch.float32).requires_grad_(False),
    )
    for layer in report.layers:
        original = before.get_submodule(layer.name).weight
        lost = (after.get_submodule(layer.name).weight - original).square().sum()
        assert layer.error == pytest.approx(float(lost / original.square().sum()), rel=0.02)
        assert layer.shape == tuple(original.shape)
        assert layer.scheme == "w4g32"


def test_the_reported_error_is_that_of_the_output(
    quantize: Callable[..., Report], tiny_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, whose inputs are the original's, over several batches; tokens as they count."""
    monkeypatch.setattr("lowbit.batches.TOKENS_PER_BATCH", 200)
    report = quantize(tiny_model("llama"), method="gptq", samples=1000, mix=False)
    rows = make_rows(tiny_model("llama"), report)
    before = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    after = hf.load(report.output, packed=False, dtype=torch.float32)
    inputs: list[Tensor] = []
    before.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        before(input_ids=rows)
    x = (inputs[0] * reach.places(rows.shape[1]).sqrt()[:, None]).flatten(0, 1)
    for name in ("q_proj", "k_proj", "v_proj"):
        full = f"model.layers.0.self_attn.{name}"
        old, new = before.get_submodule(full).weight, after.get_submodule(full).weight
        expected = ((x @ (new - old).T).square().sum() / (x @ old.T).square().sum()).item()
        [found] = [layer.error for layer in report.layers if layer.name == full]
        assert found == pytest.approx(expected, rel=0.05)


def make_rows(folder: Path, report: Report) -> Tensor:
    """All rows of the calibration text; `report` asked for more than there are."""
    from lowbit.dataset import pack_tokens, read_documents

    file = report.calibration.partition(": ")[0]
    return pack_tokens(read_documents(file), hf.load_tokenizer(folder), 1000, 48, 0)


# --- what it is calibrated on


def test_fewer_rows_than_asked_for_are_reported(
    quantize: Callable[..., Report], tiny_model: Folders, text_file: str
) -> None:
    report = quantize(tiny_model("llama"), method="gptq", samples=500)
    [note] = report.notes
    rows = int(note.split(" gives ")[1].split()[0])
    assert note == f"{text_file} gives {rows} sequences of 48 tokens, not 500"
    mixed = f", {rows // 5} of the rows from lowbit's passages"
    assert report.calibration == f"{text_file}: {rows} x 48 tokens, seed 0{mixed}"
    assert report.calibration_used


def test_a_data_set_out_of_reach_is_reported(quantize: Callable[..., Report], tiny_model: Folders) -> None:
    report = quantize(tiny_model("llama"), method="gptq", dataset=None)
    assert report.calibration == "self: 4 x 48 tokens, seed 0"
    assert report.notes == [
        "NeelNanda/pile-10k could not be reached: calibrated on text sampled from the model itself"
    ]


def test_no_data_is_read_where_none_is_needed(quantize: Callable[..., Report], tiny_model: Folders) -> None:
    report = quantize(tiny_model("llama"), dataset="no/such:thing")
    assert report.calibration == "none: rtn uses no data"


def test_an_expert_that_no_token_reached_is_noted_and_in_its_place(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("mixtral"), tmp_path / "model")
    tensors = tensors_of(folder)
    for key in tensors:
        if key.endswith("gate.weight"):
            tensors[key].zero_()  # every token takes the same two of four
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = quantize(folder, method="gptq", samples=1, seq_len=16)
    assert report.verification is not None  # each expert is in its own place
    fallen = [layer for layer in report.layers if layer.note]
    assert fallen
    assert all("experts" in layer.name for layer in fallen)
    unseen = [layer for layer in fallen if layer.note != STARVED]
    assert unseen
    assert [note for note in report.notes if note.startswith(f"{len(unseen)} layers: no calibration token")]
    assert f"{len(fallen) - len(unseen)} layers: {STARVED}" in report.notes  # 16 tokens, 64 inputs
    enough = quantize(folder, method="gptq", samples=8, seq_len=48, output=tmp_path / "enough")
    assert not [layer for layer in enough.layers if layer.note == STARVED]


# --- a model in memory


def test_a_loaded_model(quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize(model, method="gptq", output=tmp_path / "memory")
    reference = quantize(folder, method="gptq", output=tmp_path / "folder")
    one, two = tensors_of(report.output), tensors_of(reference.output)
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "memory"]
    assert (report.output / "chat_template.jinja").is_file()


def test_a_loaded_model_without_a_folder_needs_a_tokenizer(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2")).config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.name_or_path = model.name_or_path = ""
    with pytest.raises(lowbit.LowbitError, match="pass tokenizer="):
        quantize(model)
    assert len(quantize(model, tokenizer=make_tokenizer()).layers) == 21


def test_a_loaded_model_that_is_quantized_is_refused(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    report = quantize(tiny_model("llama"))
    model = AutoModelForCausalLM.from_pretrained(report.output)
    with pytest.raises(lowbit.LowbitError, match="already quantized: start from the original"):
        quantize(model, output=tmp_path / "again")


def test_a_loaded_model_is_not_written_over(quantize: Callable[..., Report], tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    with pytest.raises(lowbit.LowbitError, match="is the model itself"):
        quantize(AutoModelForCausalLM.from_pretrained(folder), output=folder, overwrite=True)


# --- memory, progress, order


def test_one_block_is_in_memory_at_a_time(
    quantize: Callable[..., Report], tiny_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    roads: list[Any] = []
    create = Road.__init__

    def record(self: Any, *args: Any) -> None:
        create(self, *args)
        roads.append(self)

    monkeypatch.setattr(Road, "__init__", record)
    seen: set[tuple[int, ...]] = set()
    outside: set[bool] = set()

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "quantize":
            [road] = roads
            loaded = [i for i, b in enumerate(road.plan.blocks) if any(not p.is_meta for p in b.parameters())]
            seen.add(tuple(loaded))
            outside.add(road.source.model.model.norm.weight.is_meta)

    quantize(tiny_model("gemma3"), method="awq", progress=progress)
    assert seen == {(0,), (1,), (2,), (3,)}
    assert outside == {False}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_progress_counts_to_the_end(
    quantize: Callable[..., Report], tiny_model: Folders, method: str
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        assert detail
        told.setdefault(stage, []).append((done, total))

    quantize(tiny_model("mixtral"), method=method, dataset="self", progress=progress)
    assert list(told) == (["quantize", "verify"] if method == "rtn" else ["sample", "quantize", "verify"])
    for steps in told.values():
        done = [step for step, _ in steps]
        assert done == sorted(done)
        assert steps[-1][0] == steps[-1][1]
        assert len({total for _, total in steps}) == 1


def test_the_report_adds_up(quantize: Callable[..., Report], tiny_model: Folders) -> None:
    report = quantize(tiny_model("llama"), method="gptq")
    assert report.output_bytes == sum(t.nbytes for t in tensors_of(report.output).values())
    assert report.source_bytes == (tiny_model("llama") / "model.safetensors").stat().st_size
    stages = {"calibration data", "quantization", "verification"}
    assert set(report.seconds) == stages | {"all"}
    assert sum(report.seconds[stage] for stage in stages) <= report.seconds["all"]
    assert (report.method, report.format, report.scheme) == ("gptq", "compressed-tensors", "w4g32")


def test_unverified_is_said_and_faster(quantize: Callable[..., Report], tiny_model: Folders) -> None:
    assert quantize(tiny_model("llama"), verify_output=False).verification is None


def test_overwriting_replaces_the_whole_folder(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    first = quantize(tiny_model("llama"), max_shard_size="60KB").output
    assert (first / "model.safetensors.index.json").exists()
    with pytest.raises(lowbit.LowbitError, match="add --overwrite"):
        quantize(tiny_model("qwen2"))
    second = quantize(tiny_model("qwen2"), overwrite=True).output
    assert second == first
    assert not (second / "model.safetensors.index.json").exists()
    assert config_of(second)["model_type"] == "qwen2"
    assert list(tmp_path.iterdir()) == [second]


@pytest.mark.parametrize(("argument", "value"), [("method", "hqq"), ("format", "gguf")])
def test_unknown_names(
    quantize: Callable[..., Report], tiny_model: Folders, argument: str, value: str
) -> None:
    with pytest.raises(lowbit.LowbitError, match=f"{argument}='{value}' is unknown: use one of "):
        quantize(tiny_model("llama"), **{argument: value})
