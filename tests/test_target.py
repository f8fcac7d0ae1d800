"""A target is met, to the byte, by the checkpoint that is written; and what can't be met is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import QuantScheme, Target, cli, hf
from lowbit.dataset import evaluation_windows
from lowbit.errors import LowbitError
from lowbit.evaluate import compare
from lowbit.formats import compressed_tensors
from lowbit.hub_source import HubSource
from lowbit.inspection import inspect
from lowbit.plan import make_plan
from lowbit.planning import preview
from lowbit.results import Report
from lowbit.source import Source
from lowbit.target import _estimated_bytes
from tests.hub_stub import MODEL, Hub
from tests.page import Page
from tests.refused import Refused
from tests.tiny import TEXT

Folders = Callable[..., Path]


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"skip": ["k_proj", "layers.1.mlp.*"]}),
    ("qwen2", {"head_bits": 8, "tied": True}),
    ("qwen2", {"head_bits": 8, "tied": False}),
    ("gemma3", {}),
    ("phi3", {}),
    ("mixtral", {}),  # whose files hold in two what the model holds in one
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_the_checkpoint_is_no_larger_than_its_target(
    quantize: Callable[..., Report],
    tiny_model: Folders,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
) -> None:
    model = tiny_model(family, tied=options.pop("tied", None))
    report = quantize(model, None, within=Target(4.6), **options)
    found = inspect(report.output).bits_per_weight(True)
    assert report.plan is not None
    assert 4.6 - 0.1 < found <= 4.6
    assert report.plan["bits_per_weight"] == pytest.approx(found)
    assert report.plan["size"] >= file_bytes(report.output) > 0.95 * report.plan["size"]
    assert report.verification is not None

    size = report.plan["size"] - 1000
    smaller = quantize(model, None, within=Target(size=size), output=tmp_path / "smaller", **options)
    assert file_bytes(smaller.output) <= size
    assert smaller.plan is not None
    assert report.plan["estimated_kl"] <= smaller.plan["estimated_kl"]


def test_at_the_same_bits_less_is_lost(
    quantize: Callable[..., Report], tiny_model: Folders, tmp_path: Path
) -> None:
    """Against one scheme for all, by the divergence of the whole model on other text."""
    folder = tiny_model("llama")
    uniform = quantize(folder, QuantScheme(4, 32), output=tmp_path / "uniform")
    bits = inspect(uniform.output).bits_per_weight(True)
    mixed = quantize(folder, None, within=Target(bits), output=tmp_path / "mixed")
    assert inspect(mixed.output).bits_per_weight(True) <= bits
    windows = evaluation_windows([TEXT[200:] * 3], hf.load_tokenizer(folder), 64)
    original = hf.load(folder, packed=False)
    one, other = (
        compare(hf.load(report.output, packed=False), original, windows).kl for report in (mixed, uniform)
    )
    assert one is not None
    assert other is not None
    assert one < 0.9 * other


def test_what_was_chosen_is_what_was_announced_and_written(
    quantize: Callable[..., Report], tiny_model: Folders, text_file: str
) -> None:
    told = preview(tiny_model("llama"), Target(4.4), method="rtn", dataset=text_file)
    report = quantize(tiny_model("llama"), None, within=Target(4.4), method="rtn")
    assert {layer.name: layer.scheme for layer in report.layers} == {
        name: str(scheme) for name, scheme in told.by_module().items()
    }
    assert {scheme.bits for scheme in told.by_module().values()} <= {4, 8}
    assert report.plan == told.to_dict()
    page = Page.of(report.output)
    assert "Budget: 4.4 bits per weight; used: 4.3" in page.text
    (table,) = [table for table in page.tables if table[0][0] == "group"]
    parts = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")
    assert [row[0] for row in table[1:5]] == [f"model.layers.0.{part}" for part in parts]
    stock = lowbit.load(report.output, packed=False)
    ids = torch.arange(3, 40)[None]
    assert torch.isfinite(stock(input_ids=ids).logits).all()


def test_fewer_bits_only_where_they_are_needed_or_named(tiny_model: Folders, text_file: str) -> None:
    def bits(target: Target) -> set[int]:
        chosen = preview(tiny_model("llama"), target, method="rtn", dataset=text_file)
        found = {scheme.bits for scheme in chosen.by_module().values()}
        assert any("vLLM on GPU" in line for line in chosen.warnings) == (min(found) < 4)
        assert any("vLLM on CPU" in line for line in chosen.warnings) == (found != {4})
        return found

    assert min(bits(Target(4.3))) == 4
    assert min(bits(Target(3.9))) == 3
    assert min(bits(Target(2.8))) == 2
    assert min(bits(Target(4.3, bits=2))) < 4
    assert bits(Target(8.4, bits=8)) == {8}
    sizes = preview(tiny_model("llama"), Target(5.0, group_size=32), method="rtn", dataset=text_file)
    assert {scheme.group_size for scheme in sizes.by_module().values()} == {32}


UNUSED = {
    "mtp.wide.weight": torch.randn(300, 40),
    "mtp.double": torch.randn(9000, dtype=torch.float64),
    "mtp.half.weight": torch.randn(64, 64).half(),
    "mtp.eight": torch.randn(70, 7).to(torch.float8_e4m3fn),
    "mtp.exponents": torch.ones(70, 7).to(torch.float8_e8m0fnu),
    "mtp.short": torch.arange(333).to(torch.uint16),
    "mtp.int": torch.arange(33).to(torch.uint32),
    "mtp.long": torch.arange(31).to(torch.uint64),
    "mtp.wave": torch.zeros(50, dtype=torch.complex64),
}


@pytest.fixture
def with_unused(tiny_model: Folders, tmp_path: Path) -> Path:
    """A model beside tensors that its architecture does not use, in all kinds of dtypes."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | UNUSED
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_is_copied_counts_as_it_is(
    quantize: Callable[..., Report], with_unused: Path, text_file: str
) -> None:
    size = preview(with_unused, Target(4.4), method="rtn", dataset=text_file).size
    report = quantize(with_unused, None, within=Target(size=size))
    assert size >= file_bytes(report.output) > 0.95 * size
    copied = load_file(report.output / "model.safetensors")
    for name, tensor in UNUSED.items():
        assert copied[name].dtype == tensor.dtype
        assert torch.equal(copied[name].view(torch.uint8), tensor.view(torch.uint8))


