"""The printed report and the chart, from a made-up result."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from devguard.demo import plot, report
from devguard.errors import ConfigError
from tests.demo.results import hosted, result


def print_report(found) -> str:
    console = Console(file=io.StringIO(), width=160)
    report.show(found, console)
    return console.file.getvalue()


def test_a_result_is_clean_if_the_guarded_pass_is_clean():
    assert report.is_clean(result())


@pytest.mark.parametrize(("key", "value"), [("stray_bytes", 1), ("stray_contexts", 1), ("values_equal", False)])
def test_a_result_with_a_stray_or_a_wrong_value_is_not_clean(key, value):
    found = result()
    found["guarded"][key] = value
    assert not report.is_clean(found)
    assert "The guarded pass was NOT clean" in report.explain(found)


def test_a_result_with_a_wrong_owner_is_not_clean():
    found = result()
    found["guarded"]["processes"][2]["owner"] = "cuda:0"
    assert not report.is_clean(found)


def test_the_report_shows_both_tables_the_lines_and_the_totals():
    text = print_report(result())
    assert "Before: unguarded" in text
    assert 'After: @devguard.guard(argument="gpu_id")' in text
    assert text.count("● 38 MiB !") == 3
    assert "server.py:43" in text
    assert "return pickle.loads(message)" in text
    assert "Ranks > 0 on GPU 0, before: 114 MiB, 3 contexts; 8 of 8 answers right." in text
    assert "Ranks > 0 on GPU 0, after: 0 MiB, 0 contexts; 8 of 8 answers right." in text
    assert "Simulated GPUs (torch sees no GPU here), torch 2.13.0+cu130." in text


def test_the_report_of_the_host_transport_shows_what_sending_costs():
    found = hosted()
    assert report.is_clean(found)
    lines = [[cell.strip() for cell in line.split("│")] for line in print_report(found).splitlines()]
    cells = {cell[1]: cell[2:4] for cell in lines if len(cell) == 5}
    assert cells["tensor-parallel: copies GPU to host"] == ["2 x 18 MiB", "1 x 18 MiB"]
    assert cells["data-parallel: copies host to GPU"] == ["8 x 18 MiB", "4 x 18 MiB"]
    assert cells["GPU 0, all processes, peak"] == ["172 MiB", "58 MiB"]
    assert cells["CUDA contexts, all GPUs"] == ["8", "5"]
    assert cells["host memory, peak while sending"] == ["180 MiB", "36 MiB"]
    assert cells["/dev/shm, peak while sending"] == ["0 MiB", "0 MiB"]
    assert "the tokenizer copies each request to the host once" in report.explain(found)


def test_the_report_without_costs_has_no_table_of_them():
    assert "What sending the request costs" not in print_report(result())


def test_a_result_with_a_copy_too_many_is_not_clean():
    found = hosted()
    found["guarded"]["costs"]["copies"]["tensor-parallel"]["down"] *= 2
    assert not report.is_clean(found)


def test_on_real_gpus_nothing_counts_copies():
    found = hosted()
    for name in ("unguarded", "guarded"):
        found[name]["costs"]["copies"] = None
    assert report.is_clean(found)
    text = print_report(found)
    assert "copies GPU to host" not in text
    assert "host memory, peak while sending" in text


def test_the_strays_of_all_ranks_at_one_line_are_merged():
    rows = report.group_by_site(result()["guarded"])
    assert [(row["site"]["line"], row["count"], len(row["moves"])) for row in rows] == [(43, 6, 3), (73, 6, 3)]


def test_a_stray_without_a_call_site_is_shown():
    found = result()
    for process in found["guarded"]["processes"]:
        for row in process["strays"]:
            row["site"], row["code"] = None, ""
    assert "no line of user code" in print_report(found)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (512, "0.0"), (3 << 19, "1.5"), (2 << 20, "2"), (39845888, "38")]
)
def test_bytes_are_shown_as_mebibytes(count, text):
    assert report.format_mebibytes(count) == text


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_chart_is_a_readable_picture(tmp_path, ranks):
    target = tmp_path / "chart.png"
    plot.check(str(target))
    plot.draw(result(ranks), str(target))
    with Image.open(target) as picture:
        assert picture.width > 1200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize(
    ("name", "message"), [("chart.txt", "must end in"), ("nowhere/chart.png", "there is no directory")]
)
def test_a_chart_that_cannot_be_written_is_refused_by_check(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        plot.check(str(tmp_path / name))
