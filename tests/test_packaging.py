"""The wheel: two import packages, type marker, licence, console script; nothing else."""

from __future__ import annotations

import configparser
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib

from tests.environment import INSTALL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the whole checkout, so that a stray package would show, and without network."""
    source, out = tmp_path_factory.mktemp("source") / "lowbit", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "site", "demo-output"
    )
    shutil.copytree(ROOT, source, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [member for member in wheel.namelist() if member.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_two_import_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lowbit", "lowbit_kernels"}


@pytest.mark.parametrize(
    ("package", "folder"), [("lowbit", "lowbit"), ("lowbit_kernels", "triton_kernels/lowbit_kernels")]
)
def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile, package: str, folder: str) -> None:
    files = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*")
             if path.suffix in (".py", ".c")}  # fmt: skip
    assert files - set(wheel.namelist()) == set()


def test_every_template_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    files = {f"lowbit/templates/{path.name}" for path in (ROOT / "lowbit" / "templates").iterdir()}
    assert "lowbit/templates/model_card.md.jinja" in files
    assert files - set(wheel.namelist()) == set()


def test_type_marker_and_licence(wheel: zipfile.ZipFile) -> None:
    assert "lowbit/py.typed" in wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_console_script_exists(wheel: zipfile.ZipFile) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(metadata_file(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"lowbit": "lowbit.cli:main"}
    from lowbit import cli

    assert callable(cli.main)


def test_version_stands_in_one_place(wheel: zipfile.ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nVersion: {version}\n" in metadata_file(wheel, "METADATA")
    sources = (ROOT / "lowbit").rglob("*.py")
    copies = [path.name for path in sources if f'"{version}"' in path.read_text(encoding="utf-8")]
    assert copies == []


def needed(wheel: zipfile.ZipFile, system: str, extra: str = "") -> set[str]:
    """Names of the distributions that pip installs with the wheel on a system."""
    from packaging.requirements import Requirement

    lines = [
        line for line in metadata_file(wheel, "METADATA").splitlines() if line.startswith("Requires-Dist")
    ]
    here = {"platform_system": system, "extra": extra}
    requirements = [Requirement(line.partition(": ")[2]) for line in lines]
    return {one.name for one in requirements if one.marker is None or one.marker.evaluate(here)}


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_triton_is_asked_for_on_linux_alone(wheel: zipfile.ZipFile, system: str) -> None:
    assert {"torch", "transformers", "typer"} <= needed(wheel, system)
    assert ("triton" in needed(wheel, system)) == (system == "Linux")


@pytest.mark.parametrize(
    ("extra", "brings"),
    [("gguf", "gguf"), ("tasks", "lm-eval"), ("docs", "mkdocs-material"), ("dev", "pytest")],
)
def test_extras_are_optional(wheel: zipfile.ZipFile, extra: str, brings: str) -> None:
    assert brings not in needed(wheel, "Linux")
    assert brings in needed(wheel, "Linux", extra)


def test_the_wheel_is_for_every_system(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name.endswith("-py3-none-any.whl")
    lowest = metadata_file(wheel, "METADATA").partition("Requires-Python: ")[2].splitlines()[0]
    assert lowest == ">=3.10"


def test_it_works_without_triton(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """As on macOS and Windows: quantize, load packed, generate; and nothing that only Unix or Linux has."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import ctypes, torch, lowbit, lowbit.pages, lowbit.pipeline
        sys.modules["resource"] = None
        class Library(ctypes.CDLL):
            def __init__(self, name, *rest, **options):
                if name is None:
                    raise TypeError("bad argument type for built-in operation")
                super().__init__(name, *rest, **options)
        ctypes.CDLL = Library
        lowbit.pages._PROCESS = lowbit.pages._PROCESS / "no-such-folder"  # /proc
        model, output = sys.argv[1:]
        lowbit.quantize(model, lowbit.QuantScheme(4, 32), output=output, method="rtn")
        loaded = lowbit.load(output)
        assert loaded.generate(torch.tensor([[1, 40, 50]]), max_new_tokens=3).shape[1] > 3
        """
    command = [sys.executable, "-c", code, str(tiny_model("llama")), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_it_installs_in_a_clean_environment(
    wheel: zipfile.ZipFile, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing but the wheel and what its metadata asks for, away from the checkout."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs, lock = tmp_path / "venv" / "bin", ROOT / "requirements-dev.lock"
    install = [str(programs / "python"), *INSTALL, "--constraint", str(lock)]
    subprocess.run([*install, f"{wheel.filename}[gguf]"], check=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def lowbit(*words: object) -> str:
        command = [str(programs / "lowbit"), *map(str, words)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    model = tiny_model("llama")
    assert json.loads(lowbit("doctor", "--json"))["healthy"]
    lowbit("quantize", model, "--output", "w4", "--method", "rtn", "--group-size", 32)
    assert "w4g32" in lowbit("inspect", "w4")
    assert "Q4_0" in lowbit("convert", "w4", "w4.gguf")
    assert (tmp_path / "w4" / "report.html").is_file()


def test_lock_satisfies_the_declared_dependencies() -> None:
    """Every direct dependency of every extra is pinned in the lock, inside the declared range.

    All but `tasks`, whose test installs a pinned harness in an environment of its own.
    """
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"{line!r} is not pinned"
            pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "tasks"}
    declared = itertools.chain(project["dependencies"], *extras.values())
    for requirement in map(Requirement, declared):
        name = requirement.name.lower().replace("_", "-")
        if name != "lowbit":
            assert requirement.specifier.contains(pins.get(name, "missing")), str(requirement)
