"""The wheel: two import packages, type marker, licence, console script; nothing else."""

from __future__ import annotations

import configparser
import itertools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the whole checkout, so that a stray package would show, and without network."""
    source, out = tmp_path_factory.mktemp("source") / "lowbit", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo-output")
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
    files = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
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
