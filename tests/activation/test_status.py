"""`status()`, as plain data."""

from __future__ import annotations

import json
import os
import pickle
import sys

import pytest
import torch
import torch.package.package_importer

import devguard
from devguard.doors import table
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")


PAYLOAD = tagging.dumps(torch.arange(4.0))


def test_status_is_plain_data() -> None:
    devguard.install("warn", "cpu", doors={"load": "repair"})
    pickle.loads(PAYLOAD)
    status = json.loads(json.dumps(devguard.status()))
    assert status["version"] == devguard.__version__
    assert status["pid"] == os.getpid()
    assert status["torch"] == torch.__version__
    assert status["killed"] is False
    assert status["mode"] == "warn"
    assert status["owner"] == status["process_owner"] == "cpu"
    assert status["owned"] == ["cpu"]
    assert status["contexts"] == []
    assert set(status["doors"]) == set(table.NAMES)
    assert status["doors"]["load"]["mode"] == "repair"
    assert status["doors"]["load"]["relay"]["kept"] >= 1
    assert (status["strays"], status["strays_not_kept"]) == (1, 0)


def test_a_door_that_acts_on_request_is_off_until_it_is_requested() -> None:
    with devguard.guard("cpu"):
        assert devguard.status()["doors"]["buffers"]["mode"] == "off"
        assert devguard.status()["doors"]["load"]["mode"] == "repair"
        with devguard.remap("cpu"):
            assert devguard.status()["doors"]["buffers"]["mode"] == "repair"
        with devguard.guard("cpu", doors={"buffers": "warn"}):
            assert devguard.status()["doors"]["buffers"]["mode"] == "warn"


def test_status_names_copies_that_bypass_a_door() -> None:
    copies = type(sys)("copies_of_torch")
    copies.frombuffer = torch.frombuffer
    sys.modules["copies_of_torch"] = copies
    try:
        with devguard.guard("cpu"):
            assert "copies_of_torch.frombuffer" in devguard.status()["doors"]["buffers"]["early_copies"]
    finally:
        del sys.modules["copies_of_torch"]
