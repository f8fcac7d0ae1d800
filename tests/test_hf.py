"""Loading: folders of lowbit's, of others, and of nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import QuantScheme, hf
from lowbit.errors import LowbitError
from lowbit.quantized import QuantizedWeight
from tests.hub_stub import MODEL, Hub

Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("compressed-tensors", "gptq", "awq"):
        output = tmp_path_factory.mktemp("hf") / name
        scheme = QuantScheme(4, 32, symmetric=name != "awq")
        lowbit.quantize(tiny_model("llama"), scheme, output=output, method="rtn", format=name)
        made[name] = output
    return made


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_a_quantized_folder_loads_dense(checkpoints: dict[str, Path], name: str) -> None:
    model = lowbit.load(checkpoints[name], packed=False)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 2
    prompt = torch.tensor([[1, 50, 60]])
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, "float32"])
def test_dtype_of_choice(checkpoints: dict[str, Path], name: str, dtype: torch.dtype | str) -> None:
    model = hf.load(checkpoints[name], packed=False, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = hf.load(checkpoints[name], packed=False)
    for one, two in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, two.float())  # the values are those that a bfloat16 loader sees


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_plain_folder_loads_as_it_is(tiny_model: Folders, family: str) -> None:
    model = hf.load(tiny_model(family), packed=False)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model(family)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_packed_tensors_are_one_weight_each(checkpoints: dict[str, Path]) -> None:
    for name, folder in checkpoints.items():
        quantization, fmt = hf.quantization_of(folder)
        assert fmt is not None
        found = dict(hf.layers(folder, fmt))
        packed = {name for name, value in found.items() if isinstance(value, dict)}
        assert len(packed) == 21, name
        assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(found) - packed
        for layer in packed:
            tensors = found[layer]
            assert isinstance(tensors, dict)
            scheme = fmt.read_config(quantization, layer)
            assert scheme.bits == 4
            assert isinstance(fmt.unpack(tensors, scheme, quantization), QuantizedWeight)


def test_quantization_of_a_plain_folder(tiny_model: Folders) -> None:
    assert hf.quantization_of(tiny_model("llama")) == ({}, None)


def test_another_layout_of_compressed_tensors_is_left_to_transformers(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["compressed-tensors"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "int-quantized"
    (folder / "config.json").write_text(json.dumps(config))
    assert hf.quantization_of(folder)[1] is None


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "plain"])
@pytest.mark.parametrize("lost", ["model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_never_made_up(
    checkpoints: dict[str, Path], tiny_model: Folders, tmp_path: Path, name: str, lost: str
) -> None:
    original = tiny_model("llama") if name == "plain" else checkpoints[name]
    folder = shutil.copytree(original, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match=f"lacks 1 tensors .first: {lost}"):
        hf.load(folder, packed=False)


@pytest.mark.parametrize(
    ("suffix", "message"), [(".qweight", "tensors .'qweight'. are missing"), ("", "lacks 1 tensors")]
)
def test_a_layer_without_all_of_its_tensors(
    checkpoints: dict[str, Path], tmp_path: Path, suffix: str, message: str
) -> None:
    folder = shutil.copytree(checkpoints["gptq"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.1.mlp.up_proj{suffix}"
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match=message):
        hf.load(folder, packed=False)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def narrow(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = tensors["model.layers.0.mlp.up_proj.scales"][:1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damage", [truncate, narrow])
def test_a_damaged_folder_gives_one_line(
    checkpoints: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(checkpoints["gptq"], tmp_path / "model")
    damage(folder)
    with pytest.raises(LowbitError) as caught:
        hf.load(folder, packed=False)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("load", [hf.load, hf.load_stock, hf.load_tokenizer, hf.quantization_of])
@pytest.mark.parametrize("name", ["empty", "missing/folder/here", "no-one/nothing"])
def test_where_there_is_no_model(tmp_path: Path, load: Callable[[Path | str], object], name: str) -> None:
    (tmp_path / "empty").mkdir()
    target = name if name == "no-one/nothing" else tmp_path / name
    with pytest.raises(LowbitError) as caught:
        load(target)
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for load in (hf.load, hf.quantization_of):
        with pytest.raises(LowbitError, match=r"model\.gguf is a file: give a folder or a hub id"):
            load(tmp_path / "model.gguf")


def test_a_folder_at_home(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints["gptq"], tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for packed in (True, False):
        assert hf.load("~/model", packed=packed).config.model_type == "llama"
    assert len(hf.load_tokenizer("~/model")) == len(hf.load_tokenizer(checkpoints["gptq"]))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_a_hub_id_loads_as_its_folder_does(
    hub: Hub, checkpoints: dict[str, Path], name: str, packed: bool
) -> None:
    hub.folder = checkpoints[name]
    model, expected = (hf.load(place, packed=packed) for place in (MODEL, checkpoints[name]))
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is type(expected.model.layers[0].mlp.up_proj)
    assert packed or type(linear) is torch.nn.Linear
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id == 2
    assert (model.config.name_or_path, expected.config.name_or_path) == (MODEL, str(checkpoints[name]))


def test_numbers_of_a_hub_id_are_looked_at_too(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    hub.folder = shutil.copytree(checkpoints["gptq"], tmp_path / "model")
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**25}))
    with pytest.raises(LowbitError, match="num_hidden_layers=33554432 does not fit the files"):
        hf.load(MODEL, packed=False)


class TestDevices:
    """The meta device stands for a GPU: a model that lies there was put there."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> torch.device:
        device = torch.device("meta")
        monkeypatch.setattr(hf, "find_device", lambda name: device if name == "auto" else torch.device(name))
        return device

    def test_the_public_load_takes_a_gpu_where_there_is_one(
        self, tiny_model: Folders, gpu: torch.device
    ) -> None:
        assert lowbit.load(tiny_model("llama")).device == gpu
        assert lowbit.load(tiny_model("llama"), device="cpu").device.type == "cpu"
        assert hf.load(tiny_model("llama"), device="auto").device == gpu
        assert hf.load(tiny_model("llama")).device.type == "cpu"

    @pytest.mark.parametrize("packed", [True, False])
    def test_auto_works_for_every_kind(self, checkpoints: dict[str, Path], packed: bool) -> None:
        model = hf.load(checkpoints["gptq"], packed=packed, device="auto")
        assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_a_device_that_is_none_is_refused(self, tiny_model: Folders) -> None:
        with pytest.raises(LowbitError, match="--device nonsense can't be used here"):
            lowbit.load(tiny_model("llama"), device="nonsense")
