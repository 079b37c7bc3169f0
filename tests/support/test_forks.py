"""Locks in forked children: free, whichever thread held them, and of no use to a child that was forked too early."""

from __future__ import annotations

import ast
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import devguard
from devguard.reporting import sampler
from devguard.support import forks
from tests.helpers.simulated import ROOT

WITHIN_S = 60  # a child that hangs is killed, and fails its test


def in_child(check: Callable[[], bool]) -> bool:
    """Fork, and return what `check` returns in the child."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(WITHIN_S)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def held_by_another_thread(lock: object) -> Callable[[], None]:
    """Let a thread hold `lock`, and return the function that lets it go on."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:  # type: ignore[attr-defined]
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def let_go() -> None:
        release.set()
        thread.join()

    return let_go


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
class TestForks:
    def test_a_lock_that_another_thread_held_is_free_in_the_child_and_stays_held_in_the_parent(self) -> None:
        lock = forks.new_lock()
        let_go = held_by_another_thread(lock)
        try:
            assert in_child(lambda: bool(lock.acquire(timeout=0)))
            assert not lock.acquire(timeout=0)
        finally:
            let_go()

    def test_a_lock_that_the_forking_thread_holds_stays_held_and_can_be_released(self) -> None:
        lock = forks.new_lock()

        def check() -> bool:
            lock.release()
            return not lock._is_owned()

        with lock:
            assert in_child(check)
            assert lock._is_owned()

    def test_a_fork_waits_for_an_awaited_lock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forks, "_awaited", [])
        monkeypatch.setattr(forks, "WAIT_S", WITHIN_S)
        lock = forks.new_lock(awaited=True)
        let_go = held_by_another_thread(lock)
        done: list[str] = []
        timer = threading.Timer(0.05, lambda: (done.append("released"), let_go()))
        timer.start()
        assert in_child(lambda: done == ["released"] and bool(lock.acquire(timeout=0)))
        timer.join()
        assert lock.acquire(timeout=0)  # the parent's fork has released it
        lock.release()

    def test_a_fork_does_not_wait_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forks, "_awaited", [])
        monkeypatch.setattr(forks, "WAIT_S", 0.01)
        lock = forks.new_lock(awaited=True)
        let_go = held_by_another_thread(lock)
        try:
            assert in_child(lambda: bool(lock.acquire(timeout=0)))
        finally:
            let_go()
        assert lock.acquire(timeout=0)
        lock.release()

    def test_a_thread_may_fork_while_it_holds_an_awaited_lock(self) -> None:
        with forks.opening:
            assert in_child(forks.opening._is_owned)
        assert in_child(lambda: not forks.opening._is_owned())


INTERRUPTED = """
import os, signal, sys, threading
from devguard.support import forks
name, number = sys.argv[1], int(sys.argv[2])
seen = []

def trace(frame, event, arg):
    if frame.f_code is not getattr(forks, name).__code__: return None
    def local(frame, event, arg):
        seen.append(event)
        if len(seen) == number: raise KeyboardInterrupt
        return local
    return local(frame, event, arg)

sys.unraisablehook = lambda unraisable: None  # Python reports what a hook raises, and forks all the same
sys.settrace(trace)
pid = os.fork()
sys.settrace(None)
free = []
thread = threading.Thread(target=lambda: free.append(forks.opening.acquire(timeout=5)))
thread.start(); thread.join()
if pid == 0: os._exit(0 if free == [True] else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(free, status, forks._taken, len(seen) >= number)
"""


