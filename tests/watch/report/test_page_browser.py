"""The page in a real browser: in light and dark, without an error on the console, with the numbers of the log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devguard.support.terminal import format_size
from devguard.watch.report import page
from devguard.watch.report.run import Run, read
from tests.helpers import browser
from tests.helpers.browser import Tab
from tests.helpers.journals import Log, make_run
from tests.watch.report.test_page import EVIL, contrast

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"there is no {' or '.join(browser.NAMES)} here: apt install chromium"
)
ROWS = "[...document.querySelectorAll('#matrix tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
TOTALS = "[...document.querySelector('#matrix tfoot tr').cells].slice(1).map(cell => Number(cell.firstChild.value))"
VALUES = "[...document.querySelectorAll('#matrix tbody data')].map(data => [Number(data.value), data.textContent])"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert PROGRAM is not None
    with browser.open_browser(PROGRAM, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(autouse=True)
def _settings(tab: Tab) -> Iterator[None]:
    yield
    tab.call("Emulation.setScriptExecutionDisabled", value=False)
    tab.call("Emulation.clearDeviceMetricsOverride")
    tab.call("Emulation.setEmulatedMedia", media="", features=[])


def show(tab: Tab, folder: Path, *runs: Run) -> None:
    file = folder / "report.html"
    titles = [""] if len(runs) == 1 else ["Before", "After"]
    file.write_text(page.render(list(zip(titles, runs, strict=True))), encoding="utf-8")
    tab.open(file)


def move_to(tab: Tab, moment: int) -> None:
    tab.run(
        f"(() => {{ const slider = document.querySelector('input'); slider.value = {moment};"
        "slider.dispatchEvent(new Event('input')); })()"
    )


def expected(run: Run, time: float) -> list[list[str]]:
    """Return the matrix of a run at a moment, by what its processes wrote."""
    rows = []
    for place in run.order():
        cells = run.tracks[place].cells(time)
        shown = [run.name(place), str(run.tracks[place].journal.process.pid), run.owner(place), "repair"]
        for column in run.columns():
            cell = cells.get(column.uuid)
            held = "" if cell is None or cell.bytes is None else f" {format_size(cell.bytes)}"
            shown.append("-" if cell is None else f"{cell.verdict}{held}")
        rows.append(shown)
    return rows


def colours(tab: Tab, selector: str) -> tuple[str, str]:
    """Return the colours of an element's text and ground, as the browser computes them."""
    found = tab.run(
        f"(() => {{ const style = getComputedStyle(document.querySelector({selector!r}));"
        "return [style.color, style.backgroundColor]; })()"
    )
    ink, ground = ("#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", each)[:3]) for each in found)
    return ink, ground


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_shown_without_an_error(tab: Tab, tmp_path: Path, theme: str) -> None:
    run = read(make_run(tmp_path / "run"))
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    show(tab, tmp_path, run)
    assert tab.problems == []
    assert tab.requests == [(tmp_path / "report.html").as_uri()]
    assert tab.run(ROWS) == expected(run, run.history.worst.time)
    ink, ground = colours(tab, "body")
    assert (ground < "#808080") == (theme == "dark")
    assert contrast(ink, ground) >= 7
    for selector in ("td.stray", "td.own", "td.ctx", ".verdict"):
        assert contrast(*colours(tab, selector)) >= 4.5, selector
    # The drawing follows the theme, and its strays have stripes.
    fills = "[...document.querySelectorAll('.chart .layer')].map(path => getComputedStyle(path).fill)"
    assert 'url("#stripes")' in tab.run(fills)
    fill, ink = tab.run(
        "['.chart text', 'body'].map(each => getComputedStyle(document.querySelector(each)))"
        ".map((style, place) => place ? style.color : style.fill)"
    )
    assert fill == ink


def test_an_error_would_be_seen(tab: Tab, tmp_path: Path) -> None:
    source = page.render([("", read(make_run(tmp_path / "run")))])
    file = tmp_path / "report.html"
    for harm in ("<p style='color: red'>", "<script>alert(1)</script>", "<img src='x.png'>"):
        file.write_text(source.replace("<main", f"{harm}<main"), encoding="utf-8")
        tab.open(file)
        assert any("Content Security Policy" in problem for problem in tab.problems), harm
    file.write_text(source.replace("<form", "<p").replace("</form>", "</p>"), encoding="utf-8")
    tab.open(file)
    assert "TypeError" in str(tab.problems)


