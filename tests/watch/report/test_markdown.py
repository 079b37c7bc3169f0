"""The report as Markdown."""

from __future__ import annotations

import re
from pathlib import Path

from devguard.watch.report.markdown import render
from devguard.watch.report.run import read
from tests.helpers.journals import Log, make_run


def test_a_comment_has_the_verdict_the_matrix_and_the_lines(tmp_path: Path) -> None:
    lines = render([("", read(make_run(tmp_path / "run")))]).splitlines()
    assert lines[:5] == [
        "## ✗ GPUs of `run`",
        "",
        "**2 of 4 processes put up to 7.0 MiB and 2 contexts on GPUs that are not theirs; 8 strays at 1 line: "
        "3 observed, 5 repaired.**",
        "",
        lines[4],
    ]
    assert lines[4].endswith("6.0 s after the start (the worst moment):")
    assert lines[6:12] == [
        "| process | pid | owner | GPU 0 | GPU 1 | GPU 2 | GPU 3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `rank 0 serve.py` | 10 | cuda:0 | own 100.0 MiB | - | - | - |",
        "| `rank 1 serve.py` | 11 | cuda:1 | **STRAY 7.0 MiB** | own 210.0 MiB | - | - |",
        "| `rank 2 serve.py` | 12 | cuda:2 | **ctx 0 B** | - | own 300.0 MiB | - |",
        "| `rank 3 serve.py` | 13 | cuda:3 | - | - | - | own 400.0 MiB |",
    ]
    assert (
        "| 3.0 MiB | 3 | load | cuda:0 | observed | `/srv/train.py:7 in main` | The bytes carry the sender's device. "
        "Pass map\\_location, or send CPU tensors. |"
    ) in lines
    assert any("killed by SIGKILL" in line for line in lines)


def test_nothing_in_a_log_has_a_meaning(tmp_path: Path) -> None:
    evil = "`<b>|@user #1 [x](http://e) ![i](j) \n| a |"
    log = Log(tmp_path, 1, command=f"python {evil}")
    log.state(1.0, evil, ["cuda:0"], said_by=f"SGLang {evil}")
    log.stray(2.0, evil, evil, door=evil, action=evil, site={"file": evil, "line": 3, "function": evil})
    log.alert(evil)
    log.end(3.0)
    shown = render([(evil, read(tmp_path))])
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [5, 5, 5, 8, 8, 8]
    outside = re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", shown)
    assert re.findall(r"</?\w+>", outside) == ["<details>", "<summary>", "</summary>", "</details>"]
    assert not re.search(r"@\w|#\d|://|(?<!\\)[\[\]*`]", outside.replace("**", "").replace("&#8203;", "\u200b"))


def test_long_tables_are_cut(tmp_path: Path) -> None:
    for pid in range(1, 50):
        log = Log(tmp_path, pid, pid / 100)
        log.state(1.0, "cuda:0", ["cuda:0"])
        log.stray(1.0, site={"file": "/a.py", "line": pid, "function": "f"})
        log.end(2.0)
    shown = render([("", read(tmp_path))])
    assert "Not shown: 17 more processes." in shown
    assert "Not shown: 39 more lines." in shown
    assert len(shown) < 20_000


def test_a_run_without_gpus(tmp_path: Path) -> None:
    Log(tmp_path, 1).state(1.0, "cpu", [])
    assert "No process held anything on a GPU." in render([("", read(tmp_path))])
