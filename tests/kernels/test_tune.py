"""Tiles timed on a GPU: what is kept, when it is used, and when it is not."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from lowbit import QuantScheme, cli, tiles
from lowbit.conversion import convert
from lowbit.errors import LowbitError
from lowbit.results import Report
from lowbit_kernels import matmul, tune, tuned
from lowbit_kernels.matmul import grid_constants, tile_for
from lowbit_kernels.tiles import Tiles, choose
from lowbit_kernels.tune import CANDIDATES, Outcome, Weight, candidates

GPU = torch.device("cuda", 0)
OTHER = Tiles(16, 64, 0, 2, 3, 9)
SHAPE = (torch.bfloat16, 16, 512, 256)  # dtype, rows, columns, features
NAME = "decode w4 bfloat16 m16 g128 256x512"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file of a GPU that is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(matmul, "target", lambda device: matmul.Target("sm_90", 132, True))
    tuned.for_device.cache_clear()
    yield tuned.path_of("NVIDIA H100 80GB HBM3")
    tuned.for_device.cache_clear()


def chosen(group_size: int = 128, rows: int = 16) -> Tiles:
    dtype, _, columns, features = SHAPE
    constants = grid_constants(4, group_size, columns, dtype)
    return tile_for("decode", GPU, dtype, rows, columns, features, constants)


def test_what_was_timed_is_used_for_that_shape_alone(kept: Path) -> None:
    shipped = choose("decode", "sm_90", 4, torch.bfloat16, 16)
    assert chosen() == shipped
    tuned.write(kept, {NAME: OTHER})
    assert kept.name == "tiles-nvidia-h100-80gb-hbm3.json"
    assert chosen() == OTHER
    assert chosen(rows=9) == OTHER
    assert chosen(rows=8) == choose("decode", "sm_90", 4, torch.bfloat16, 8)
    assert chosen(group_size=64) == shipped
    assert chosen(group_size=-1) == shipped
    tuned.write(kept, {NAME.replace("g128", "g-1"): OTHER, NAME.replace("g128", "g32"): OTHER})
    assert {chosen(group_size=size) for size in (-1, 32, 128, 512)} == {OTHER}  # 512: one group a row


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged"),
        (json.dumps({"tiles": {NAME: list(OTHER)}}), "is damaged"),
        (json.dumps({"versions": {"triton": "1"}, "tiles": {NAME: list(OTHER)}}), "other versions"),
        (json.dumps({"versions": tuned.versions(), "tiles": {NAME: [1, 2]}}), "is damaged"),
    ],
)
def test_a_file_that_does_not_hold_is_named_and_not_used(kept: Path, content: str, reason: str) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text(content)
    with pytest.warns(UserWarning, match=f"{reason}.*lowbit tune"):
        assert chosen() == choose("decode", "sm_90", 4, torch.bfloat16, 16)
    with warnings.catch_warnings(action="error"):
        tuned.write(kept, {NAME: OTHER})  # and it can be made again
        assert chosen() == OTHER
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_nothing_is_read_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked the driver"))
    assert tuned.for_device(torch.device("cpu")) == {}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("kernel", "height"), [("decode", 8), ("decode", 32), ("prefill", 1024)])
def test_candidates_differ_from_the_shipped_tile_in_one_thing(arch: str, kernel: str, height: int) -> None:
    shipped = choose(kernel, arch, 4, torch.float16, height)
    first, *others = candidates(shipped)
    assert first == shipped
    assert len(others) == CANDIDATES - 1
    for tile in others:
        changed = {name for name in Tiles._fields if getattr(tile, name) != getattr(shipped, name)}
        assert changed in ({"stages"}, {"programs"}, {"features", "warps"})
        assert tile.rows == shipped.rows


def test_the_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["lowbit", "tune", "my-model-w4"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    line = "lowbit: --device auto: lowbit tune times kernels on a GPU, and there is none here\n"
    assert capfd.readouterr() == ("", line)


def test_a_file_is_read_before_its_folder_goes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    convert(checkpoint(), tmp_path / "model.gguf")
    with pytest.raises(LowbitError, match=r"model\.gguf is not quantized: give a checkpoint of lowbit quant"):
        tiles.shapes_of(str(tmp_path / "model.gguf"), GPU)


def test_code_of_a_checkpoint_is_not_asked_for(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = AutoConfig.from_pretrained, list[object]()

    def spy(name: object, **options: object) -> object:
        asked.append(options.get("trust_remote_code"))
        return read(name, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", spy)
    monkeypatch.setattr(matmul, "target", lambda device: matmul.Target("sm_90", 132, True))
    tiles.shapes_of(str(checkpoint()), GPU)
    assert set(asked) == {False}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_shapes_of_a_checkpoint(
    quantize: Callable[..., Report],
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    format: str,
) -> None:
    """Each once, by the kernels' own rules; what they do not run is told with the reason."""
    monkeypatch.setattr(matmul, "target", lambda device: matmul.Target("sm_90", 132, True))
    made = quantize(tiny_model("llama"), format=format, scheme=QuantScheme(4, 32)).output
    config = json.loads((made / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    found, left = tiles.shapes_of(str(made), GPU)
    expected = {(hidden, hidden), (inner, hidden), (hidden, inner)}
    assert expected <= {shape[2:4] for shape in found}
    assert len(found) == len(set(found))
    assert {shape[:2] for shape in found} == {(4, 32)}
    assert left == []
    other = quantize(tiny_model("llama"), output=made.parent / "w3", scheme=QuantScheme(3, 32)).output
    found, left = tiles.shapes_of(str(other), GPU)
    assert found == []
    assert all("no kernel for 3 bits" in line for line in left)


def test_a_whole_run(
    kept: Path,
    quantize: Callable[..., Report],
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it times is another test's; here every outcome is kept, and the next process would use it."""
    made, told = quantize(tiny_model("llama")).output, []

    def outcomes(weights: list[Weight], device: torch.device) -> Iterator[Outcome]:
        for weight in weights:
            name = f"decode w4 bfloat16 m16 g32 {weight.out_features}x{weight.in_features}"
            yield Outcome(name, 16, OTHER, 3.0, 2.0, {OTHER: 2.0}, {OTHER: "does not run"})

    monkeypatch.setattr(tune, "tune", outcomes)
    monkeypatch.setattr(tiles, "find_device", lambda name: GPU)
    found, left, path = tiles.tune(str(made), progress=lambda *step: told.append(step))
    assert (path, left) == (kept, [])
    assert all(one.replaced and one.dropped == [f"{list(OTHER)}: does not run"] for one in found)
    assert len(told) == len(found)
    assert set(tuned.read(path).values()) == {OTHER}
    assert len(tuned.read(path)) == len(found)


def test_the_command_is_listed() -> None:
    shown = CliRunner().invoke(cli.app, ["tune", "--help"], env={"COLUMNS": "200"}).stdout
    assert "lowbit tune qwen3-8b-w4" in shown
