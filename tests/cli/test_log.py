"""What ``devguard log`` prints; tests/process/test_logs.py reads the logs of real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devguard import cli

SITE = {"file": "/srv/server.py", "line": 43, "function": "receive"}


def write_log(folder: Path, pid: int, **changes: Any) -> None:
    """Write the log of a process that strayed at one call site."""
    stray = {
        "stray": 0,
        "door": "load",
        "action": "repaired",
        "source": "cuda:0",
        "target": "cuda:1",
        "count": 2,
        "bytes": 3 << 20,
        "pid": pid,
        "site": SITE,
        "via": None,
        "note": None,
    }
    end = {"process_owner": "cuda:1", "owned": ["cuda:1"], "contexts": ["cuda:1"]}
    lines = [{"process": {"pid": pid, "host": "node7", "command": "serve"}}, stray | changes, {"end": end}]
    (folder / f"{pid}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    assert cli.main(["log", str(folder), *options]) == 0
    return capsys.readouterr().out


def test_each_call_site_is_shown_with_its_size_and_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7, via="joblib", note="a note")
    out = shown(capsys, tmp_path)
    assert out.startswith("1 process(es), 2 stray(s) at 1 call site(s), 3.0 MiB\n")
    assert "3.0 MiB  2 x  load: cuda:0 -> cuda:1 [repaired]" in out
    assert "at /srv/server.py:43 in receive (via joblib)" in out
    assert "a note" in out
    assert "node7" not in out


def test_a_stray_without_a_call_site_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7, site=None)
    assert "at no line of user code" in shown(capsys, tmp_path)


def test_a_long_list_of_processes_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pid in range(11, 22):
        write_log(tmp_path, pid)
    out = shown(capsys, tmp_path)
    assert "in pid 11, 12, 13, 14, 15, 16, 17, 18 and 3 more" in out
    assert "22 x  load" in out


def test_the_processes_are_listed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    assert "pid 7 on node7: owned cuda:1, contexts cuda:1\n    serve" in shown(capsys, tmp_path, "--processes")


def test_json_holds_the_processes_and_the_strays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 7)
    found = json.loads(shown(capsys, tmp_path, "--json"))
    assert [process["owner"] for process in found["processes"]] == ["cuda:1"]
    assert [(site["file"], site["line"], site["count"]) for site in found["strays"]] == [("/srv/server.py", 43, 2)]
    assert found["damaged"] == []
