"""Text out of a log for Markdown: in a comment on GitHub nothing of it becomes a tag, a link, a mention or a cell."""

from __future__ import annotations

import re

from devguard.support.terminal import cut, printable

__all__ = ["code_span", "prose"]

_SPECIAL = re.compile(r"[\\`*_{}\[\]~|$]")
_LINKS = re.compile(r"@|#(?=\d)|:(?=//)|(?<=www)\.", re.IGNORECASE)  # GitHub makes links of what follows them
_NO_LINK = "&#8203;"  # a space of no width


def code_span(text: object, columns: int = 200) -> str:
    """Return a text as a code span that also stays one inside a table, cut to a number of columns."""
    shown = cut(printable(text), columns)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or not shown.strip() else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def prose(text: object, columns: int = 500) -> str:
    """Return a text for the middle of a line of prose, cut to a number of columns."""
    shown = _SPECIAL.sub(r"\\\g<0>", cut(printable(text), columns)).replace("&", "&amp;").replace("<", "&lt;")
    return _LINKS.sub(rf"\g<0>{_NO_LINK}", shown)
