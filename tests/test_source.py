"""The source: what is loaded is what stock transformers loads, and names find their way back."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import source as sources
from lowbit import topology
from lowbit.errors import LowbitError
from lowbit.source import Source, free, sidecars
from tests.hub_stub import MODEL, Hub
from tests.tiny import FAMILIES

CPU = torch.device("cpu")
Folders = Callable[..., Path]


def blocks_of(source: Source) -> tuple[str, torch.nn.ModuleList]:
    return topology.decoder_blocks(source.model)


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_equals_what_transformers_loads(tiny_model: Folders, family: str) -> None:
    folder = tiny_model(family)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    source = Source(folder, torch.float32)
    path, blocks = blocks_of(source)
    assert all(parameter.is_meta for parameter in source.model.parameters())

    seen: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        source.load(source.keys_under([f"{path}.{number}"]), CPU)
        mine = {f"{path}.{number}.{name}": p for name, p in block.named_parameters()}
        assert not any(parameter.is_meta for parameter in mine.values())
        # Nothing else comes in with it.
        assert {n for n, p in source.model.named_parameters() if not p.is_meta} == set(mine)
        seen |= {name: parameter.detach().clone() for name, parameter in mine.items()}
        free(block)
        assert all(parameter.is_meta for parameter in source.model.parameters())
    source.load(source.keys_outside([path]), CPU)
    seen |= {name: p.detach() for name, p in source.model.named_parameters() if not p.is_meta}

    assert set(seen) == {name for name, _ in source.model.named_parameters()}
    for name, tensor in seen.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_find_their_way_back_to_the_file(tiny_model: Folders, family: str) -> None:
    folder = tiny_model(family)
    on_disk = read_all(folder)
    source = Source(folder, torch.bfloat16)
    path, blocks = blocks_of(source)
    back: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):  # the order in which the road asks
        keys = source.keys_under([f"{path}.{number}"])
        source.load(keys, CPU)
        named = {f"{path}.{number}.{name}": p.data.clone() for name, p in block.named_parameters()}
        part = source.names_on_disk(named)
        assert set(part) == set(keys)
        back |= part
        free(block)
    rest = source.keys_outside([path])
    source.load(rest, CPU)
    named = {name: p.data for name, p in source.model.named_parameters() if not p.is_meta}
    back |= source.names_on_disk(named)

    assert set(back) == set(on_disk)
    for key, tensor in on_disk.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_codes_of_stacked_experts_are_cut_as_their_weights_are(tiny_model: Folders, family: str) -> None:
    """Anything with the rows of a weight, and fewer columns, passes through as the weight does."""
    source = Source(tiny_model(family), torch.bfloat16)
    path, blocks = blocks_of(source)
    source.load(source.keys_under([f"{path}.0"]), CPU)
    experts = {n: p for n, p in blocks[0].named_parameters(prefix=f"{path}.0") if p.ndim == 3}
    assert len(experts) == 2
    whole = source.names_on_disk({name: p.data for name, p in experts.items()})
    narrow = source.names_on_disk({name: p.data[..., :3].contiguous() for name, p in experts.items()})
    assert set(narrow) == set(whole) <= set(source.keys_under([f"{path}.0"]))
    for key, tensor in narrow.items():
        assert torch.equal(tensor, whole[key][:, :3]), key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor(tiny_model: Folders, family: str, tied: bool) -> None:
    source = Source(tiny_model(family, tied=tied), torch.float32)
    path, _ = blocks_of(source)
    source.load(source.keys_outside([path]), CPU)
    embedding, head = source.model.get_input_embeddings(), source.model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert torch.equal(embedding.weight, head.weight) == tied
    assert len(source.keys_under(["lm_head"])) == (0 if tied else 1)


def test_shards_are_read_as_one(tiny_model: Folders) -> None:
    folder = tiny_model("llama", max_shard_size="60KB")
    whole = tiny_model("llama")
    assert len(list(folder.glob("*.safetensors"))) > 2
    source = Source(folder, torch.bfloat16)
    path, _ = blocks_of(source)
    source.load(source.keys_under([path]) + source.keys_outside([path]), CPU)
    expected = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16).state_dict()
    for name, parameter in source.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert source.bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_second_copy_of_the_weights_is_left_alone(tiny_model: Folders, tmp_path: Path) -> None:
    """Mistral's repositories hold `consolidated.safetensors` beside the indexed shards."""
    folder = shutil.copytree(tiny_model("mistral", max_shard_size="100KB"), tmp_path / "model")
    save_file({"layers.0.attention.wq.weight": torch.ones(64, 64)}, folder / "consolidated.safetensors")
    source = Source(folder, torch.bfloat16)
    assert source.extra_keys == []

    folder = shutil.copytree(tiny_model("mistral"), tmp_path / "single")
    save_file({"layers.0.attention.wq.weight": torch.ones(64, 64)}, folder / "consolidated.safetensors")
    assert Source(folder, torch.bfloat16).extra_keys == []


