"""The page beside a checkpoint: complete, self-contained, well-formed, and safe."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit import beside, hf, record, report
from lowbit.charts import Axis, Chart, Point
from lowbit.divergence import Divergence
from lowbit.evaluate import perplexity
from lowbit.report import heat_map, place, with_error
from lowbit.results import Report
from tests.page import Page

Folders = Callable[..., Path]
Run = Callable[..., Report]


def measure(folder: Path, source: Path, text: str, **options: Any) -> list[str]:
    """`lowbit eval` without the command line."""
    seen = Divergence()
    settings = {"seq_len": 64, "windows": 5} | options
    result = perplexity(folder, text, reference=source, divergence=seen, **settings)
    entry = {"dataset": text, "reference": str(source), "seq_len": settings["seq_len"]}
    plain = {"result": result.to_dict(), "divergence": seen.to_dict(hf.load_tokenizer(folder))}
    return beside.after_eval(folder, entry | plain)


@pytest.fixture
def done(quantize: Run, tiny_model: Folders) -> Report:
    return quantize(tiny_model("llama"), method="gptq", skip=["*.1.mlp.down_proj"])


def test_the_page_has_every_number(done: Report, tiny_model: Folders, text_file: str) -> None:
    measure(done.output, tiny_model("llama"), text_file)
    page, kept = Page.of(done.output), record.load(done.output)
    assert kept is not None
    (heat,) = [table for table in page.tables if table[1][:2] == ["block", "q"] and "down" in table[1]][:1]
    columns, rows = heat[1][1:], {row[0]: row[1:] for row in heat[2:]}
    for layer in done.layers:
        block, linear = place(layer.name)
        shown = rows[str(block)][columns.index(linear.split(".")[-1].removesuffix("_proj"))]
        assert float(shown) / 100 == pytest.approx(layer.error, rel=0.06), layer.name
    assert rows["1"][columns.index("down")] == "\N{EN DASH}"
    result = kept["evaluations"][0]["result"]
    for name in ("perplexity", "reference_perplexity", "perplexity_ratio", "kl"):
        assert with_error(result[name], result[f"{name}_se"]) in page.text
    for name in done.seconds.keys() - {"all"}:
        assert name in page.text
    passage = kept["evaluations"][0]["divergence"]["passages"][0]
    words = " ".join("".join(token["text"] for token in passage["tokens"]).split())
    assert words in " ".join(re.sub(r"<[^>]+>", "", (done.output / "report.html").read_text()).split())


def test_nothing_is_fetched_and_it_is_small(done: Report, tiny_model: Folders, text_file: str) -> None:
    measure(done.output, tiny_model("llama"), text_file)
    page = Page.of(done.output)
    assert page.fetched == []
    assert not [
        attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)
    ]
    assert (done.output / "report.html").stat().st_size < 300_000
    assert [a["lang"] for tag, a in page.tags if tag == "html"] == ["en"]
    assert any(a.get("name") == "viewport" for tag, a in page.tags if tag == "meta")
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")


def test_a_large_model_stays_small() -> None:
    """80 blocks; 48 blocks of 128 experts share cells."""
    dense = [{"name": f"model.layers.{block}.{part}_proj", "shape": [8192, 8192], "scheme": "w4g128",
              "error": 0.01 + block / 1e4, "note": ""}
             for block in range(80) for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                                                 "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
    experts = [{"name": f"model.layers.{block}.mlp.experts.{expert}.{part}_proj", "shape": [8, 8],
                "scheme": "w4g32", "error": 0.02 * (expert + 1), "note": ""}
               for block in range(48) for expert in range(128) for part in ("gate", "up")]  # fmt: skip
    for layers in (dense, experts):
        kept = empty_record() | {"quantization": quantization(layers)}
        assert len(report.render(kept)) < 150_000
    found = heat_map(experts, {})
    assert found is not None
    assert [len(row) for _, row in found["rows"]] == [2] * 48
    assert found["rows"][0][1][0]["error"] == pytest.approx(0.02 * 64.5)


def empty_record() -> dict[str, Any]:
    done = Report(Path("w4"), "w4g32", "rtn", "gptq", "none")
    return record.of_report(done, "model", [], None)


def quantization(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {**empty_record()["quantization"], "layers": layers, "seconds": {"all": 1.0}}


def test_text_is_escaped(done: Report, tiny_model: Folders) -> None:
    """Token texts, names and notes come from strangers."""
    kept = record.load(done.output)
    assert kept is not None
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    kept["name"] = kept["model"] = kept["run"]["command"] = kept["run"]["machine"] = attack
    kept["quantization"]["notes"] = [attack]
    kept["quantization"]["skipped"] = {attack: attack}
    kept["quantization"]["layers"][0]["name"] = f"model.layers.0.{attack}"
    page = Page(report.render(kept))
    assert page.fetched == []
    assert attack in page.text


def test_a_plan_is_shown() -> None:
    kept = empty_record()
    rows = [
        {"name": "model.layers.0.mlp.up_proj", "scheme": "w3g64", "bits": 3.25, "sensitivity": 0.002},
        {"name": "model.layers.1.mlp.up_proj", "scheme": "w8g64", "bits": 8.25, "sensitivity": 0.2},
    ]
    kept["quantization"]["plan"] = {"budget": "4.25 bits per weight", "achieved": "4.2", "rows": rows}
    page = Page(report.render(kept))
    assert "Budget: 4.25 bits per weight; used: 4.2" in page.text
    (table,) = [table for table in page.tables if table[0][0] == "group"]
    assert [row[:4] for row in table[1:]] == [
        ["model.layers.0.mlp.up_proj", "w3g64", "3.25", "0.00200"],
        ["model.layers.1.mlp.up_proj", "w8g64", "8.25", "0.200"],
    ]


def test_before_eval_the_page_says_how(done: Report) -> None:
    page = Page.of(done.output)
    assert "Not measured yet" in page.text
    assert "lowbit eval out --reference" in page.text
    assert f"{len(done.layers)} of {len(done.layers)}" in page.text


def test_evaluations_add_up_and_replace(done: Report, tiny_model: Folders, text_file: str) -> None:
    source = tiny_model("llama")
    measure(done.output, source, text_file)
    measure(done.output, source, text_file, seq_len=32)
    before = record.load(done.output)
    measure(done.output, source, text_file)  # the same again
    after = record.load(done.output)
    assert before is not None
    assert after is not None
    assert [entry["seq_len"] for entry in before["evaluations"]] == [64, 32]
    assert [entry["seq_len"] for entry in after["evaluations"]] == [32, 64]


def test_loaders_pass_over_it(done: Report, tiny_model: Folders, text_file: str) -> None:
    from transformers import AutoModelForCausalLM

    measure(done.output, tiny_model("llama"), text_file)
    _, info = AutoModelForCausalLM.from_pretrained(done.output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    hf.load(done.output)


def test_sums_follow(done: Report, tiny_model: Folders, text_file: str) -> None:
    """`sha256sum -c` holds before and after; a line of the weights is never touched."""

    def check() -> bool:
        command = ["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"]
        return subprocess.run(command, cwd=done.output, capture_output=True, check=False).returncode == 0

    sums = done.output / "SHA256SUMS"
    files = sorted(path for path in done.output.iterdir() if path != sums)
    sums.write_text("".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files))
    before = sums.read_text().splitlines()
    assert check()
    measure(done.output, tiny_model("llama"), text_file)
    after = sums.read_text().splitlines()
    assert check()
    changed = {line[66:] for line in set(before) ^ set(after)}
    assert changed == {"README.md", "lowbit_report.json", "report.html"}
    (done.output / "config.json").write_text("{}")
    beside.renew_sums(done.output)
    assert not check(), "only what describes the run is renewed"


def test_someone_elses_checkpoint(done: Report, tiny_model: Folders, text_file: str) -> None:
    (done.output / record.NAME).unlink()
    (done.output / "README.md").write_text("theirs")
    notes = measure(done.output, tiny_model("llama"), text_file)
    assert notes == [str(done.output / "report.html")]
    assert (done.output / "README.md").read_text() == "theirs"
    assert "KL divergence" in Page.of(done.output).text


def test_an_original_model_is_left_alone(tiny_model: Folders, text_file: str) -> None:
    source = tiny_model("llama")
    before = sorted(source.iterdir())
    assert measure(source, source, text_file) == []
    assert sorted(source.iterdir()) == before


def test_a_folder_that_can_not_be_written(
    done: Report, tiny_model: Folders, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    (note,) = measure(done.output, tiny_model("llama"), text_file)
    assert note.startswith("no report: ")
    assert "No space left" in note


def test_a_foreign_file_of_that_name(done: Report, tiny_model: Folders, text_file: str) -> None:
    (done.output / record.NAME).write_text("[]")
    (note,) = measure(done.output, tiny_model("llama"), text_file)
    assert "can't be read: remove it" in note


class TestRecord:
    def test_paths_are_cut(self, done: Report, tiny_model: Folders, text_file: str) -> None:
        measure(done.output, tiny_model("llama"), text_file)
        home = str(done.output.parent)
        for name in (record.NAME, report.NAME, "README.md"):
            content = (done.output / name).read_text(encoding="utf-8")
            assert home not in content, name
            assert str(tiny_model("llama").parent) not in content, name
            assert "text.txt" in content, name

    def test_a_command_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        argv = [
            "/usr/bin/lowbit",
            "quantize",
            str(tmp_path),
            "--output=/data/my model",
            "--dataset",
            "org/data:config",
        ]
        monkeypatch.setattr("sys.argv", argv)
        assert (
            record.command()
            == f"lowbit quantize {tmp_path.name} '--output=my model' --dataset org/data:config"
        )
        monkeypatch.setattr("sys.argv", ["/usr/bin/pytest", "tests"])
        assert record.command() is None

    def test_a_model_in_the_hub_cache_is_known(self) -> None:
        cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abc"
        assert record.hub_id(cached) == record.public(cached) == "Qwen/Qwen3-8B"
        assert record.hub_id("model.gguf") is record.hub_id("folder/model.gguf") is None


class TestCharts:
    def test_places_and_clipping(self) -> None:
        linear, log = Axis("x", 0, 10), Axis("x", 0.01, 100, log=True)
        assert [linear.place(v) for v in (-1, 0, 5, 10, 11)] == [0, 0, 0.5, 1, 1]
        assert log.place(1) == pytest.approx(0.5)
        assert log.place(0) == 0

    @pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (0, 457e6), (1e-3, 7.0), (-2, 3)])
    def test_ticks_are_inside_round_and_few(self, low: float, high: float) -> None:
        ticks = Axis("x", low, high).ticks()
        assert 3 <= len(ticks) <= 8
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)

    @pytest.mark.parametrize(("low", "high"), [(1e-7, 10), (0.02, 0.6), (0.11, 0.19), (1, 1000)])
    def test_log_ticks(self, low: float, high: float) -> None:
        ticks = Axis("x", low, high, log=True).ticks()
        assert 1 <= len(ticks) <= 7
        assert all(low <= tick <= high * 1.001 for tick in ticks)

    def test_a_histogram_has_the_areas_of_its_counts(self) -> None:
        chart = Chart(Axis("x", 0, 3), Axis("y", 0, 4), "test")
        chart.steps([0, 1, 2, 3], [1, 4, 2])
        (path,) = re.findall(r'class="area s0" d="([^"]+)"', str(chart))
        levels = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)H", path)]
        bottom = float(re.search(r"^M[\d.]+ ([\d.]+)", path)[1])  # type: ignore[index]
        heights = [bottom - level for level in levels]
        assert heights == pytest.approx([heights[0], 4 * heights[0], 2 * heights[0]], rel=0.01)

    def test_labels_do_not_cover_each_other(self) -> None:
        chart = Chart(Axis("x", 0, 10), Axis("y", 0, 10), "test")
        chart.points([Point(5, 5 + 0.1 * n, 0.2, f"model number {n}", n) for n in range(5)])
        places = re.findall(r'class="note" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"', str(chart))
        assert len(places) == 5
        for a in range(5):
            for b in range(a):
                if places[a][2] == places[b][2]:
                    assert abs(float(places[a][1]) - float(places[b][1])) > 9
        assert str(chart).count("bar s") == 15
