"""The comparison with other tools: the table, the bits it states, and what a peer must hand over."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowbit import QuantScheme, batches, hf
from tests import script

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], ModuleType]]:
    """A script as a module; scripts stand on the path of the interpreter that runs them."""
    folders = [str(SCRIPTS), str(SCRIPTS / "peers")]
    before = set(sys.modules)
    sys.path[:0] = folders
    yield importlib.import_module
    for folder in folders:
        sys.path.remove(folder)
    for name in ("ablation", "compare_peers", "peer_runs", "peer_table", "dense", "gptq_file", "llama_cpp"):
        if name not in before:
            sys.modules.pop(name, None)


def result(peer: str = "tool", kl: float = 0.1, **changes: Any) -> dict[str, Any]:
    score = {
        "perplexity_ratio": 1.05, "perplexity_ratio_se": 0.01, "kl": kl, "kl_se": 0.01, "top1_agreement": 0.9,
    }  # fmt: skip
    facts = {
        "peer": peer, "version": "1.0", "method": "gptq", "model": "m", "bits": 4, "symmetric": False,
        "group_size": 64, "bits_per_weight": 4.3125, "cpu_seconds": 12.3, "peak_memory": 2e9,
        "texts": {"wiki": score, "code": {**score, "kl": 9.0}},
    }  # fmt: skip
    return facts | changes


def test_the_table_has_a_row_for_every_text_and_the_best_first(module: Any) -> None:
    table = module("peer_table").table([result("worse", 0.2), result("better", 0.1)])
    title, blank, header, rule, *rows = table.splitlines()
    assert (title, blank, len(rows)) == ("**m, 4 bits**", "", 4)
    assert {line.count("|") for line in (header, rule, *rows)} == {11}
    assert [row.split("|")[1].strip() for row in rows] == ["better 1.0"] * 2 + ["worse 1.0"] * 2
    assert "| w4g64 asym | 4.31 | wiki | 1.050 ± 0.010 | 0.1000 ± 0.0100 | 0.900 | 12 | 2.00 |" in rows[0]


def test_models_and_widths_have_tables_of_their_own(module: Any) -> None:
    runs = [result(bits=3), result(model="n"), result(bits=4)]
    titles = [line for line in module("peer_table").table(runs).splitlines() if line.startswith("**")]
    assert titles == ["**m, 4 bits**", "**m, 3 bits**", "**n, 4 bits**"]


def test_the_page_keeps_what_is_outside_the_markers(module: Any) -> None:
    peers = module("peer_table")
    page = f"before\n{peers.MARKERS[0]}old\n{peers.MARKERS[1]}\nafter\n"
    once = peers.between_markers(page, "new\n")
    assert once == f"before\n{peers.MARKERS[0]}\nnew\n\n{peers.MARKERS[1]}\nafter\n"
    assert peers.between_markers(once, "new\n") == once
    with pytest.raises(SystemExit, match="lacks"):
        peers.between_markers("before\n", "new\n")


@pytest.mark.parametrize("script", ["compare_peers", "ablation"])
def test_a_table_is_made_without_torch(script: str, tmp_path: Path) -> None:
    code = f"import sys, {script}; {script}.main(); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--results", str(tmp_path / "none.jsonl")]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})


@pytest.mark.parametrize("script", ["compare_peers", "ablation"])
def test_a_model_needs_texts(
    module: Any, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "my-model", "--calibration", "text.txt"])
    with pytest.raises(SystemExit):
        module(script).main()
    assert "a model needs --calibration and --text" in capsys.readouterr().err


def test_every_run_has_a_script_that_knows_its_method(module: Any) -> None:
    peers = module("compare_peers")
    assert len({run.name for run in peers.RUNS}) == len(peers.RUNS)
    for run in peers.RUNS:
        if run.peer != "lowbit":
            script = SCRIPTS / "peers" / peers.PEERS[run.peer].script
            assert f'"{run.method}"' in script.read_text(encoding="utf-8"), run.name


@pytest.mark.parametrize(
    ("method", "options", "scheme"),
    [
        ("high", ["--effort", "high", "--bits", 3, "--group-size", 128, "--symmetric"], "w3g128 sym"),
        ("gptq", ["--method", "gptq", "--bits", 3, "--group-size", 128, "--symmetric"], "w3g128 sym"),
        ("target-5.53", ["--target-bpw", "5.53"], "mixed"),
    ],
)
def test_schemes_are_asked_for_as_they_are_named(
    module: Any, method: str, options: list[Any], scheme: str
) -> None:
    run = module("compare_peers").Run("lowbit", method, 3, True)
    assert module("compare_peers").scheme_asked(run, 128) == options
    assert module("peer_table").scheme_name(run._asdict() | {"group_size": 128}) == scheme


def test_peers_get_the_tokens_that_lowbit_draws(
    module: Any, tiny_model: Callable[..., Path], text_file: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    options = argparse.Namespace(model=str(model), calibration=text_file, samples=5, seq_len=24, seed=3)
    module("compare_peers").save_tokens(options, tmp_path / "tokens.npy")
    drawn = batches.draw_rows(text_file, hf.load_tokenizer(str(model)), 5, 24, 3)
    assert module("dense").load_tokens(tmp_path / "tokens.npy").equal(drawn)


@pytest.mark.parametrize(
    ("bits", "group_size", "extra", "expected"),
    [
        (4, 32, {}, 8 * 18 / 32),  # Q4_0: 16 bytes of codes and a float16 for 32 weights
        (4, 32, {"zero_bits": 16}, 8 * 20 / 32),  # Q4_1: and a minimum
        (4, 64, {"scale_bits": 32}, 4.5),  # NF4
        (4, 64, {"scale_bits": 8 + 32 / 256}, 4.127),  # NF4 with its scales quantized (QLoRA, section 3)
        (4, 128, {"zero_bits": 4}, 4.15625),
    ],
)
def test_bits_per_weight_counts_scales_and_zeros(
    module: Any, bits: int, group_size: int, extra: dict[str, float], expected: float
) -> None:
    assert module("dense").bits_per_weight(bits, group_size, **extra) == pytest.approx(expected, abs=1e-4)


def rounded(state: dict[str, torch.Tensor], dense: Any) -> dict[str, torch.Tensor]:
    """Every linear layer of a checkpoint with 16 values to a group of 16."""
    found = {}
    for name, tensor in state.items():
        if dense.is_linear(name, tensor):
            found[name] = (tensor.float() * 7 / tensor.abs().max()).round().clamp(-8, 7)
    return found


def test_a_dense_model_is_written_that_transformers_loads(
    module: Any, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, model = module("dense"), tiny_model("llama")
    options = argparse.Namespace(model=model, output=tmp_path / "out", bits=4, group_size=16)
    weights = rounded(dense.load_source(model), dense)
    dense.save(options, "torch", dense.Cost().stop(), weights, bits_per_weight=5.0)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["version"] == torch.__version__
    assert facts["bits_per_weight"] == 5.0
    assert facts["peak_memory"] > 2**20
    loaded = dict(hf.load(tmp_path / "out").named_parameters())
    assert weights
    for name, weight in weights.items():
        assert loaded[name].float().equal(weight)
    untouched = [name for name in load_file(model / "model.safetensors") if name not in weights]
    assert any("embed" in name for name in untouched)


def test_a_dense_model_that_is_not_what_it_says_is_refused(
    module: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense, model = module("dense"), tiny_model("llama")
    options = argparse.Namespace(model=model, output=tmp_path / "out", bits=4, group_size=16)
    weights = rounded(dense.load_source(model), dense)
    first = next(iter(weights))
    random = torch.randn(weights[first].shape)
    for bits, wrong, complaint in (
        (4, {name: w for name, w in weights.items() if name != first}, "not quantized"),
        (4, weights | {"model.other.weight": torch.zeros(2, 2)}, "not in the source"),
        (3, weights | {first: random}, "16 values in a group of 3 bits"),
    ):
        options.bits = bits
        with pytest.raises(SystemExit, match=complaint):
            dense.save(options, "torch", {}, wrong, bits_per_weight=4.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gptq_file_is_read_as_lowbit_wrote_it(
    module: Any, checkpoint: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    """Two readers of one layout, written apart, agree to the last bit of the model's bfloat16."""
    folder = checkpoint("llama", QuantScheme(bits, 32, symmetric=False), format="gptq")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    weights = module("gptq_file").dequantize(tmp_path, bits)
    ours = dict(hf.load(folder, packed=False).named_parameters())
    assert len(weights) >= 7
    for name, weight in weights.items():
        assert weight.bfloat16().equal(ours[name]), name


