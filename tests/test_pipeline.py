"""`lowbit.quantize` from end to end: what it writes, what it keeps, what it says and what it costs."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit import QuantScheme, hf, pipeline
from lowbit.dataset import evaluation_windows
from lowbit.evaluate import compare
from lowbit.results import Report
from tests.tiny import TEXT, make_model, make_tokenizer

Folders = Callable[..., Path]
W4 = QuantScheme(4, 32)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return str(file)


@pytest.fixture
def quantize(text_file: str, tmp_path: Path) -> Callable[..., Report]:
    def run(model: Any, scheme: QuantScheme | None = W4, **options: Any) -> Report:
        defaults = {
            "output": tmp_path / "out",
            "dataset": text_file,
            "samples": 4,
            "seq_len": 48,
            "method": "rtn",
        }
        return pipeline.quantize(model, scheme, **(defaults | options))

    return run


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
    original = hf.load(folder)
    kl = {}
    for method in ("rtn", "gptq", "awq"):
        output = tmp_path / method
        quantize(folder, method=method, output=output, samples=16, seq_len=64, verify_output=False)
        found = compare(hf.load(output), original, windows).kl
        assert found is not None
        kl[method] = found
    assert kl["gptq"] < 0.75 * kl["rtn"]
    assert kl["awq"] < 0.9 * kl["rtn"]


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
    before, after = before.requires_grad_(False), hf.load(report.output, torch.float32).requires_grad_(False)
    for layer in report.layers:
        original = before.get_submodule(layer.name).weight
        lost = (after.get_submodule(layer.name).weight - original).square().sum()
        assert layer.error == pytest.approx(float(lost / original.square().sum()), rel=0.02)
        assert layer.shape == tuple(original.shape)
        assert layer.scheme == "w4g32"


def test_the_reported_error_is_that_of_the_output(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    """Of the first layer, whose inputs are the original's."""
    report = quantize(tiny_model("llama"), method="gptq", samples=1000)
    rows = make_rows(tiny_model("llama"), report)
    before = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    after = hf.load(report.output, torch.float32)
    inputs: list[Tensor] = []
    before.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        before(input_ids=rows)
    x = inputs[0].flatten(0, 1)
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


