"""Callbacks at the orderly end of a process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from devguard.support import process_exit
from tests.helpers.simulated import ROOT


def output(code: str) -> str:
    """Run a program in which ``say(word)`` returns a callback that prints the word; return what it printed."""
    before = """
import multiprocessing, os, sys
from devguard.support import process_exit
def say(word):
    return lambda: print(word, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", before + textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout + done.stderr


def test_the_latest_callback_runs_first_and_each_runs_once() -> None:
    code = """
    first, second = say("first"), say("second")
    for callback in (first, second, first):
        process_exit.register(callback)
    """
    assert output(code) == "first\nsecond\n"


def test_a_forgotten_callback_does_not_run() -> None:
    code = """
    callback = say("no")
    process_exit.register(callback)
    process_exit.forget(callback)
    process_exit.forget(callback)
    """
    assert output(code) == ""


def test_a_forked_child_runs_its_own_callbacks_only() -> None:
    code = """
    process_exit.register(say("parent"))
    if os.fork() == 0:
        process_exit.register(say("child"))
        sys.exit()
    os.wait()
    """
    assert output(code) == "child\nparent\n"


def test_a_child_of_multiprocessing_runs_its_callbacks() -> None:
    code = """
    def work():
        process_exit.register(say("child"))
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    """
    assert output(code) == "child\n"


def test_a_failing_callback_warns_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fail() -> None:
        raise LookupError("no such file")

    monkeypatch.setattr(process_exit, "_callbacks", {})
    process_exit.register(lambda: ran.append("other"))
    process_exit.register(fail)
    with pytest.warns(RuntimeWarning, match="could not finish in this process: LookupError: no such file"):
        process_exit.run()
    assert ran == ["other"]
    process_exit.run()
    assert ran == ["other"]
