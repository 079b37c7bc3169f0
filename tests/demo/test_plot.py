"""The chart of the demonstration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devguard import ConfigError
from devguard.demo import plot
from tests.demo.results import hosted, result


def test_the_chart_names_every_process_and_both_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    target = tmp_path / "chart.svg"
    plot.draw(result(3), str(target))
    text = target.read_text()
    for words in ("tokenizer", "rank 2", "GPU 2", "Before: unguarded", "76 MiB, 2 contexts", "0 MiB, 0 contexts"):
        assert words in text
    assert text.count(f"stroke: {plot.STRAY}") == 2 + 1  # the strays of ranks 1 and 2, and the legend


def test_the_chart_of_the_host_transport_names_what_sending_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    target = tmp_path / "chart.svg"
    plot.draw(hosted(4), str(target))
    text = target.read_text()
    for words in (
        "After: @devguard.guard, one copy in host memory",
        "peaks: GPU 0 172 MiB, host 180 MiB, /dev/shm 0 MiB",
        "copies: 90 MiB to the host, 143 MiB to the GPUs",
    ):
        assert words in text


def test_a_chart_without_strays_has_no_marked_cell(tmp_path: Path) -> None:
    found = result(2)
    found["unguarded"] = found["guarded"]
    target = tmp_path / "chart.svg"
    plot.draw(found, str(target))
    assert target.read_text().count(f"stroke: {plot.STRAY}") == 1  # the legend


@pytest.mark.parametrize("name", ["chart.png", "CHART.SVG", "chart.pdf"])
def test_each_format_is_accepted(tmp_path: Path, name: str) -> None:
    plot.check(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"torch-devguard\[demo\]"):
        plot.check(str(tmp_path / "chart.png"))


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "chart.png").mkdir()
    with pytest.raises(ConfigError, match="cannot write it"):
        plot.draw(result(2), str(tmp_path / "chart.png"))
