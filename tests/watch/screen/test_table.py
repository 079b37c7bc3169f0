"""The matrix as lines of text: nothing is wider than the terminal, and faults are never folded."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devguard.support.terminal import columns_of
from devguard.watch.cells import Cell, Verdict
from devguard.watch.matrix import Column, Line, Matrix, Row
from devguard.watch.screen.table import draw, sparkline
from tests.watch.test_matrix import site

GIB = 1 << 30


def gpus(count: int) -> tuple[Column, ...]:
    return tuple(Column(str(n), f"uuid-{n}", "H100", 58 * GIB + n, 80 * GIB) for n in range(count))


def rank(number: int, *held: tuple[int, Verdict, int], strays: int = 0, gpus: int = 8) -> Row:
    cells = {f"uuid-{number % gpus}": Cell("own", 57 * GIB, True)}
    cells |= {f"uuid-{gpu}": Cell(verdict, nbytes, True) for gpu, verdict, nbytes in held}
    owner = f"cuda:{number % gpus}"
    return Row(41200 + number, f"rank {number} train.py", owner, "observe", True, True, cells, strays)


def text(matrix: Matrix, width: int = 200, **options: object) -> list[str]:
    return ["".join(span.text for span in line).rstrip() for line in draw(matrix, width, **options)]  # type: ignore[arg-type]


def test_each_process_has_a_line_with_its_cells() -> None:
    rows = (rank(0), rank(1, (0, "STRAY", 5 * GIB), strays=2))
    lines = text(Matrix(0.0, gpus(2), rows))
    assert [line.split() for line in lines[:5]] == [
        ["GPU", "0", "GPU", "1"],
        ["used", "/", "total", *["58.0", "GiB", "/", "80.0", "GiB"] * 2],
        ["pid", "process", "owner", "mode"],
        ["41200", "rank", "0", "train.py", "cuda:0", "observe", "own", "57.0", "GiB", "-"],
        ["41201", "rank", "1", "train.py", "cuda:1", "observe", "STRAY", "5.0", "GiB", "own", "57.0", "GiB", "!", "2"],
    ]
    starts = [[line.index("GPU 1") for line in lines[:1]], [lines[4].index("own 57")]]
    assert starts[0] == starts[1]  # columns are aligned


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24)])
def test_64_processes_on_8_gpus_fit_and_show_every_fault(width: int, height: int) -> None:
    rows = tuple(
        rank(n, *([(0, "STRAY", GIB)] if n == 13 else [(2, "ctx", GIB // 2)] if n == 20 else [])) for n in range(64)
    )
    lines = text(Matrix(0.0, gpus(8), rows), width, height=height)
    assert len(lines) <= height
    assert max(map(columns_of, lines)) <= width
    (stray,) = [line for line in lines if "STRAY" in line]
    (context,) = [line for line in lines if "ctx" in line]
    assert stray.startswith("41213")
    assert context.startswith("41220")
    assert any("8 x rank * train.py" in line or "7 x rank * train.py" in line for line in lines)
    counts = [int(found) for line in lines for found in re.findall(r"(\d+) x ", line)]
    assert sum(counts) + 2 == 64


def test_healthy_gpus_share_a_column_where_there_is_no_room() -> None:
    rows = tuple(rank(n, *([(0, "STRAY", GIB)] if n == 5 else [])) for n in range(8))
    lines = text(Matrix(0.0, gpus(8), rows), 80)
    assert lines[0].split() == ["GPU", "0", "GPU", "1-7"] or "GPU 0" in lines[0]
    assert any("STRAY 1.0G" in line and "own 57.0G @5" in line for line in lines)
    assert max(map(columns_of, lines)) <= 80


CELLS = st.builds(
    Cell,
    st.sampled_from(["own", "STRAY", "ctx", "ipc", "allowed", "?"]),
    st.none() | st.integers(0, 1 << 44),
    st.booleans(),
)
ROWS = st.builds(
    Row,
    st.integers(1, 1 << 22),
    st.text(max_size=30),
    st.none() | st.sampled_from(["cpu", "cuda:0", "cuda:12"]),
    st.none() | st.just("observe"),
    st.booleans(),
    st.booleans(),
    st.dictionaries(st.sampled_from([f"uuid-{n}" for n in range(8)]), CELLS, max_size=8),
    st.integers(0, 5),
)


@given(st.lists(ROWS, max_size=40), st.integers(40, 200), st.integers(0, 60))
def test_whatever_the_processes_no_line_is_too_wide_and_no_fault_is_hidden(
    rows: list[Row], width: int, height: int
) -> None:
    lines = text(Matrix(0.0, gpus(8), tuple(rows)), width, height=height)
    assert all(columns_of(line) <= width for line in lines)
    faulty = sum(row.has_fault for row in rows)
    assert sum("STRAY" in line or "ctx" in line for line in lines) >= faulty or width < 60
    assert all(line.isprintable() for line in lines)


def test_a_wide_enough_terminal_shows_each_verdict_in_words() -> None:
    verdicts: list[Verdict] = ["own", "STRAY", "ctx", "ipc", "allowed", "?", "foreign"]
    cells = {f"uuid-{n}": Cell(verdict, None, False) for n, verdict in enumerate(verdicts)}
    line = text(Matrix(0.0, gpus(8), (Row(1, "x", None, None, False, True, cells),)))[3]
    assert line.split() == ["1", "x", "-", "-", *verdicts, "-"]


def test_a_gpu_that_cannot_be_read_says_so() -> None:
    broken = Column("1", "uuid-1", problem="GPU is lost")
    lines = text(Matrix(0.0, (*gpus(1), broken), (rank(0),), notes=("GPU 1 cannot be read: GPU is lost",)))
    assert "unreadable" in lines[1]
    assert "GPU 1 cannot be read: GPU is lost" in lines


def test_without_a_process_it_says_so() -> None:
    assert "no process is on a GPU" in text(Matrix(0.0, gpus(2), ()))[-1]


def test_the_order_and_the_cursor_are_the_users() -> None:
    rows = (rank(0), rank(1), rank(2))
    lines = text(Matrix(0.0, gpus(3), rows), order=lambda row: -row.pid, chosen=41201)
    assert [line.split()[0] for line in lines[3:]] == ["41202", ">", "41200"]


def test_the_lines_of_the_chosen_process_are_listed() -> None:
    first, second = rank(0), rank(1)
    lines = (Line(first, site(nbytes=1)), Line(second, site(nbytes=2, action="repaired")))
    shown = text(Matrix(0.0, gpus(2), (first, second), lines), chosen=41201, details=True)
    (line,) = [line for line in shown if "train.py:3" in line]
    assert line.split()[:2] == ["pid", "41201"]


@pytest.mark.parametrize(
    ("values", "total", "bars"),
    [([0, 50, 100], 100, "▁▅█"), ([1, 2], None, "▅█"), ([0, 0], None, ""), ([], 100, ""), ([200], 100, "█")],
)
def test_a_sparkline_reaches_the_top_at_the_total(values: list[int], total: int | None, bars: str) -> None:
    assert sparkline(values, total) == bars
