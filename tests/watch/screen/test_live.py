"""The live screen without a terminal: what it shows, and what each key does."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devguard.watch.matrix import Line, Matrix
from devguard.watch.screen.live import Screen, to_text
from devguard.watch.screen.spans import Span
from tests.helpers.terminal_job import Terminal
from tests.watch.screen.test_table import gpus, rank
from tests.watch.test_matrix import site


def screen(*rows: Any, lines: tuple[Line, ...] = (), **options: Any) -> Screen:
    found = Screen("job", 1.0, **options)
    found.take(Matrix(0.0, gpus(2), rows or (rank(0, gpus=2), rank(1, gpus=2)), lines))
    return found


def text(shown: Screen, width: int = 120, height: int = 30) -> list[str]:
    return ["".join(span.text for span in line).rstrip() for line in shown.lines(width, height)]


def pids(shown: Screen) -> list[str]:
    return [word for line in text(shown) if (word := line.replace(">", "").split(" ")[0].strip()).startswith("412")]


def test_it_has_a_head_the_table_and_the_keys() -> None:
    found = text(screen())
    assert found[0].startswith("job   2 guarded of 2 processes, 2 GPUs")
    assert any("41201" in line for line in found)
    assert found[-1].startswith("q quit")
    assert text(Screen("job", 1.0)) == ["looking ..."]


def test_it_fits_the_terminal() -> None:
    shown = screen(*(rank(n, (0, "STRAY", 1), strays=1) for n in range(50)))
    for width, height in ((120, 30), (80, 10), (40, 5)):
        found = text(shown, width, height)
        assert len(found) <= height
        assert max(map(len, found)) <= width


def test_q_and_ctrl_c_end_it_and_other_keys_do_not() -> None:
    for key, ends in (("q", True), ("\x03", True), ("x", False), ("\x1b[Z", False), ("\r", False)):
        shown = screen()
        shown.press(key)
        assert shown.is_done is ends


def test_p_keeps_the_picture_but_not_the_history() -> None:
    shown = screen()
    shown.press("p")
    shown.take(Matrix(0.0, gpus(2), ()))
    assert len(pids(shown)) == 2
    assert "PAUSED" in text(shown)[0]
    assert len(shown.history["uuid-0"]) == 2
    shown.press("p")
    shown.take(Matrix(0.0, gpus(2), ()))
    assert pids(shown) == []


def test_s_sorts_by_bytes_strays_pid_and_again_by_owner() -> None:
    big = rank(1, (0, "STRAY", 1 << 50), gpus=2)
    shown = screen(rank(0, gpus=2), big, rank(2, strays=3, gpus=2))
    orders = []
    for _ in range(5):
        orders.append("".join(pid[-1] for pid in pids(shown)))
        shown.press("s")
    assert orders == ["012", "102", "201", "012", "012"]


def test_the_cursor_moves_among_processes_with_strays_and_enter_lists_their_lines() -> None:
    rows = (rank(0), rank(1, strays=1), rank(2, strays=1))
    shown = screen(*rows, lines=(Line(rows[1], site()), Line(rows[2], site(nbytes=9999))))
    shown.press("\x1b[B")
    shown.press("j")
    assert any(line.startswith("> 41202") for line in text(shown))
    shown.press("k")
    assert any(line.startswith("> 41201") for line in text(shown))
    shown.press("\r")
    (line,) = [line for line in text(shown) if "train.py:3" in line]
    assert line.startswith("pid 41201")
    shown.press("\n")
    (line,) = [line for line in text(shown) if "train.py:3" in line]
    assert line.startswith("worst")


def test_the_end_of_the_programs_output_is_shown(tmp_path: Path) -> None:
    output = tmp_path / "output"
    shown = screen(output=output)
    assert "step 9" not in "".join(text(shown))
    output.write_bytes(b"x" * 9000 + b"\nstep 8\nstep\x1b[2J 9\n")
    assert text(shown)[-3:-1] == ["step 8", "step\\x1b[2J 9"]


def test_text_for_rich_has_the_styles() -> None:
    found = to_text([[Span("a", "red"), Span("b")], [Span("c")]])
    assert (found.plain, str(found.spans[0].style)) == ("ab\nc", "red")


def test_the_picture_of_the_screen_has_the_words_of_the_text() -> None:
    from rich.console import Console

    console = Console(record=True, width=120, file=io.StringIO())
    shown = screen(rank(0, gpus=2), rank(1, (0, "STRAY", 5 << 30), strays=1, gpus=2))
    console.print(to_text(shown.lines(120, 30)))
    picture = console.export_svg()
    for word in ("STRAY", "41201", "GPU"):
        assert word in picture


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_on_a_terminal_it_runs_until_q_and_restores_the_terminal() -> None:
    code = (
        "from tests.watch.screen.test_live import screen, gpus\n"
        "from devguard.watch.matrix import Matrix\n"
        "screen().run(lambda: Matrix(0.0, gpus(2), ()))\nprint('over')"
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""
    while b"no process is on a GPU" not in seen:
        seen += os.read(controller, 4096)
    os.write(controller, b"q")
    while b"over" not in seen:
        seen += os.read(controller, 4096)
    assert process.wait(30) == 0
    assert b"\x1b[?1049l" in seen  # the other screen is back
    os.close(controller)


def test_ctrl_z_gives_the_terminal_back_until_the_program_goes_on(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with Terminal([sys.executable, "-m", "devguard", "watch", str(tmp_path / "empty")], TERM="xterm") as terminal:
        terminal.wait_for("q quit")
        terminal.type(b"\x1a")
        before = terminal.wait_for(f"[stopped {int(signal.SIGTSTP)}]")
        assert before.rindex("\x1b[?1049l") > before.rfind("\x1b[?1049h")
        terminal.wait_for("\x1b[?1049h")
        terminal.type(b"sj\x1bOAq")  # at once, as over a slow line
        terminal.wait_for("[ended 0]")
