"""The lines below the table."""

from __future__ import annotations

from typing import Any

from devguard.watch.matrix import Line, Matrix
from devguard.watch.screen.footer import MOST_LINES, draw_footer
from tests.watch.screen.test_table import gpus, rank
from tests.watch.test_matrix import site


def text(width: int = 160, **known: Any) -> list[str]:
    details = known.pop("details", None)
    rows = known.pop("rows", (rank(0),))
    found = draw_footer(Matrix(100.0, gpus(2), rows, **known), width, details)
    return ["".join(span.text for span in line) for line in found if line]


def test_a_healthy_run_has_nothing_below() -> None:
    assert text() == []


def test_the_worst_lines_are_named_with_bytes_count_door_devices_and_process() -> None:
    row = rank(0)
    (line,) = text(lines=(Line(row, site(nbytes=2048)), Line(row, site(action="repaired"))))
    assert line == "worst     2.0 KiB  1 x  load: cuda:0 -> cuda:1 [observed]  train.py:3 in main  (rank 0 train.py)"


def test_more_lines_are_counted() -> None:
    row = rank(0)
    found = text(lines=tuple(Line(row, site(str(n), nbytes=n)) for n in range(MOST_LINES + 3)))
    assert (len(found), found[-1].split()) == (MOST_LINES + 1, ["and", "3", "more:", "devguard", "log"])


def test_one_line_of_code_in_several_processes_stands_once() -> None:
    lines = (Line(rank(0), site(nbytes=1024)), Line(rank(1), site(nbytes=1024)), Line(rank(2), site("ipc", nbytes=9)))
    first, second = text(200, lines=lines, rows=(rank(0),))
    assert first.startswith("worst     2.0 KiB  2 x  load: cuda:0 -> cuda:1 [observed]  train.py:3 in main  (")
    assert first.endswith("(rank 0 train.py and 1 more)")
    assert "ipc" in second


def test_the_lines_of_one_process_are_all_of_its_lines() -> None:
    first, second = rank(0), rank(1)
    lines = (Line(first, site()), Line(second, site(action="repaired")))
    assert len(text(lines=lines, rows=(first, second), details=second.pid)) == 1
    assert text(details=7) == ["pid 7 has recorded no stray"]


def test_a_fault_that_no_door_saw_is_said_to_be_one() -> None:
    strayed = rank(1, (0, "STRAY", 5))
    assert text(rows=(strayed,)) == ["no door saw how pid 41201 got there: the program or a library names that GPU"]
    assert "no door" not in "".join(text(rows=(strayed,), lines=(Line(strayed, site()),)))


def test_an_arena_shows_its_budget_and_its_oldest_lease() -> None:
    arena = {"in_use": 1 << 20, "budget": 1 << 30, "peak": 2 << 20, "waiting": 1}
    oldest = {"put_at": 98.5, "site": "serve.py:7"}
    (line,) = text(arenas=((rank(0), {**arena, "oldest": oldest}),))
    assert line == (
        "arena   rank 0 train.py: in use 1.0 MiB of 1.0 GiB, peak 2.0 MiB, 1 waiting; oldest 1.5 s, put at serve.py:7"
    )
    assert "oldest" not in text(arenas=((rank(0), arena),))[0]


def test_what_is_no_arena_is_left_out_and_nothing_is_wider_than_the_terminal() -> None:
    assert text(arenas=((rank(0), {"in_use": "x"}), (rank(0), {}))) == []
    shown = text(40, lines=(Line(rank(0), site()),), notes=("\x1b[2J" + "x" * 100,))
    assert all(len(line) <= 40 and line.isprintable() for line in shown)


def test_a_note_is_shown_in_full() -> None:
    note = "NVML cannot be used: no library. Is there an NVIDIA driver on this machine?"
    shown = text(40, notes=(note,))
    assert " ".join(shown) == note
    assert max(map(len, shown)) <= 40
