"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit import QuantScheme, cli
from lowbit.errors import VerificationError

Folders = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`run("quantize", model, ...)`: exit code, stdout and stderr, without a new process."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "w4"
    lowbit.quantize(tiny_model("llama"), QuantScheme(4, 32), output=output, method="rtn")
    return output


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_examples(run: Run, command: str, flag: str) -> None:
    code, out, err = run(command, flag)
    assert (code, err) == (0, "")
    examples = [line for line in out.splitlines() if line.strip().startswith(f"lowbit {command}")]
    assert len(examples) >= 2


def test_every_file_of_commands_is_a_command() -> None:
    files = {path.stem for path in (ROOT / "lowbit" / "commands").glob("*.py")}
    assert files - {"__init__", "options"} == {
        module.__name__.rpartition(".")[2] for module in cli.COMMANDS.values()
    }


def test_help_of_the_whole(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in cli.COMMANDS)
    code, bare, err = run()
    assert err == ""
    assert "quantize" in bare


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"lowbit {lowbit.__version__}\n", "")


def test_the_command_is_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lowbit {lowbit.__version__}\n"


def test_help_is_quick() -> None:
    """It imports neither torch nor transformers."""
    code = """if True:
        import sys
        from lowbit.cli import main
        sys.argv[1:] = ["--help"]
        try:
            main()
        except SystemExit:
            assert not {"torch", "transformers", "datasets"} & set(sys.modules)
        """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/no/such", "-o", "out"], "/no/such does not exist"),
        (["org/name", "-o", "out", "--bits", "9"], "bits=9"),
        (["org/name", "-o", "out", "--group-size", "7"], "group_size=7"),
        (["org/name", "-o", "."], "exists and is not empty"),
    ],
)
def test_refusals_are_quick(arguments: list[str], expected: str) -> None:
    """What can be told without torch and transformers is told before they are imported."""
    code = """if True:
        import sys
        from lowbit.cli import main
        try:
            main()
        except SystemExit:
            assert not {"torch", "transformers", "datasets"} & set(sys.modules)
            raise
        """
    done = subprocess.run(
        [sys.executable, "-c", code, "quantize", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_quantize_prints_a_summary(run: Run, tiny_model: Folders, text_file: str, tmp_path: Path) -> None:
    output = tmp_path / "[bold]odd name"
    code, out, err = run("quantize", tiny_model("llama"), "-o", output, "--dataset", text_file,
                         "--samples", 4, "--seq-len", 48, "--group-size", 32, "--skip", "q_proj",
                         "--max-shard-size", "60KB", "--seed", 3)  # fmt: skip
    assert (code, err) == (0, "")
    folded = " ".join(out.split())
    assert "quantized 12 layers to w4g32 by qronos" in folded
    assert "4 x 48 tokens, seed 3" in folded
    assert "12 weights equal to the bit" in folded
    assert "[bold]odd name" in folded.replace("\n", "")
    assert "model.layers.*.self_attn.q_proj (x3): --skip q_proj" in out
    assert out.count("is skipped too") == 2  # once for k_proj and v_proj, not once per block
    assert "SGLang will not load this" in out
    assert "relative output error" in out
    assert len(list(output.glob("model-*.safetensors"))) > 2


def test_quantize_json(run: Run, tiny_model: Folders, tmp_path: Path) -> None:
    code, out, err = run("quantize", tiny_model("llama"), "-o", tmp_path / "out", "--method", "rtn",
                         "--bits", 8, "--format", "gptq", "--asymmetric", "--json",
                         "--no-verify")  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["output"] == str(tmp_path / "out")
    assert (report["method"], report["format"], report["scheme"]) == ("rtn", "gptq", "w8g64-asym")
    assert len(report["layers"]) == 21
    assert report["layers"][0]["shape"] == [64, 64]
    assert report["verification"] is None
    assert report["skipped"]["lm_head"]
    assert report["peak_memory"] > 10**7
    assert report["seconds"]["all"] > 0


def test_quantize_verified_json(run: Run, tiny_model: Folders, tmp_path: Path) -> None:
    code, out, _ = run("quantize", tiny_model("llama"), "-o", tmp_path / "out", "--method", "rtn", "--json",
                       "--head-bits", 8)  # fmt: skip
    assert code == 0
    assert json.loads(out)["verification"] == {
        "loader": "stock transformers",
        "weights": 22,
        "kl": pytest.approx(0, abs=1e-6),
    }


def test_nothing_but_the_summary_is_printed(tiny_model: Folders, tmp_path: Path) -> None:
    """A fresh process, where every library may have its say: no bars and warnings of others."""
    model, output = tiny_model("llama", tied=True), tmp_path / "out"
    command = [sys.executable, "-m", "lowbit", "quantize", model, "-o", output, "--dataset", "self",
               "--samples", "2", "--seq-len", "32", "--head-bits", "8"]  # fmt: skip
    quieted = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    environment = {name: value for name, value in os.environ.items() if name not in quieted}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "%|" not in done.stdout
    assert "quantized" in done.stdout


def test_convert(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", checkpoint, tmp_path / "gptq", "--format", "gptq")
    assert (code, err) == (0, "")
    assert "compressed-tensors -> gptq: 21 x w4g32" in out
    assert "21 layers with the same codes, scales and zeros" in out
    code, out, err = run(
        "convert", tmp_path / "gptq", tmp_path / "back", "--format", "compressed-tensors", "--json"
    )
    assert code == 0
    assert json.loads(out)["layers"] == {"w4g32": 21}
    back, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", checkpoint))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    code, out, err = run("convert", checkpoint, tmp_path / "model.gguf")
    assert "21 x Q4_0" in out
    code, out, err = run("convert", checkpoint, tmp_path / "model.gguf")
    assert (code, out) == (2, "")
    assert err.endswith("model.gguf exists: choose another or add --overwrite\n")


def test_convert_says_what_it_rounded_again(run: Run, tiny_model: Folders, tmp_path: Path) -> None:
    lowbit.quantize(tiny_model("llama"), QuantScheme(8, 32), output=tmp_path / "w8", method="rtn")
    code, out, err = run("convert", tmp_path / "w8", tmp_path / "awq", "--format", "awq")
    assert (code, out) == (2, "")
    assert "awq holds 4 bits only, got bits=8" in err
    code, out, _ = run("convert", tmp_path / "w8", tmp_path / "awq", "--format", "awq", "--lossy")
    assert code == 0
    assert "21 were ROUNDED AGAIN (--lossy)" in out
    assert "codes of 8 bits can't be carried over to 4 bits" in out


def test_inspect(run: Run, checkpoint: Path) -> None:
    code, out, err = run("inspect", checkpoint)
    assert (code, err) == (0, "")
    assert "w4g32" in out
    assert "compressed-tensors" in out
    code, out, err = run("inspect", checkpoint, "--json")
    found = json.loads(out)
    assert found["method"] == "compressed-tensors"
    weights = sum(part["weights"] for part in found["parts"])
    assert found["bits_per_weight"] == pytest.approx(
        8 * sum(part["bytes"] for part in found["parts"]) / weights
    )
    up = next(part for part in found["parts"] if part["name"].endswith("up_proj"))
    assert (up["scheme"], up["modules"], up["weights"]) == ("w4g32", 3, 3 * 64 * 128)
    assert up["bytes"] == 3 * (64 * 128 // 2 + 128 * 2 * 2 + 16)  # codes, two scales a row, the shape


def test_eval(run: Run, tiny_model: Folders, checkpoint: Path, text_file: str) -> None:
    code, out, err = run("eval", checkpoint, "--reference", tiny_model("llama"), "--dataset", text_file,
                         "--seq-len", 64, "--windows", 5, "--json")  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["windows"] == 5
    assert result["tokens"] == 5 * 63
    assert 0 < result["kl"] < 1
    assert result["perplexity"] / result["reference_perplexity"] == pytest.approx(result["perplexity_ratio"])
    code, out, err = run("eval", tiny_model("llama"), "--dataset", text_file, "--seq-len", 64, "--json")
    assert (code, err) == (0, "")
    plain = json.loads(out)
    assert plain["kl"] is None
    assert plain["perplexity"] > 1
    code, out, err = run(
        "eval", checkpoint, "--reference", checkpoint, "--dataset", text_file, "--seq-len", 64
    )
    assert (code, err) == (0, "")
    assert "KL divergence" in out
    assert "1.0000" in out  # the ratio of a model with itself


def test_the_precision_of_eval(run: Run, checkpoint: Path, text_file: str) -> None:
    common = ("eval", checkpoint, "--dataset", text_file, "--seq-len", 64, "--windows", 2, "--json")
    values = [
        json.loads(run(*common, "--dtype", dtype)[1])["perplexity"]
        for dtype in ("auto", "bfloat16", "float32")
    ]
    assert values[0] == values[1] != values[2]
    assert values[2] == pytest.approx(values[0], rel=0.02)


def test_a_failed_verification_is_exit_code_1(
    run: Run, tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise VerificationError("q_proj differs")

    monkeypatch.setattr("lowbit.road.verify", refuse)
    code, out, err = run("quantize", tiny_model("llama"), "-o", tmp_path / "out", "--method", "rtn")
    assert (code, out, err) == (1, "", "lowbit: q_proj differs\n")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(
    run: Run, tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lowbit.road.verify", stumble)
    monkeypatch.setattr(
        sys,
        "argv",
        ["lowbit", "quantize", str(tiny_model("llama")), "-o", str(tmp_path / "out"), "--method", "rtn"],
    )
    with pytest.raises(ZeroDivisionError):
        cli.main()
    assert [left.name for left in tmp_path.iterdir()] == ["out.lowbit-work"]  # what was done is not lost


def test_a_full_disk_is_one_line(
    run: Run, tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("lowbit.checkpoint.CheckpointWriter.finish", full)
    code, _, err = run("quantize", tiny_model("llama"), "-o", tmp_path / "out", "--method", "rtn")
    assert code == 2
    work = tmp_path / "out.lowbit-work"
    assert err == (
        f"lowbit: [Errno 28] No space left on device: 'model.safetensors'; what is done is kept in {work}: "
        "run the same command to continue, add --restart to start over\n"
    )
    assert list(tmp_path.iterdir()) == [work]


@pytest.mark.parametrize("as_json", [True, False])
def test_progress_never_mixes_with_json(
    run: Run, tiny_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr("lowbit.terminal.SECONDS_BETWEEN_LINES", -1.0)
    options = ["--json"] if as_json else []
    code, out, err = run("quantize", tiny_model("llama"), "-o", tmp_path / "out", "--method", "rtn", *options)
    assert code == 0
    told, other = (err, out) if as_json else (out, err)
    lines = [line for line in told.splitlines() if line.startswith("quantize ")]
    assert len(lines) >= 21
    assert "block 3/3" in lines[-1]
    assert "block " not in other
    assert not as_json or json.loads(out)
