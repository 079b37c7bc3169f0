"""The checks that ``devguard doctor`` runs in a child process."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch

import devguard
from devguard.cli import selfcheck
from tests.helpers import tagging
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")


def test_the_tagged_pickle_names_a_device_that_is_not_used() -> None:
    data = selfcheck.tagged_pickle("cuda:5")
    assert not torch.cuda.is_initialized()
    with tagging.landings() as landed:
        assert pickle.loads(data).tolist() == selfcheck.VALUES
    assert landed == ["cuda:5"]


def test_the_guard_repairs_the_tagged_pickle() -> None:
    with devguard.guard("cpu"):
        assert pickle.loads(selfcheck.tagged_pickle("cuda:0")).tolist() == selfcheck.VALUES
    assert [(stray.source, stray.action) for stray in devguard.strays()] == [("cuda:0", "repaired")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the check would open a context here")
def test_without_a_gpu_the_check_is_effective_for_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "devguard.cli.selfcheck"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout)
    assert (found["torch"], found["visible"], found["names"]) == (torch.__version__, 0, [])
    check = found["check"]
    assert (check["owner"], check["landed"], check["error"], check["effective"]) == ("cpu", "cpu", None, True)


def test_a_guard_that_does_not_repair_is_not_effective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    result, doors = selfcheck._check_guard(0)
    assert not result["effective"]
    assert tagging.REFUSAL in result["error"]
    assert not any(row["open"] for row in doors.values())
