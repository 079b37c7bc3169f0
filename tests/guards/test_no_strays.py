"""`no_strays`: a block that raises at its end if anything strayed in it."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

import devguard
from devguard import StrayDeviceError
from devguard.reporting import journal
from tests.helpers import tagging
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))


def test_a_block_without_strays_does_not_raise() -> None:
    with devguard.guard("cpu"), devguard.no_strays():
        assert pickle.loads(pickle.dumps(torch.ones(2))).tolist() == [1, 1]
    assert devguard.strays() == ()


def test_a_block_with_repaired_strays_raises_at_its_end() -> None:
    with devguard.guard("cpu"), pytest.raises(StrayDeviceError, match=r"^2 stray\(s\)") as caught, devguard.no_strays():
        for _ in range(2):
            value = pickle.loads(PAYLOAD)
        assert value.tolist() == [0, 1, 2, 3]
    assert __file__ in str(caught.value)
    assert "cuda:3 -> cpu" in str(caught.value)


def test_no_strays_counts_only_what_happens_inside() -> None:
    def stray() -> None:
        pickle.loads(PAYLOAD)

    with devguard.guard("cpu"):
        stray()
        with devguard.no_strays():
            pass
        with pytest.raises(StrayDeviceError, match=r"^1 stray"), devguard.no_strays():
            stray()


def test_no_strays_nests() -> None:
    with devguard.guard("cpu"):
        block = devguard.no_strays()
        with pytest.raises(StrayDeviceError), block:
            with block:
                pass
            with pytest.raises(StrayDeviceError), block:
                pickle.loads(PAYLOAD)


def test_no_strays_does_not_hide_another_exception() -> None:
    with devguard.guard("cpu"), pytest.raises(ZeroDivisionError), devguard.no_strays():
        pickle.loads(PAYLOAD)
        raise ZeroDivisionError


def test_no_strays_reports_the_strays_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.journal, "_max_rows", 0)
    with devguard.guard("cpu"), pytest.raises(StrayDeviceError, match="1 more at call sites"), devguard.no_strays():
        pickle.loads(PAYLOAD)


def test_no_strays_around_a_fork_does_not_raise_in_the_child() -> None:
    program = """
import os, pickle, warnings
warnings.simplefilter("ignore")
import torch, devguard
from devguard.reporting import journal
from tests.helpers import tagging
journal.journal._max_rows = 0  # so that the journal does not keep the parent's stray
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
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
