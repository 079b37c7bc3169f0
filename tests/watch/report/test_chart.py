"""The drawing: as much as the numbers say, in classes of the page's style sheet."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from devguard.watch.report import chart
from devguard.watch.report.layers import stack
from devguard.watch.report.run import Run, read
from tests.helpers.journals import MIB, START, Log, make_run


def draw(run: Run, top: int) -> ElementTree.Element:
    history = run.history
    stacks = stack(run, run.columns(), 100, 6)
    found = chart.draw(stacks, history.first, history.last, history.worst.time, top)
    assert found is not None
    return ElementTree.fromstring(found)


def corners(path: str) -> list[tuple[float, float]]:
    """Return the points of a path with relative steps."""
    x, y = 0.0, 0.0
    points = []
    for kind, one, other in re.findall(r"([Mlhv])(-?[\d.]+)(?: (-?[\d.]+))?", path):
        if kind == "M":
            x, y = float(one), float(other)
        elif kind == "l":
            x, y = x + float(one), y + float(other)
        elif kind == "h":
            x += float(one)
        else:
            y += float(one)
        points.append((x, y))
    return points


def test_the_height_of_a_layer_is_the_memory_below_it(tmp_path: Path) -> None:
    run = read(make_run(tmp_path))
    drawing = draw(run, 400 * MIB)
    layers = [(path.get("class"), corners(path.get("d") or "")) for path in drawing.iter("path")]
    shown = [(name, points) for name, points in layers if name and name.startswith("layer")]
    assert [name for name, _ in shown] == [
        "layer stray shade-0",
        "layer own shade-0",
        "layer own shade-0",
        "layer own shade-0",
        "layer own shade-0",
    ]
    heights = [max(y for _, y in points) - min(y for _, y in points) for _, points in shown]
    unit = heights[-1] / 400  # the last one holds 400 MiB
    assert heights == pytest.approx([107 * unit, 100 * unit, 210 * unit, 300 * unit, 400 * unit], abs=0.15)
    # Time is linear: the strays begin at 4 s of 10 s and reach to the end.
    axis = next(points for name, points in layers if name == "axis" and points[0][1] == points[-1][1])
    start, width = axis[0][0], axis[-1][0] - axis[0][0]
    stray = shown[0][1]
    steps = sorted({round((x - start) / width * 10, 1) for x, _ in stray})
    assert {2.0, 4.0, 6.0, 8.0, 10.0} <= set(steps)
    mark = next(points for name, points in layers if name == "mark")
    assert (mark[0][0] - start) / width * 10 == pytest.approx(6.0, abs=0.05)


def test_text_is_text(tmp_path: Path) -> None:
    texts = [text.text for text in draw(read(make_run(tmp_path)), 400 * MIB).iter("text")]
    assert "GPU 0, MiB" in texts
    assert "seconds since the start; the dashed line marks the moment of the table above" in texts


@pytest.mark.parametrize(
    ("length", "top", "words"),
    [(10.0, 5, ("seconds", "MiB")), (600.0, 5 << 30, ("minutes", "GiB")), (40000.0, 1 << 40, ("hours", "GiB"))],
)
def test_the_units_suit_the_numbers(tmp_path: Path, length: float, top: int, words: tuple[str, str]) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    log.sample(length, {"cuda:1": top})
    texts = " ".join(text.text or "" for text in draw(read(tmp_path), top).iter("text"))
    assert all(word in texts for word in words)


def test_a_strange_name_of_a_gpu_is_no_formula(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", [r"cuda:$\frac{"], gpus={})
    log.sample(2.0, {r"cuda:$\frac{": 5})
    assert r"cuda:$\frac{, MiB" in [text.text for text in draw(read(tmp_path), 5).iter("text")]


def test_without_matplotlib_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert chart.draw([], START, START, START, 1) is None
