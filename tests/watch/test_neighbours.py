"""Processes without a log."""

from __future__ import annotations

import os
import subprocess
import sys

from devguard.watch import neighbours


def test_a_process_is_named_by_its_program_and_has_a_parent() -> None:
    command = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        found = neighbours.describe(child.pid)
        assert found.name.startswith("python")
        assert (found.user, found.parent) == (os.geteuid(), os.getpid())
    finally:
        child.communicate(b"\n")


def test_a_process_that_cannot_be_seen_has_no_user() -> None:
    assert neighbours.describe(1 << 30).user is None


def test_this_process_is_in_no_namespace_below_this_one() -> None:
    assert os.getpid() not in neighbours.inner_pids()


def test_a_process_in_a_namespace_below_has_two_numbers() -> None:
    code = "import os; print(os.getpid(), flush=True); input()"
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-S", "-c", code]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    said = child.stdout.readline()
    try:
        if said:  # otherwise this user may not make namespaces
            found = {outer for outer, inner in neighbours.inner_pids().items() if inner == int(said)}
            assert any(neighbours.describe(outer).parent == child.pid for outer in found)
    finally:
        child.communicate(b"\n")
