"""Models and data that are not what they should be: one line that names them and the fix, no trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import lowbit
from lowbit import QuantScheme
from tests.refused import Refused

Folders = Callable[..., Path]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tiny_model: Folders, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model that a test may damage."""

    def make(family: str = "llama", name: str = "model", **options: object) -> Path:
        return shutil.copytree(tiny_model(family, **options), tmp_path / name)

    return make


# --- the model


def hub_error(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind("403 with a\nlong story", response=response)  # type: ignore[call-arg]


def test_a_hub_id_out_of_reach(refused: Refused) -> None:
    line = refused("someone/no-such-model-at-all")
    assert line.startswith("someone/no-such-model-at-all is not a local folder and the hub could not give it")
    assert "check the name and the network, or give a local folder" in line


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GatedRepoError, "org/name is gated: accept its licence on the hub, then `hf auth login`"),
        (RepositoryNotFoundError, "org/name is neither a local folder nor a public hub id: check the name"),
        (ConnectionError, "org/name is not a local folder and the hub could not give it (ConnectionError): "
         "check the name and the network, or give a local folder"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], expected: str
) -> None:
    def download(*_: object, **__: object) -> str:
        raise kind() if kind is ConnectionError else hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert refused("org/name") == expected


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_folder_that_is_not_there(refused: Refused, model: str) -> None:
    assert refused(model) == f"{model} does not exist: give a folder, a .gguf file or a hub id (org/name)"


def test_a_name_that_is_no_hub_id(refused: Refused) -> None:
    assert "neither a local folder nor a valid hub id (org/name)" in refused("what is this?")


def test_a_file_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt is a file: give a folder, a .gguf file or a hub id" in refused(tmp_path / "notes.txt")
    assert "missing.gguf does not exist" in refused(tmp_path / "missing.gguf")


def test_a_folder_without_config(refused: Refused, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    assert refused(folder) == f"{folder} has no config.json: give the folder of a Hugging Face model"


def test_a_folder_without_weights(refused: Refused, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert refused(folder) == f"{folder} has no weights (*.safetensors): download the model completely"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-model"}', '{"hidden_size": 3}'])
def test_a_config_that_is_none(refused: Refused, copy: Callable[..., Path], text: str) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1000])
def test_a_truncated_file(refused: Refused, copy: Callable[..., Path], keep: int) -> None:
    file = copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    line = refused(file.parent)
    assert line.startswith(f"{file} is corrupt or truncated (")
    assert line.endswith("download it again")


def test_a_corrupt_header(refused: Refused, copy: Callable[..., Path]) -> None:
    file = copy() / "model.safetensors"
    file.write_bytes(b"\x10" + file.read_bytes()[1:])
    assert f"{file} is corrupt or truncated" in refused(file.parent)


def test_an_index_that_is_none(refused: Refused, copy: Callable[..., Path]) -> None:
    folder = copy(max_shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is no index of weight files: download it again" in refused(folder)


def test_a_shard_that_was_not_downloaded(refused: Refused, copy: Callable[..., Path]) -> None:
    folder = copy(max_shard_size="60KB")
    (folder / "model-00002-of-00006.safetensors").unlink()
    assert "model-00002-of-00006.safetensors" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "key",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_no_numbers(
    refused: Refused, copy: Callable[..., Path], key: str, value: float
) -> None:
    folder = copy(tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert refused(folder) == f"{folder}: {key} holds NaN or infinite weights: get a sound copy"


def test_a_config_that_does_not_fit_the_weights(refused: Refused, copy: Callable[..., Path]) -> None:
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    assert "does not fit its configuration" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "lacks 9 tensors (first: model.layers.3.self_attn.q_proj.weight)" in refused(folder)


def test_models_that_write_no_text(refused: Refused, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=99, **small)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_ff=64, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    for name, architecture in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        line = refused(tmp_path / name)
        assert line == (
            f"{tmp_path / name} is ['{architecture}'], not a causal language model that transformers knows: "
            "give a text-generation model"
        )


def test_models_that_read_more_than_text(refused: Refused, tmp_path: Path) -> None:
    """Gemma 3 with a vision tower counts as a causal language model in transformers' own table."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = small | {"image_size": 28, "patch_size": 14}
    text = small | {"vocab_size": 99, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "seeing")
    assert "['Gemma3ForConditionalGeneration'], which reads more than text: give" in refused(
        tmp_path / "seeing"
    )


def test_a_model_that_is_quantized_already(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    for name in ("compressed-tensors", "gptq"):
        lowbit.quantize(
            tiny_model("llama"), QuantScheme(4, 32), output=tmp_path / name, method="rtn", format=name
        )
        expected = f"{tmp_path / name} is already quantized ({name}): start from the original model"
        assert refused(tmp_path / name) == expected


def test_a_model_without_tokenizer(refused: Refused, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert str(folder) in refused(folder, method="gptq")


# --- the calibration data


def test_data_that_are_not_there(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert "dataset 'no-one/nothing'" in refused(model, "--dataset", "no-one/nothing", method="gptq")
    missing = tmp_path / "missing.txt"
    assert refused(model, "--dataset", missing, method="gptq").startswith(f"{missing}: no such file")
    (tmp_path / "data.csv").write_text("a,b")
    assert "unknown extension '.csv'" in refused(model, "--dataset", tmp_path / "data.csv", method="gptq")


@pytest.mark.parametrize("text", ["", "  \n \n"])
def test_no_text(refused: Refused, tiny_model: Folders, tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.txt").write_text(text)
    line = refused(tiny_model("llama"), "--dataset", tmp_path / "empty.txt", method="gptq")
    assert line.startswith(f"{tmp_path / 'empty.txt'}: holds no text")


def test_too_little_text(refused: Refused, tiny_model: Folders, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The river rises in the hills.")
    line = refused(tiny_model("llama"), "--dataset", tmp_path / "short.txt", "--seq-len", 300, method="gptq")
    assert "fewer than one row of seq_len=300: give more text or a smaller --seq-len" in line


def test_rows_longer_than_the_model_reads(refused: Refused, tiny_model: Folders) -> None:
    line = refused(tiny_model("llama"), "--dataset", "self", "--seq-len", 513, method="gptq")
    assert line == "--seq-len 513 is more than the model's 512 positions: use at most that"
