"""An HTML page as data, by html.parser: its tables, its numbers, its texts and what it asks a browser to do."""

from __future__ import annotations

from html.parser import HTMLParser

EMPTY = {"meta", "input", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """A page, which must be well formed.

    Attributes
    ----------
    tables : list of list of list of str
        The texts of the cells of each table, by rows.
    values : list of list of int
        The values of the ``data`` elements, by table.
    cells : list of (str, str)
        The class and the text of each cell of a table.
    captions : list of str
        The captions of the tables.
    tags : list of (str, dict)
        All start tags with their attributes.
    texts : dict of str to str
        The text of each section, by its identifier; the rest under an empty name.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.values: list[list[int]] = []
        self.captions: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {"": ""}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.style = ""
        self._open: list[str] = []
        self._section = ""
        self.feed(source)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append((tag, found))
        if tag not in EMPTY:
            self._open.append(tag)
        if tag == "section":
            self._section = found.get("id") or ""
            self.texts.setdefault(self._section, "")
        elif tag == "table":
            self.tables.append([])
            self.values.append([])
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.cells.append((found.get("class") or "", ""))
        elif tag == "data":
            self.values[-1].append(int(found["value"] or ""))
        elif tag == "script":
            self.scripts.append((found, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        if tag == "script":
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data
        elif tag == "style":
            self.style += data
        else:
            self.texts[self._section] += data
            if "table" in self._open:
                if "caption" in self._open:
                    self.captions[-1] += data
                else:
                    self.tables[-1][-1][-1] += data
                    self.cells[-1] = self.cells[-1][0], self.cells[-1][1] + data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag]

    def table(self, first: str) -> list[list[str]]:
        """Return the table whose heading begins with a text."""
        return next(rows for rows in self.tables if rows[0][0] == first)
