"""The documentation's site: navigation, files, links and the API page agree; nothing is built or fetched."""

from __future__ import annotations

import importlib
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lowbit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)")
ANCHOR = re.compile(r"\]\((?!https?://|mailto:)([^)\s#]*)#([^)\s]+)\)")
IMAGE_BYTES = 300_000


def config() -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return loaded


def test_navigation_names_every_page_once() -> None:
    nav = config()["nav"]
    assert isinstance(nav, list)
    named = [file for entry in nav for file in entry.values()]
    assert sorted(named) == [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them: lower case, without punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_into_a_page_name_a_heading(page: Path) -> None:
    for file, anchor in ANCHOR.findall(page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / file if file else page), f"{page.name} links to #{anchor}"


def test_snippets_exist() -> None:
    for page in PAGES:
        for file in re.findall(r'--8<-- "([^"]+)"', page.read_text(encoding="utf-8")):
            assert (ROOT / file).is_file(), f"{page.name} shows {file}"


def test_the_api_page_shows_every_public_name() -> None:
    shown = re.findall(r"^::: lowbit\.([\w.]+)$", (DOCS / "API.md").read_text(encoding="utf-8"), re.MULTILINE)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"lowbit.{module}".rstrip(".")), attribute), name
    assert set(lowbit.__all__) <= {name.rpartition(".")[2] for name in shown}


@pytest.mark.parametrize("image", sorted((DOCS / "images").glob("*.png")), ids=lambda image: image.name)
def test_images_are_small(image: Path) -> None:
    content = image.read_bytes()
    assert len(content) < IMAGE_BYTES
    width, _ = struct.unpack(">II", content[16:24])
    assert 300 <= width <= 1400


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None, reason="no mkdocs")
def test_it_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "QuantScheme" in (tmp_path / "site" / "API.html").read_text(encoding="utf-8")