def test_room_on_the_disk_for_what_is_copied(
    quantize: Callable[..., Report],
    with_unused: Path,
    tiny_model: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("lowbit.target.check_room", lambda _, count: needed.append(count))
    for model in (tiny_model("llama"), with_unused):
        quantize(model, verify_output=False, overwrite=True)
    more = 1.1 * sum(tensor.nbytes for tensor in UNUSED.values())
    assert needed[1] - needed[0] == pytest.approx(more, abs=1)


def test_room_for_what_is_copied_of_a_hub_source(hub: Hub, hub_models: Folders, tmp_path: Path) -> None:
    """Whose files are not here yet."""
    hub.folder = hub_models("extra")
    sources = HubSource(MODEL, tmp_path / "source", torch.float32), Source(hub.folder, torch.float32)
    remote, local = ([s, make_plan(s.model, QuantScheme(4, 32), compressed_tensors)] for s in sources)
    assert local[0].extra_keys
    extra = sum(local[0].read(key).nbytes for key in local[0].extra_keys)
    whole = _estimated_bytes(*local)
    assert _estimated_bytes(*remote) == whole
    local[0].extra_keys = []
    assert whole - _estimated_bytes(*local) == pytest.approx(1.1 * extra, abs=1)


def test_a_dtype_that_is_not_known_is_refused(refused: Refused, with_unused: Path) -> None:
    tensors = load_file(with_unused / "model.safetensors")
    tensors["mtp.pairs"] = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(tensors, with_unused / "model.safetensors", {"format": "pt"})
    for options in ([], ["--target-bpw", "5"]):
        line = refused(with_unused, *options)
        assert "model.safetensors: mtp.pairs is stored as F4: convert it to one of U64, I64" in line


def test_files_that_belong_to_no_model_do_not_count(with_unused: Path, text_file: str) -> None:
    """Another file beside `model.safetensors` is not read: an adapter, or a copy in float32."""
    told = preview(with_unused, Target(4.4), method="rtn", dataset=text_file)
    tensors = load_file(with_unused / "model.safetensors")
    wide = {key: tensor.double() for key, tensor in tensors.items() if not tensor.is_complex()}
    save_file(wide, with_unused / "a-copy.safetensors", {"format": "pt"})
    assert preview(with_unused, Target(4.4), method="rtn", dataset=text_file).size == told.size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target-bpw", "1.5"], "--target-bpw 1.5 is below the smallest possible: use at least 2.2"),
        (["--target-bpw", "4", "--bits", 4],
         "--target-bpw 4 is below the smallest possible: use at least 4.247, or --bits 3"),
        (["--target-bpw", "16"], "--target-bpw 16 is no less than the original: give less"),
        (["--target-bpw", "-1"], "a target is either --target-bpw or --target-size, more than 0"),
        (["--target-bpw", "inf"], "--target-bpw inf is no target: give a number such as 4.25"),
        (["--target-bpw", "nan"], "a target is either --target-bpw or --target-size, more than 0"),
        (["--target-bpw", "1e308"], "--target-bpw 1e+308 is no less than the original: give less"),
        (["--target-bpw", "5", "--bits", 0], "bits=0 is not supported: use one of (2, 3, 4, 8)"),
        (["--target-bpw", "5", "--group-size", 0], "group_size=0 is not supported: use 32, 64, 128, or -1"),
        (["--target-size", "9" * 400], "is more than any disk holds: write it like 5GB or 300MB"),
        (["--target-bpw", "4.25", "--target-size", "1MB"], "give one of them"),
        (["--target-size", "1KB"], "--target-size 0.00 MB is below the smallest possible: use at least 0.1"),
        (["--target-size", "9GB"], "--target-size 9.00 GB is no less than the original: give less"),
        (["--target-size", "small"], "'small' is not a size: write it like 5GB or 300MB"),
        (["--target-bpw", "5", "--bits", 5], "bits=5 is not supported"),
        (["--target-bpw", "5", "--group-size", 48], "--group-size 48 does not divide"),
        (["--target-bpw", "5", "--group-size", "x"], "--group-size 'x' is not a number"),
        (["--target-bpw", "5", "--asymmetric"], "mixes symmetric weight-only schemes"),
        (["--target-bpw", "5", "--activation-bits", 8], "mixes symmetric weight-only schemes"),
        (["--target-bpw", "5", "--format", "gptq"],
         "transformers loads one scheme per gptq checkpoint, and --target-bpw 5 mixes them: "
         "use --format compressed-tensors"),
        (["--target-bpw", "5", "--format", "awq"], "one scheme per awq checkpoint"),
    ],
)  # fmt: skip
def test_refusals(refused: Refused, tiny_model: Folders, options: list[object], expected: str) -> None:
    assert expected in refused(tiny_model("llama"), *options)


