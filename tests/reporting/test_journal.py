"""The journal: strays counted per call site, bounded, and exact across threads and forks."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import devguard
from devguard.ownership.stack import local
from devguard.reporting import journal
from devguard.reporting.journal import MAX_ROWS, Journal
from devguard.reporting.stray import Occurrence
from devguard.support import callsite
from tests.helpers import tagging
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))


def record(book: Journal, nbytes: int = 8) -> Any:
    """Record a stray at the line that calls this function."""
    return book.record(Occurrence("load", "cuda:0", "cuda:1", nbytes, sys._getframe(1)), "repaired", "cuda:1")


def made_site(number: int) -> Callable[..., Any]:
    """Return a function with code of its own, as in a program that generates code."""
    namespace: dict[str, Any] = {}
    exec(compile(f"def stray_{number}(record, book): return record(book)", f"made_{number}.py", "exec"), namespace)
    function: Callable[..., Any] = namespace[f"stray_{number}"]
    return function


def test_one_record_per_call_site_with_its_count_and_bytes() -> None:
    book = Journal()
    for nbytes in (1, 2, 3):
        record(book, nbytes=nbytes)
    record(book, nbytes=10)
    assert [(stray.count, stray.bytes) for stray in book.strays()] == [(3, 6), (1, 10)]
    assert book.total == 4


def test_strays_that_differ_in_door_device_or_action_have_separate_records() -> None:
    book = Journal()
    for door in ("load", "jit"):
        for source in ("cuda:0", "cuda:2"):
            for action in ("repaired", "observed"):
                book.record(Occurrence(door, source, "cuda:1", 1), action, "cuda:1")  # type: ignore[arg-type]
    assert len(book.strays()) == 8


def test_a_record_names_the_process_the_devices_and_the_call_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    book = Journal()
    occurrence = Occurrence("buffers", "cpu", "cuda:1", 24, dtype="torch.float64", shape=torch.Size([3]))
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    book.record(occurrence, "repaired", "cuda:1")
    (stray,) = book.strays()
    assert dataclasses.asdict(stray) | {"time": 0, "stack": ()} == {
        "door": "buffers",
        "source": "cpu",
        "target": "cuda:1",
        "owner": "cuda:1",
        "action": "repaired",
        "count": 1,
        "bytes": 24,
        "dtype": "torch.float64",
        "shape": (3,),
        "pid": os.getpid(),
        "thread": "MainThread",
        "rank": "5",
        "time": 0,
        "site": {
            "file": __file__,
            "line": line,
            "function": "test_a_record_names_the_process_the_devices_and_the_call_site",
        },
        "via": None,
        "note": None,
        "stack": (),
    }
    assert stray.time > 1e9
    assert stray.stack[0].line == line


def test_records_are_values_and_do_not_change_afterwards() -> None:
    book = Journal()
    before: tuple[Any, ...] = ()
    for _ in range(2):
        record(book)
        before = before or book.strays()
    assert before[0].count == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        before[0].count = 5  # type: ignore[misc]


# --- bounded ---


def test_a_million_strays_at_one_site_make_one_record() -> None:
    book = Journal()
    for _ in range(1_000_000):
        record(book)
    (stray,) = book.strays()
    assert (stray.count, stray.bytes, book.total, book.dropped) == (1_000_000, 8_000_000, 1_000_000, 0)


def test_a_million_strays_at_too_many_sites_are_all_counted() -> None:
    book = Journal()
    sites = [made_site(number) for number in range(2 * MAX_ROWS)]
    for _ in range(1_000_000 // len(sites)):
        for site in sites:
            site(record, book)
    total = 1_000_000 // len(sites) * len(sites)
    rows = book.strays()
    assert len(rows) == MAX_ROWS
    assert book.total == total
    assert sum(row.count for row in rows) + book.dropped == total
    assert book.dropped == total // 2


def test_the_code_of_call_sites_without_a_row_can_be_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callsite, "_kinds", {})
    monkeypatch.setattr(callsite, "MAX_KINDS", 8)
    book = Journal(max_rows=4)
    alive: list[weakref.ref[Any]] = []
    for number in range(100):
        site = made_site(number)
        alive.append(weakref.ref(site.__code__))
        site(record, book)
    del site
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 4 + 8


def test_the_journal_holds_no_frame_and_no_tensor() -> None:
    class Local: ...

    def work() -> tuple[Any, Any]:
        held = Local()
        tensor = pickle.loads(PAYLOAD)
        return weakref.ref(held), weakref.ref(tensor)

    with devguard.guard("cpu"):
        refs = work()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert len(devguard.strays()) == 1


def test_the_status_counts_the_strays_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.journal, "_max_rows", 1)
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)
        pickle.loads(PAYLOAD)
    assert devguard.status()["strays"] == 2
    assert devguard.status()["strays_not_kept"] == 1


# --- threads and forks ---


def test_threads_lose_no_count() -> None:
    book = Journal()

    def work() -> None:
        for _ in range(2000):
            record(book)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        book.strays()
    for thread in threads:
        thread.join()
    (stray,) = book.strays()
    assert stray.count == book.total == 16000


def test_a_record_names_the_thread_of_its_first_stray() -> None:
    book = Journal()
    thread = threading.Thread(target=lambda: record(book), name="loader-3")
    thread.start()
    thread.join()
    assert book.strays()[0].thread == "loader-3"


FORK = """
import os, pickle, sys, warnings
warnings.simplefilter("ignore")
import torch, devguard
from devguard.reporting import journal
from tests.helpers import tagging
payload = tagging.dumps(torch.ones(2))
{setup}
devguard.install("repair", "cpu")
pickle.loads(payload)
lock = journal.journal._lock
lock.acquire()  # as if another thread was recording a stray
{block}
    pid = os.fork()
    if pid == 0:
        assert devguard.strays() == (), devguard.strays()
        assert devguard.status()["strays"] == 0, devguard.status()["strays"]
{child}
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lock.release()
    assert [stray.pid for stray in devguard.strays()] == [os.getpid()] or journal.journal.dropped
    sys.stdout.flush()
    os._exit(status)
