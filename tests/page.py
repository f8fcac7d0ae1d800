"""An HTML page taken apart by the standard library's parser, for tests."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "i/"}
# Attributes through which a page fetches something; a link is only followed by its reader.
FETCHING = {"src", "srcset", "poster", "data", "action", "xlink:href", "background", "manifest"}


class Page(HTMLParser):
    """Text, tags and tables of a page; raises where a tag is left open or closed twice.

    Attributes:
        text: All text outside the style sheet, white space collapsed.
        tags: Every tag with its attributes.
        tables: Cells of every table, row by row.
        fetched: Whatever a browser would load by itself.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.fetched: list[str] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"left open: {self._open}"
        self.text = " ".join(" ".join(self._words).split())

    @classmethod
    def of(cls, folder: Path) -> Page:
        return cls((folder / "report.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name in FETCHING or (name == "href" and tag != "a"):
                self.fetched.append(f"{tag} {name}={value}")
        if tag in ("script", "iframe", "link", "object", "embed", "img", "base"):
            self.fetched.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            if "url(" in data or "@import" in data:
                self.fetched.append("style")
            return
        self._words.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