def test_the_smallest_that_a_refusal_names_can_be_had(
    quantize: Callable[..., Report], tiny_model: Folders
) -> None:
    def least(target: Target) -> float:
        with pytest.raises(LowbitError, match="use at least") as caught:
            quantize(tiny_model("mixtral"), None, within=target, overwrite=True)
        return float(str(caught.value).rpartition("at least ")[2].removesuffix("MB"))

    smallest = least(Target(1.0))
    report = quantize(tiny_model("mixtral"), None, within=Target(smallest))
    assert smallest - 0.002 < inspect(report.output).bits_per_weight(True) <= smallest
    size = int(1e6 * least(Target(size=1000)))
    assert (
        file_bytes(quantize(tiny_model("mixtral"), None, within=Target(size=size), overwrite=True).output)
        <= size
    )


def test_a_target_and_a_scheme_contradict(quantize: Callable[..., Report], tiny_model: Folders) -> None:
    with pytest.raises(LowbitError, match="leave out scheme= and schemes=, or within="):
        quantize(tiny_model("llama"), QuantScheme(4, 32), within=Target(4.5))


def test_plan_prints_the_choice_and_writes_nothing(
    tiny_model: Folders,
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        words = ["lowbit", "plan", str(tiny_model("llama")), "--dataset", text_file, *options]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capfd.readouterr()

    code, out, _ = run("--target-bpw", "4.4", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bits_per_weight"] <= 4.4
    assert len(found["rows"]) == 12
    assert all(row["scheme"] in row["kl"] for row in found["rows"])
    code, out, _ = run("--target-size", f"{found['size']}B")
    assert code == 0
    assert "self_attn.o_proj" in out
    assert "one scheme" in out
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "needs a target: give --target-bpw 4.25 or --target-size 3.9GB" in err
    assert list(tmp_path.iterdir()) == []
