"""Makes matplotlib's SVG fit for a page: classes instead of styles, short paths, and nothing else in it.

The page allows no styles in attributes, and sets its colours by classes, for light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from devguard.watch.report.markup import Html, element

__all__ = ["clean", "GRID"]

GRID = "#abcdef"  # a colour by which the lines of the grid are known
_SPACE = "{http://www.w3.org/2000/svg}"
_NUMBER = re.compile(r"-?\d+\.\d+")
_POINT = re.compile(r"([ML]) (-?[\d.]+) (-?[\d.]+)")


def clean(drawing: str, label: str) -> Html:
    """Return matplotlib's drawing as an ``svg`` element.

    Parameters
    ----------
    drawing : str
        The file that matplotlib wrote. The groups with names that it did not give itself become classes.
    label : str
        What the drawing shows, in words.
    """
    root = ElementTree.fromstring(drawing)
    return element("svg", *_parts(root, ""), viewBox=root.get("viewBox"), role="img", aria_label=label, class_="chart")


def _parts(node: ElementTree.Element, group: str) -> Iterator[Html]:
    """Yield what a node shows: paths and texts. Tick marks, frames and clip paths are left out."""
    for child in node:
        tag, style = child.tag.removeprefix(_SPACE), child.get("style", "")
        if tag == "g":
            name = child.get("id", "")
            yield from _parts(child, name if name.startswith(("layer", "mark")) else group)
        elif tag == "path":
            kind = group or ("grid" if GRID in style else "axis")
            if "#ffffff" not in style:
                yield element("path", class_=kind, d=_shorten(child.get("d", "")))
        elif tag == "text":
            anchor = re.search(r"text-anchor: (\w+)", style)
            turn = child.get("transform", "")
            place = {name: _round(child.get(name, "")) or None for name in ("x", "y")}
            yield element(
                "text",
                child.text or "",
                **place,
                transform=None if "rotate(-0" in turn else _round(turn),
                text_anchor=anchor[1] if anchor else None,
            )


def _round(numbers: str) -> str:
    return _NUMBER.sub(lambda found: f"{float(found[0]):.1f}", numbers)


def _shorten(path: str) -> str:
    """Return a path in tenths of a unit and in relative steps, of which those in one direction are one."""
    points = [(kind, round(float(x) * 10), round(float(y) * 10)) for kind, x, y in _POINT.findall(path)]
    steps: list[tuple[str, int, int]] = []
    at = 0, 0
    for kind, x, y in points:
        right, down = x - at[0], y - at[1]
        at = x, y
        if kind == "M":
            steps.append(("M", x, y))
        elif (right or down) and steps[-1][0] == "l" and _is_onward(steps[-1], right, down):
            steps[-1] = "l", steps[-1][1] + right, steps[-1][2] + down
        elif right or down:
            steps.append(("l", right, down))
    return "".join(map(_write, steps)) + ("z" if "z" in path else "")


def _is_onward(step: tuple[str, int, int], right: int, down: int) -> bool:
    """Return whether a further step goes in the same direction: straight on, along one axis."""
    _, before, below = step
    return (down == below == 0 and right * before > 0) or (right == before == 0 and down * below > 0)


def _write(step: tuple[str, int, int]) -> str:
    kind, right, down = step
    if kind == "l" and down == 0:
        return f"h{right / 10:g}"
    if kind == "l" and right == 0:
        return f"v{down / 10:g}"
    return f"{kind}{right / 10:g} {down / 10:g}"
