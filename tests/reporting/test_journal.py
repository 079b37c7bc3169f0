"""The record of what strayed: counted per call site, bounded, and honest across threads and forks."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import devguard
from devguard import StrayDeviceError, StrayDeviceWarning
from devguard.reporting import journal
from devguard.reporting.journal import MAX_ROWS, Journal
from devguard.support import callsite
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))


def record(book: Journal, nbytes: int = 8) -> Any:
    """Record a stray of the line that calls this."""
    return book.record("load", "cuda:0", "cuda:1", "cuda:1", "repaired", nbytes, start=sys._getframe(1))


def made_site(number: int) -> Callable[..., Any]:
    """Return a function whose code no other function shares, as a program makes that generates code."""
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


def test_what_differs_in_device_owner_door_or_action_has_a_record_of_its_own() -> None:
    book = Journal()
    for door in ("load", "jit"):
        for source in ("cuda:0", "cuda:2"):
            for action in ("repaired", "observed"):
                book.record(door, source, "cuda:1", "cuda:1", action, 1)  # type: ignore[arg-type]
    assert len(book.strays()) == 8


def test_a_record_says_who_what_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    book = Journal()
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    book.record("buffers", "cpu", "cuda:1", "cuda:1", "repaired", 24, "torch.float64", torch.Size([3]))
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
            "function": "test_a_record_says_who_what_and_where",
        },
        "via": None,
        "note": None,
        "stack": (),
    }
    assert stray.time > 1e9
    assert stray.stack[0].line == line


def test_a_record_is_plain_data_fit_for_json() -> None:
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)
    (stray,) = devguard.strays()
    back = json.loads(json.dumps(stray.as_dict()))
    assert back["site"]["file"] == __file__
    assert back["count"] == 1
    assert back["bytes"] == 16
    assert back["stack"][0]["line"] > 0
    assert pickle.loads(pickle.dumps(stray)) == stray


def test_a_record_is_told_in_one_line() -> None:
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)
    (stray,) = devguard.strays()
    assert str(stray) == f"load: cuda:3 -> cpu [owner cpu, repaired] 1 x, 16 bytes, at {stray.site}"


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


def test_a_million_strays_at_more_sites_than_there_is_room_for_are_counted_and_not_kept() -> None:
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


def test_the_code_of_sites_that_are_not_kept_can_be_collected(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_status_says_how_many_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.journal, "_max_rows", 1)
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)
        pickle.loads(PAYLOAD)
    assert devguard.status()["strays"] == 2
    assert devguard.status()["strays_not_kept"] == 1


def test_no_strays_tells_of_those_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.journal, "_max_rows", 0)
    with devguard.guard("cpu"), pytest.raises(StrayDeviceError, match="1 more at call sites"), devguard.no_strays():
        pickle.loads(PAYLOAD)


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


def test_the_thread_is_the_first_ones_name() -> None:
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
lock.acquire()  # as if another thread were recording at this moment
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
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root, env=environ, timeout=60
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
    os._exit(devguard.status()["strays"])  # the first question that the child asks
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=root, timeout=60).returncode == 0


def test_no_strays_around_a_fork_is_quiet_in_the_child() -> None:
    program = """
import os, pickle, warnings
warnings.simplefilter("ignore")
import torch, devguard
from devguard.reporting import journal
from tests.helpers import tagging
journal.journal._max_rows = 0  # the parent's stray is one that is not kept
devguard.install("repair", "cpu")
pickle.loads(tagging.dumps(torch.ones(2)))
block = devguard.no_strays()
block.__enter__()
pid = os.fork()
if pid == 0:
    block.__exit__(None, None, None)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=root, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# --- warn and error ---


def test_warn_warns_once_per_call_site_at_the_users_line() -> None:
    with tagging.landings(), devguard.guard("cpu", mode="warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pickle.loads(PAYLOAD)
            first = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        pickle.loads(PAYLOAD)
    assert [(one.category, one.filename, one.lineno) for one in caught] == [
        (StrayDeviceWarning, __file__, first),
        (StrayDeviceWarning, __file__, first + 2),
    ]
    assert "16 bytes went to cuda:3; this scope owns cpu" in str(caught[0].message)
    assert [stray.count for stray in devguard.strays()] == [3, 1]


def test_a_warning_that_is_an_error_is_raised_at_the_users_line() -> None:
    with tagging.landings(), devguard.guard("cpu", mode="warn"), pytest.raises(StrayDeviceWarning, match="cuda:3"):
        pickle.loads(PAYLOAD)


def test_an_error_says_what_from_where_to_where_who_owns_what_where_and_what_to_do() -> None:
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError) as caught:
        pickle.loads(PAYLOAD)
    (stray,) = devguard.strays()
    message = str(caught.value)
    for part in ("load:", "16 bytes", "cuda:3", "owns cpu", f"{__file__}:", "map_location", "mode='repair'"):
        assert part in message
    assert str(stray.site) in message
    assert stray.action == "refused"


def test_an_error_survives_pickling() -> None:
    with devguard.guard("cpu", mode="error"), pytest.raises(StrayDeviceError) as caught:
        pickle.loads(PAYLOAD)
    back = pickle.loads(pickle.dumps(caught.value))
    assert type(back) is StrayDeviceError
    assert str(back) == str(caught.value)


@pytest.mark.parametrize(
    "kind", ["DevGuardError", "StrayDeviceError", "DeviceResolutionError", "ConfigError", "SimulationError"]
)
def test_every_error_survives_pickling_and_is_a_devguard_error(kind: str) -> None:
    error = getattr(devguard, kind)("what happened")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.args) == (type(error), error.args)
    assert isinstance(back, devguard.DevGuardError)
    assert isinstance(back, RuntimeError)


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