"""


def fork(child: str, block: str = "if True:", setup: str = "") -> subprocess.CompletedProcess[str]:
    program = FORK.format(block=block, setup=setup, child="\n".join(" " * 8 + line for line in child.splitlines()))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, env=environ, timeout=60
    )


def test_a_forked_child_begins_with_an_empty_journal_and_a_free_lock() -> None:
    done = fork(
        "pickle.loads(payload)\n"
        "(stray,) = devguard.strays()\n"
        "assert (stray.count, stray.pid) == (1, os.getpid()), stray\n"
        "assert devguard.status()['strays'] == 1"
    )
    assert done.returncode == 0, done.stderr


def test_status_of_a_forked_child_does_not_count_the_parents_strays_before_anything_is_recorded() -> None:
    done = fork("assert devguard.status()['strays_not_kept'] == 0")
    assert done.returncode == 0, done.stderr
    program = """
import os, pickle, warnings
warnings.simplefilter("ignore")
import torch, devguard
from tests.helpers import tagging
devguard.install("repair", "cpu")
pickle.loads(tagging.dumps(torch.ones(2)))
pid = os.fork()
if pid == 0:
    os._exit(devguard.status()["strays"])  # the first call in the child
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, timeout=60).returncode == 0


# --- marks ---


def test_since_counts_from_the_mark_on() -> None:
    book = Journal()

    def stray() -> None:
        record(book, nbytes=5)

    stray()
    mark = book.mark()
    assert book.since(mark) == ()
    stray()
    stray()
    record(book)
    assert [(row.count, row.bytes) for row in book.since(mark)] == [(2, 10), (1, 8)]


def test_a_mark_from_before_the_journal_was_cleared_hides_nothing_new() -> None:
    book = Journal()

    def stray() -> None:
        record(book)

    for _ in range(3):
        stray()
    mark = book.mark()
    book.clear()
    stray()
    assert [row.count for row in book.since(mark)] == [1]


def test_work_without_a_line_of_user_code_has_the_line_that_started_it() -> None:
    origin = callsite.origin_of(sys._getframe())
    library: Any = types.SimpleNamespace(f_code=inspect.getmodule.__code__, f_lineno=1, f_back=None)
    stack = local.stack
    stack.task = types.SimpleNamespace(site=origin)
    try:
        frame, _, _ = Journal().enter(Occurrence("load", "cuda:0", "cuda:1", start=library), "repaired")
        assert frame == (origin.code, origin.line)
        own, _, _ = Journal().enter(Occurrence("load", "cuda:0", "cuda:1", start=sys._getframe()), "repaired")
        assert own is not None
        assert own.line > origin.line
    finally:
        stack.task = None