@pytest.mark.parametrize("name", ["before", "after", "after_in_child"])
def test_an_interrupt_at_any_step_of_a_fork_leaves_every_lock_free(name: str) -> None:
    for number in range(1, 40):
        command = [sys.executable, "-S", "-c", INTERRUPTED, name, str(number)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
        reached = done.stdout.endswith("True\n")
        assert done.stdout in ("[True] 0 {} True\n", "[True] 0 {} False\n"), (name, number, done.stdout, done.stderr)
        if not reached and (name != "after_in_child" or number == 20):  # a child does not say how far it came
            break
    assert number > 5


def test_a_lock_is_collected_with_its_owner() -> None:
    lock = weakref.ref(forks.new_lock())
    gc.collect()
    assert lock() is None


@pytest.mark.parametrize("path", sorted((ROOT / "devguard").rglob("*.py")), ids=lambda path: str(path.name))
def test_every_lock_is_made_here(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {ast.unparse(function).rpartition(".")[2] for function in calls}
    kinds = {
        "Lock",
        "RLock",
        "Condition",
        "Semaphore",
        "BoundedSemaphore",
        "Event",
        "Barrier",
        "allocate_lock",
        "Queue",
    }
    # The sampler's locks are those of its thread. A forked child has no such thread, and makes a sampler of its own.
    assert names.isdisjoint(kinds) or path in map(Path, (forks.__file__, devguard.__file__, sampler.__file__))


# What another thread does at the moment of the fork; each is repeated until the parent ends.
ACTIVITIES = {
    "status": "devguard.status()",
    "strays": "devguard.strays()",
    "guard": "with devguard.guard('cpu'): pass",
    "load": "with devguard.guard('cpu'): pickle.loads(PICKLE)",
    "install": "devguard.install('repair', 'cpu'); devguard.uninstall()",
    "uninstall": "devguard.uninstall(); devguard.guard('cpu').__enter__().__exit__(None, None, None)",
    "log": "devguard.uninstall(); devguard.install('repair', 'cpu'); pickle.loads(PICKLE)",
}
PROGRAM = """
import atexit, os, pickle, signal, sys, threading, warnings
warnings.simplefilter("ignore")
import torch, devguard
from devguard.cli.selfcheck import tagged_pickle
PICKLE = tagged_pickle("cuda:0")
sys.setswitchinterval(1e-5)

def repeat():
    while True:
        try: exec(compile(sys.argv[1], "<activity>", "exec"), globals())
        except RuntimeError as error:
            if "restore data location" not in str(error): raise

def child():
    devguard.status()
    devguard.strays()
    with devguard.guard("cpu"):
        assert str(pickle.loads(PICKLE).device) == "cpu"
    devguard.uninstall()
    devguard.install("repair", "cpu")
    assert str(pickle.loads(PICKLE).device) == "cpu"
    devguard.uninstall()
    assert torch.serialization._get_restore_location.__module__ == "torch.serialization", "patched twice"

devguard.status()
threading.Thread(target=repeat, daemon=True).start()
for number in range(int(sys.argv[2])):
    for _ in range(number * 9973 % 50000): pass
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        child()
        atexit._run_exitfuncs()  # the orderly end; the rest would take torch seconds
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (number, status)
else:
    print("all children ended")
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("logs", [False, True], ids=["no log", "log"])
@pytest.mark.parametrize("activity", ACTIVITIES)
def test_a_child_forked_while_another_thread_is_inside_devguard_goes_on(
    activity: str, logs: bool, tmp_path: Path
) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    if logs:
        environ["DEVGUARD_LOG"] = str(tmp_path)
    command = [sys.executable, "-c", PROGRAM, ACTIVITIES[activity], "12"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.endswith("all children ended\n"), done.stderr


FIRST = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
import torch, devguard
def first():
    with devguard.guard("cpu"): pass
threading.Thread(target=first).start()
time.sleep(float(sys.argv[1]))
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    with devguard.guard("cpu"): devguard.status()
    devguard.uninstall()
    assert torch.serialization._get_restore_location.__module__ == "torch.serialization", "patched twice"
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.mark.parametrize("delay", [0.0, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13])
def test_a_child_forked_during_the_first_guard_of_another_thread_goes_on(delay: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(delay)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_a_condition_is_free_in_a_forked_child() -> None:
    condition = forks.new_condition()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with condition:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        pid = os.fork()
    if pid == 0:
        os._exit(0 if condition.acquire(timeout=5) else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