def test_the_slider_moves_the_matrix_through_every_moment(tab: Tab, tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run"))
    show(tab, tmp_path, run)
    assert tab.run("document.querySelector('form').hidden") is False
    times = run.history.moments(1000)
    assert tab.run("Number(document.querySelector('input').max)") == len(times) - 1
    for moment in (*range(len(times)), 0, len(times) - 1):
        move_to(tab, moment)
        assert tab.run(ROWS) == expected(run, times[moment])
        held = [run.tracks[place].cells(times[moment]) for place in range(len(run.tracks))]
        assert tab.run(TOTALS) == [
            sum(cells[column.uuid].bytes or 0 for cells in held if column.uuid in cells) for column in run.columns()
        ]
        assert tab.run("document.querySelector('#matrix caption').textContent").endswith("after the start") != (
            times[moment] == run.history.worst.time
        )
    tab.run("document.querySelector('button').click()")
    assert tab.run(ROWS) == expected(run, run.history.worst.time)
    assert tab.problems == []


def test_the_slider_moves_by_keyboard(tab: Tab, tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run"))
    show(tab, tmp_path, run)
    times = run.history.moments(1000)
    tab.run("document.querySelector('input').focus()")
    tab.press("ArrowLeft", 37)
    before = times[times.index(run.history.worst.time) - 1]
    assert tab.run(ROWS) == expected(run, before)
    assert "after the start" in tab.run("document.querySelector('input').getAttribute('aria-valuetext')")
    tab.press("Home", 36)
    assert tab.run(ROWS) == expected(run, times[0])


def test_sizes_are_written_as_everywhere_else(tab: Tab, tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    exact = [0, 1, 1023, 1024, 1 << 20, (1 << 20) - 1, 1 << 40, 1 << 45]
    halves = [power * quarter // 20 for power in (1 << 20, 1 << 30, 1 << 40) for quarter in (21, 23, 25, 27, 29, 5015)]
    ties = [(1 << 30) + (1 << 28), (1 << 30) + 3 * (1 << 28), (1 << 20) * 3 // 4 + (5 << 20), 1280, 1792]
    for number, size in enumerate([*exact, *halves, *ties]):
        log.sample(2.0 + number, {"cuda:1": size})
    run = read(tmp_path)
    show(tab, tmp_path, run)
    seen = []
    for moment in range(len(run.history.moments(1000))):
        move_to(tab, moment)
        seen += tab.run(VALUES)
    assert {size for size, _ in seen} == {*exact, *halves, *ties}
    assert [text for _, text in seen] == [format_size(size) for size, _ in seen]


def test_with_scripts_off_all_but_the_slider_is_there(tab: Tab, tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run"))
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    show(tab, tmp_path, run)
    tab.call("Emulation.setScriptExecutionDisabled", value=False)  # to ask the page; its script has not run
    assert tab.run("document.querySelector('form').hidden") is True
    assert tab.run("getComputedStyle(document.querySelector('form')).display") == "none"
    assert tab.run(ROWS) == expected(run, run.history.worst.time)
    assert tab.problems == []


def test_nothing_in_a_log_runs(tab: Tab, tmp_path: Path) -> None:
    log = Log(tmp_path, 1, command=f"python {EVIL}", RANK=EVIL, host=EVIL)
    log.state(1.0, EVIL, [EVIL, "cuda:0"], gpus={EVIL: EVIL}, said_by=f"SGLang {EVIL}", process_mode=EVIL)
    log.stray(2.0, EVIL, EVIL, door=EVIL, action=EVIL, site={"file": f"/{EVIL}.py", "line": 3, "function": EVIL})
    log.sample(3.0, {EVIL: 5, "cuda:0": 7}, arenas=[{EVIL: EVIL}])
    log.alert(EVIL)
    log.end(4.0)
    show(tab, tmp_path, read(tmp_path))
    for moment in range(tab.run("Number(document.querySelector('input').max)") + 1):
        move_to(tab, moment)
    assert tab.problems == []
    assert len(tab.requests) == 1
    assert tab.run("document.images.length") == 0
    assert "onerror=alert(2)" in tab.run("document.body.textContent")


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_the_page_is_as_wide_as_the_screen(tab: Tab, tmp_path: Path, width: int) -> None:
    run = read(make_run(tmp_path / "run"))
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    show(tab, tmp_path, run, run)
    assert tab.run("document.documentElement.scrollWidth") <= width
    tops = tab.run("[...document.querySelectorAll('#matrix .run')].map(run => run.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width == 1600)  # side by side where there is room
    move_to(tab, 0)  # the slider of the first run moves that one alone
    assert tab.run(ROWS)[4:] == expected(run, run.history.worst.time)
    assert tab.run(ROWS)[:4] == expected(run, run.history.moments(1000)[0])


def test_the_page_prints(tab: Tab, tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run"))
    show(tab, tmp_path, run)
    tab.call("Emulation.setEmulatedMedia", media="print")
    hidden = "['form', 'nav'].map(name => getComputedStyle(document.querySelector(name)).display)"
    assert tab.run(hidden) == ["none", "none"]
    found: dict[str, Any] = tab.call("Page.printToPDF", printBackground=True)
    assert found["data"].startswith("JVBERi0")  # %PDF-
