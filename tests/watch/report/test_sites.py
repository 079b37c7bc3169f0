"""The strays of all processes by line."""

from __future__ import annotations

import socket
from pathlib import Path

from devguard.logs import reader as log_reader
from devguard.watch.report.run import read
from tests.helpers.journals import START, Log

SITE = {"file": "/srv/a.py", "line": 3, "function": "f"}


def test_the_strays_at_a_line_are_those_of_all_processes(tmp_path: Path) -> None:
    for pid, rank in ((1, "0"), (2, None), (3, "1")):
        known = {} if rank is None else {"RANK": rank}
        log = Log(tmp_path, pid, pid, **known)
        log.state(5.0, f"cuda:{pid}", [], process_mode="observe" if pid == 3 else "repair")
        log.stray(
            10.0 - pid, "cuda:0", f"cuda:{pid}", site=SITE, count=pid, bytes=100 * pid, rank=rank, owner=f"cuda:{pid}"
        )
    (found,) = read(tmp_path).sites
    assert (found.count, found.bytes, found.first) == (6, 600, START + 7.0)
    assert found.devices == ["cuda:0 -> cuda:1", "cuda:0 -> cuda:2", "cuda:0 -> cuda:3"]
    assert found.processes == ["rank 0 serve.py (pid 1)", "serve.py (pid 2)", "rank 1 serve.py (pid 3)"]
    assert (found.owners, found.ranks, found.modes) == (
        ["cuda:1", "cuda:2", "cuda:3"],
        ["0", "1"],
        ["repair", "observe"],
    )
    # As `devguard log` merges them.
    ((merged,),) = log_reader.read(tmp_path)[1:2]
    assert (merged.count, merged.bytes, merged.devices, merged.owners, merged.ranks) == (
        found.count,
        found.bytes,
        found.devices,
        found.owners,
        found.ranks,
    )


def test_what_was_left_alone_comes_first_and_what_is_no_stray_last(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    for number, (action, nbytes) in enumerate(
        [("kept", 90), ("repaired", 80), ("observed", 1), ("warned", 2), ("refused", 0), ("placed", 0)]
    ):
        log.stray(1.0, "cuda:0", "cuda:0", action=action, bytes=nbytes, site={**SITE, "line": number})
    found = read(tmp_path).sites
    assert [(each.action, each.is_stray) for each in found] == [
        ("warned", True),
        ("observed", True),
        ("repaired", True),
        ("refused", True),
        ("kept", False),
        ("placed", False),
    ]
    assert "names that device itself" in found[4].advice


def test_the_line_is_quoted_where_the_log_is_of_this_machine(tmp_path: Path) -> None:
    source = tmp_path / "train.py"
    source.write_text("import torch\nx = torch.load(file)\n")
    site = {"file": str(source), "line": 2, "function": "<module>"}
    Log(tmp_path, 1, host=socket.gethostname()).stray(1e9, site=site)
    (found,) = read(tmp_path).sites
    assert (found.quote.text, found.quote.changed) == ("x = torch.load(file)", False)
    assert found.place == f"{source}:2 in <module>"
    Log(tmp_path, 2, host="elsewhere").stray(1e9, site=site)
    (found,) = read(tmp_path).sites
    assert found.quote.text == ""


def test_a_stray_without_a_line(tmp_path: Path) -> None:
    Log(tmp_path, 1).stray(1.0, site=None, door="native")
    (found,) = read(tmp_path).sites
    assert found.place == "no line of user code"
    assert "--trace-contexts" in found.advice
