"""HTML from plain data. All text is escaped unless it is `Html` already, and so are characters that do not print.

A log may hold anything: tags in file names, and characters that change the direction of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from html import escape

from devguard.support.terminal import cut, format_size, printable

__all__ = ["element", "Html", "join", "LONGEST", "moment", "number", "scroll", "size", "table", "text"]

LONGEST = 500  # characters of one text out of a log
_EMPTY = ("input",)


class Html(str):
    """A piece of HTML, which is not escaped again."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return a text, escaped; a very long one is cut."""
    return value if type(value) is Html else Html(escape(cut(printable(value), LONGEST)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Return pieces in a row, with a text between them."""
    return Html(escape(between).join(map(text, parts)))


def element(name: str, *children: object, **attributes: object) -> Html:
    """Return an element.

    Parameters
    ----------
    name : str
        Its tag.
    *children : object
        Its content.
    **attributes : object
        ``class_`` is the class, ``data_x`` is ``data-x``; one that is None or False is left out, True has no value.
    """
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            word = key.rstrip("_").replace("_", "-")
            written += f" {word}" if value is True else f' {word}="{escape(printable(value))}"'
    return Html(f"<{name}{written}>" if name in _EMPTY else f"<{name}{written}>{join(children)}</{name}>")


def number(value: int) -> Html:
    """Return a number, which programs can read."""
    return element("data", f"{value:,}", value=value)


def size(nbytes: int | None, unknown: str = "not known") -> Html:
    """Return a number of bytes for people; programs can read the exact one."""
    return text(unknown) if nbytes is None else element("data", format_size(nbytes), value=nbytes)


def moment(time: float, *, date: bool = False) -> Html:
    """Return a moment, in seconds since 1970, in the local time of the machine that makes the report."""
    if not time:
        return text("not known")
    try:
        local = datetime.fromtimestamp(time).astimezone()
    except (ValueError, OverflowError, OSError):  # no year of four digits
        return text(f"{time:.0f} s after 1970")
    shown = local.strftime("%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S")
    return element("time", shown, datetime=local.isoformat(timespec="milliseconds"))


def table(caption: object, heads: Iterable[object], rows: Iterable[Iterable[object]], **attributes: object) -> Html:
    """Return a table; its first column names the rows. A cell that is a finished ``td`` or ``th`` stays as it is."""
    head = element("tr", *(element("th", each, scope="col") for each in heads))
    body = []
    for cells in rows:
        first, *others = cells
        body.append(element("tr", _cell("th", first), *(_cell("td", each) for each in others)))
    parts = element("caption", caption), element("thead", head), element("tbody", *body)
    return scroll(element("table", *parts, **attributes), caption)


def scroll(inner: Html, label: object) -> Html:
    """Return a part that scrolls to the side where it is wider than the screen, also by keyboard."""
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def _cell(name: str, value: object) -> Html:
    if isinstance(value, Html) and value.startswith((f"<{name} ", f"<{name}>")):
        return value
    return element(name, value, scope="row" if name == "th" else None)