def test_a_shard_that_is_not_there_is_named(tiny_model: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama", max_shard_size="60KB"), tmp_path / "model")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(LowbitError, match=gone.name):
        Source(folder, torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_missing_tensor_is_refused(tiny_model: Folders, tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(tiny_model(family), tmp_path / "model")
    tensors = read_all(folder)
    gone = next(
        key for key in sorted(tensors) if "layers.1" in key and ("experts.2" in key or "up_proj" in key)
    )
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def read() -> None:
        source = Source(folder, torch.bfloat16)
        source.load(source.keys_under(["model.layers.1"]), CPU)

    with pytest.raises(LowbitError) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_tensor_of_the_wrong_shape_is_refused(tiny_model: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = read_all(folder)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(130, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = Source(folder, torch.bfloat16)
    with pytest.raises(LowbitError, match=r"model\.layers\.1\.mlp\.up_proj\.weight does not fit"):
        source.load(source.keys_under(["model.layers.1"]), CPU)


def test_keys_of_no_parameter_are_extra(tiny_model: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = read_all(folder) | {"mtp.head.weight": torch.ones(4, 4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = Source(folder, torch.bfloat16)
    assert source.extra_keys == ["mtp.head.weight"]
    assert torch.equal(source.read("mtp.head.weight"), torch.ones(4, 4))
    assert "mtp.head.weight" not in source.keys_outside(["model.layers"])


def test_free_lets_the_memory_go(tiny_model: Folders) -> None:
    source = Source(tiny_model("mixtral"), torch.bfloat16)
    path, blocks = blocks_of(source)
    source.load(source.keys_under([f"{path}.0"]), CPU)
    parameters = [weakref.ref(p) for p in blocks[0].parameters()]
    assert parameters
    assert all(reference() is not None for reference in parameters)
    free(blocks[0])
    assert all(reference() is None for reference in parameters)
    # And it can come back.
    source.load(source.keys_under([f"{path}.0"]), CPU)
    assert not any(p.is_meta for p in blocks[0].parameters())


def test_buffers_outlive_free(tiny_model: Folders) -> None:
    source = Source(tiny_model("llama"), torch.float32)
    source.release()
    assert all(p.is_meta for p in source.model.parameters())
    buffers = dict(source.model.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())


def test_a_gguf_file(tiny_model: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    original = tiny_model("llama", tied=False)
    write_gguf(gguf, original, tmp_path / "model.gguf")
    capfd.readouterr()
    found = sources.find(str(tmp_path / "model.gguf"), tmp_path / "scratch")
    assert capfd.readouterr().err == "", "other libraries' bars are not shown"
    expected = read_all(original)
    converted = read_all(found)
    assert set(converted) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(converted[key], tensor), key
    config = json.loads((found / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6
    assert "quantization_config" not in config
    from transformers import AutoTokenizer

    text = "The river rises in the hills."
    before, after = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(found)
    assert after(text, add_special_tokens=False).input_ids == before(text, add_special_tokens=False).input_ids
    assert after.model_max_length == 512


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[gguf\]'"):
        sources.find(str(tmp_path / "model.gguf"), tmp_path / "scratch")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"not a model at all")
    with pytest.raises(LowbitError, match=r"model\.gguf is no sound GGUF file") as caught:
        sources.find(str(tmp_path / "model.gguf"), tmp_path / "scratch")
    assert "\n" not in str(caught.value)


def test_a_hub_id_in_the_cache(tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model("qwen2"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = sources.find("someone/tiny", tmp_path / "scratch")
    assert found == repository / "snapshots" / commit
    Source(found, torch.bfloat16)


def test_sidecars_are_everything_but_weights_and_config(tmp_path: Path) -> None:
    carried = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_own.py",
               "LICENSE", "tokenizer.model", "merges.txt"]  # fmt: skip
    templates = ["additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"]
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json",
            "pytorch_model.bin.index.json", "README.md", ".gitattributes", "model.gguf", ".env", ".msc",
            ".DS_Store", ".notes.json", "additional_chat_templates/.DS_Store", "folder/a.jinja",
            "additional_chat_templates/.hidden.jinja", "additional_chat_templates/notes.txt"]  # fmt: skip
    for name in carried + templates + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [file.relative_to(tmp_path).as_posix() for file in sidecars(tmp_path)]
    assert found == sorted(carried) + templates


def test_a_chat_template_outside_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model" / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(LowbitError, match="is a link out of its folder"):
        sidecars(tmp_path / "model")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("pytorch_model.bin", "has pickled weights (*.bin), which can run code: if you trust their author"),
     ("model.onnx", "has no weights (*.safetensors): download the model completely")],
)  # fmt: skip
def test_a_hub_model_without_safetensors(hub: Hub, tmp_path: Path, weights: str, expected: str) -> None:
    """The weights are not downloaded, and yet it is told which they are."""
    hub.folder = tmp_path / "repository"
    hub.folder.mkdir()
    for name in ("config.json", weights):
        (hub.folder / name).write_text("{}")
    with pytest.raises(LowbitError) as caught:
        sources.find(MODEL, tmp_path / "scratch")
    assert str(caught.value).startswith(f"{MODEL} {expected}")
    assert weights not in hub.whole


def write_gguf(gguf: object, folder: Path, file: Path) -> None:
    """The tiny Llama of `folder` as a bfloat16 GGUF, with its byte-level tokenizer."""
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")  # type: ignore[attr-defined]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number < 4 else 1 for _, number in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    others = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
              "lm_head.weight": "output.weight"}  # fmt: skip
    for key, tensor in read_all(folder).items():
        if key in others:
            name = others[key]
        else:
            _, _, block, rest = key.split(".", 3)
            name = f"blk.{block}.{names[rest.removesuffix('.weight')]}.weight"
        value = tensor.float()
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        for part, count in heads.items():
            if f".{part}." in name:  # llama.cpp keeps the two halves of a rotary pair side by side
                value = value.reshape(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(name, np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