def test_q4_k_m_is_llama_quantizes_mixture(module: Any) -> None:
    """Its log for SmolLM2-135M: 180 matrices fall back, 6.17 bits per weight with Q8_0 embeddings."""
    llama_cpp = module("llama_cpp")
    shapes = {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }  # fmt: skip
    embedding, norms = 49152 * 576, 61 * 576
    bits, weights, kinds = 8.5 * embedding + 32 * norms, embedding + norms, []
    for block in range(30):
        for name, (rows, columns) in shapes.items():
            kind = llama_cpp.type_of("Q4_K_M", f"model.layers.{block}.{name}.weight", columns, 30)
            kinds.append(kind)
            values, size = llama_cpp.GGML_QUANT_SIZES[kind]
            bits += 8 * size * rows * columns / values
            weights += rows * columns
    assert sum(kind in llama_cpp.FALLBACK.values() for kind in kinds) == 180
    assert round(bits / weights, 2) == 6.17
    assert set(kinds) <= llama_cpp.GRIDS.keys()
    assert llama_cpp.type_of("Q4_K_M", "model.layers.4.mlp.down_proj.weight", 4864, 24).name == "Q4_K"


@pytest.mark.slow
def test_lowbits_own_row_from_the_command_line(
    tiny_model: Callable[..., Path], text_file: str, tmp_path: Path
) -> None:
    """Quantized, evaluated, recorded, put on the page; a second call repeats nothing."""
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text("<!-- peers: begin -->\n<!-- peers: end -->\n")
    for _ in range(2):
        done = script.run(
            SCRIPTS / "compare_peers.py", tiny_model("llama"), "--only", "lowbit-fast-4-sym",
            "--group-size", 32, "--calibration", text_file, "--text", f"{text_file}:2",
            "--eval-seq-len", 48, "--results", results, "--docs", page,
        )  # fmt: skip
        assert done.code == 0, done.stderr
    (line,) = results.read_text().splitlines()
    assert json.loads(line)["bits_per_weight"] == pytest.approx(4.5, abs=0.2)
    assert page.read_text().count("| lowbit ") == 1