# --- what is written


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_the_same_seed_gives_the_same_bytes(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path, method: str
) -> None:
    for name, options in [("a", {}), ("b", {}), ("c", {"seed": 1})]:
        quantize(tiny_model("mixtral"), method=method, output=tmp_path / name, dataset="self", samples=3,
                 seq_len=32, **options)  # fmt: skip
    files = {name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    same_weights = files["a"]["model.safetensors"] == files["c"]["model.safetensors"]
    assert same_weights == (method == "rtn")


def test_what_stood_beside_the_model_comes_along(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (folder / "preprocessor.json").write_text('{"own": 1}')
    (folder / "modeling_own.py").write_text("# code of its own\n")
    (folder / "README.md").write_text("The card of the original.")
    report = quantize(folder)
    carried = {f.name for f in folder.iterdir()} - {"model.safetensors", "config.json", "README.md"}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } < carried
    for name in carried:
        assert (report.output / name).read_bytes() == (folder / name).read_bytes()
    assert {f.name for f in report.output.iterdir()} == carried | {"model.safetensors", "config.json"}
    chat = [{"role": "user", "content": "Who built the mill?"}]
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(report.output)
    assert after.apply_chat_template(chat) == before.apply_chat_template(chat)
    assert AutoModelForCausalLM.from_pretrained(report.output).generation_config.eos_token_id == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards_hold_what_one_file_holds(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path, family: str
) -> None:
    whole = tensors_of(quantize(tiny_model(family), output=tmp_path / "whole").output)
    parts = quantize(tiny_model(family), output=tmp_path / "parts", max_shard_size="60KB").output
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    shards = sorted(parts.glob("*.safetensors"))
    assert len(shards) > 2
    found = tensors_of(parts)
    assert set(index["weight_map"]) == set(found) == set(whole)
    for shard in shards:
        assert {k for k, name in index["weight_map"].items() if name == shard.name} == set(load_file(shard))
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_sharded_input_gives_the_same_output(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    one = tensors_of(quantize(tiny_model("llama"), output=tmp_path / "one", method="gptq").output)
    many = tiny_model("llama", max_shard_size="60KB")
    two = tensors_of(quantize(many, output=tmp_path / "two", method="gptq").output)
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_tied_embedding_is_stored_once(
    quantize: Callable[..., Report], tiny_model: Folders, family: str
) -> None:
    report = quantize(tiny_model(family, tied=True))
    stored = tensors_of(report.output)
    assert not any(key.startswith("lm_head") for key in stored)
    assert config_of(report.output)["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(report.output)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_quantized_head_is_untied(
    quantize: Callable[..., Report], tiny_model: Folders, family: str, tied: bool
) -> None:
    folder = tiny_model(family, tied=tied)
    report = quantize(folder, head_bits=8)
    before, after = tensors_of(folder), tensors_of(report.output)
    embedding = next(key for key in before if "embed_tokens" in key)
    assert torch.equal(after[embedding], before[embedding])
    assert {key for key in after if key.startswith("lm_head")} == {
        f"lm_head.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert config_of(report.output)["tie_word_embeddings"] is False
    assert [(layer.name, layer.scheme) for layer in report.layers if layer.name == "lm_head"] == [
        ("lm_head", "w8g32")
    ]
    assert "lm_head" not in report.skipped
    stock, ours = AutoModelForCausalLM.from_pretrained(report.output).eval(), hf.load(report.output)
    original = before.get("lm_head.weight", before[embedding]).float()
    dense = ours.lm_head.weight.float()
    assert 1e-4 < (dense - original).norm() / original.norm() < 0.01
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=0, atol=0.02)
    assert not torch.equal(ours.get_input_embeddings().weight, ours.lm_head.weight)


def test_a_quantized_head_is_verified(
    quantize: Callable[..., Report], tiny_model: Folders, recwarn: pytest.WarningsRecorder
) -> None:
    report = quantize(tiny_model("llama", tied=True), head_bits=8)
    assert report.verification is not None
    assert report.verification.weights == len(report.layers) == 22
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_what_is_written_is_bfloat16(
    quantize: Callable[..., Report], tiny_model: Folders, dtype: torch.dtype, method: str
) -> None:
    folder = tiny_model("llama", dtype=dtype)
    report = quantize(folder, method=method)
    floats = {t.dtype for t in tensors_of(report.output).values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}
    config = config_of(report.output)
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


def test_the_config_names_a_method_that_loaders_know(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    for format_name in ("compressed-tensors", "gptq", "awq"):
        scheme = QuantScheme(4, 32, symmetric=format_name != "awq")
        report = quantize(tiny_model("llama"), scheme, format=format_name, output=tmp_path / format_name)
        config = config_of(report.output)
        assert config["quantization_config"]["quant_method"] == format_name
        assert "lowbit" not in json.dumps(config).lower()
        source = config_of(tiny_model("llama"))
        kept = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")}
        assert kept == {k: v for k, v in source.items() if k != "dtype"}


def test_tensors_that_the_architecture_does_not_use_are_copied(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    extra = {"mtp.head.weight": torch.randn(4, 4), "mtp.table": torch.arange(5)}
    save_file(tensors_of(folder) | extra, folder / "model.safetensors", {"format": "pt"})
    report = quantize(folder)
    after = tensors_of(report.output)
    for key, tensor in extra.items():
        assert torch.equal(after[key], tensor)
        assert after[key].dtype == tensor.dtype
        assert f"{key} is not used by the architecture: copied as it is" in report.notes


def test_names_without_the_prefix_of_the_model(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    """As in GPT-2's own repository, which also holds the causal masks."""
    folder = shutil.copytree(tiny_model("gpt2"), tmp_path / "model")
    plain = {key.removeprefix("transformer."): t for key, t in tensors_of(folder).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(3)}
    save_file(plain | masks, folder / "model.safetensors", {"format": "pt"})
    report = quantize(folder, format="gptq")
    with torch.no_grad():
        found = hf.load(report.output)(torch.arange(3, 40)[None]).logits
        reference = quantize(tiny_model("gpt2"), format="gptq", output=tmp_path / "reference").output
        assert torch.equal(found, hf.load(reference)(torch.arange(3, 40)[None]).logits)


# --- what is left alone


def test_readers_of_one_input_are_skipped_together(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    report = quantize(tiny_model("llama"), skip=["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"])
    dense = {key.removesuffix(".weight") for key in tensors_of(report.output) if key.endswith("proj.weight")}
    assert dense == {f"model.layers.0.self_attn.{n}_proj" for n in "qkv"} | {
        f"model.layers.2.mlp.{n}_proj" for n in ("gate", "up")
    }
    assert dense <= set(report.skipped)
    assert report.skipped["model.layers.0.self_attn.v_proj"] == (
        "shares its input with model.layers.0.self_attn.q_proj, which is skipped"
    )
    assert sum("is skipped too" in note for note in report.notes) == 3
    assert set(config_of(report.output)["quantization_config"]["ignore"]) == dense | {"lm_head"}
    before = tensors_of(tiny_model("llama"))
    after = tensors_of(report.output)
    assert all(torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in dense)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_skipped_layer_keeps_the_function_of_its_block(
    quantize: Callable[..., Report], tiny_model: Folders, method: str
) -> None:
    """AWQ may fold into a skipped layer; with eight bits the whole stays near the original."""
    report = quantize(tiny_model("opt"), QuantScheme(8, 32), skip=["v_proj", "fc1"], method=method)
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        expected = hf.load(tiny_model("opt"))(ids).logits.float().log_softmax(-1)
        found = hf.load(report.output)(ids).logits.float().log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


def test_group_size(quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path) -> None:
    assert quantize(tiny_model("llama"), None, output=tmp_path / "a").scheme == "w4g64"
    auto = quantize(tiny_model("llama"), QuantScheme(3, 128), auto_group=True, output=tmp_path / "b")
    assert auto.scheme == "w3g64"
    whole = quantize(tiny_model("llama"), QuantScheme(4, -1), output=tmp_path / "c")
    assert whole.scheme == "w4row"
    weights = config_of(whole.output)["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    scales = tensors_of(whole.output)["model.layers.0.mlp.down_proj.weight_scale"]
    assert scales.shape == (64, 1)


# --- what it is calibrated on


def test_fewer_rows_than_asked_for_are_reported(
    quantize: Callable[..., Report], tiny_model: Folders, text_file: str
) -> None:
    report = quantize(tiny_model("llama"), method="gptq", samples=500)
    [note] = report.notes
    rows = int(note.split(" gives ")[1].split()[0])
    assert note == f"{text_file} gives {rows} sequences of 48 tokens, not 500"
    assert report.calibration == f"{text_file}: {rows} x 48 tokens, seed 0"
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
    assert [note for note in report.notes if note.startswith(f"{len(fallen)} layers: ")]


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
    create = pipeline._Road.__init__

    def record(self: Any, *args: Any) -> None:
        create(self, *args)
        roads.append(self)

    monkeypatch.setattr(pipeline._Road, "__init__", record)
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
