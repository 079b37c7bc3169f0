"""The meaning of ``CUDA_VISIBLE_DEVICES``: how a value is read, and when the meaning of a change is unknown."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from devguard.doors.contexts import visible_devices
from devguard.doors.contexts.visible_devices import VARIABLE, Gpu, list_gpus, meant_now, read_visible
from tests.helpers.simulated import ROOT

UUIDS = ["aa00", "aa11", "bb22"]
GPUS = [Gpu(uuid, "H100") for uuid in UUIDS]
MIXED = [Gpu(uuid, name) for uuid, name in zip(UUIDS, ("H100", "A100", "H100"), strict=True)]


class TestReadVisible:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, [0, 1, 2]),
            ("", []),
            ("1", [1]),
            ("2,0", [2, 0]),
            (" 2 , 0 ", [2, 0]),
            ("GPU-bb22,0", [2, 0]),
            ("GPU-b", [2]),  # a prefix is enough if it is unique
        ],
    )
    def test_the_order_of_the_entries_is_the_order_of_the_indices(self, value, expected):
        assert read_visible(value, GPUS) == [UUIDS[number] for number in expected]

    @pytest.mark.parametrize("entry", ["-1", "3", "x", "1.0", "", "GPU-cc", "GPU-aa", "MIG-aa00"])
    def test_an_entry_that_names_no_single_device_hides_all_entries_from_there_on(self, entry):
        assert read_visible(f"1,{entry},0", GPUS) == [UUIDS[1]]
        assert read_visible(f"{entry},0", GPUS) == []

    @pytest.mark.parametrize("value", ["1,1", "0,1,0", "0,GPU-aa00"])
    def test_a_device_that_is_named_twice_hides_all_devices(self, value):
        assert read_visible(value, GPUS) == []

    def test_a_duplicate_after_an_invalid_entry_is_not_read(self):
        assert read_visible("1,x,1", GPUS) == [UUIDS[1]]


class TestMeantNow:
    @pytest.fixture
    def change(self, monkeypatch):
        """Set the value of the variable at the start of the program and its value now; None: not set."""

        def change(start: str | None, now: str | None, order: str | None = None) -> None:
            monkeypatch.setattr(visible_devices, "visible_at_start", lambda: start)
            for name, value in ((VARIABLE, now), ("CUDA_DEVICE_ORDER", order)):
                if value is None:
                    monkeypatch.delenv(name, raising=False)
                else:
                    monkeypatch.setenv(name, value)

        return change

    def test_a_changed_value_means_the_devices_that_it_selects_now(self, change):
        change(None, "2,1")
        assert meant_now(GPUS, UUIDS) == [UUIDS[2], UUIDS[1]]
        change("2,1", None)
        assert meant_now(GPUS, [UUIDS[2], UUIDS[1]]) == UUIDS

    def test_an_unchanged_value_has_no_new_meaning(self, change):
        change("1", "1")
        assert meant_now(GPUS, [UUIDS[1]]) is None

    def test_the_meaning_is_unknown_without_nvml_with_mig_and_for_gpus_that_nvml_does_not_list(self, change):
        change(None, "1")
        assert meant_now([], UUIDS) is None
        assert meant_now(GPUS, [*UUIDS, "cc33"]) is None
        change(None, "MIG-aa00")
        assert meant_now(GPUS, UUIDS) is None

    def test_numbers_of_gpus_of_different_models_have_a_meaning_only_in_a_known_order(self, change):
        fastest_first = [UUIDS[0], UUIDS[2], UUIDS[1]]
        change(None, "1")
        assert meant_now(MIXED, fastest_first) is None
        assert meant_now(MIXED, UUIDS) == [UUIDS[1]]  # the value at the start explains the order
        change(None, "1", order="PCI_BUS_ID")
        assert meant_now(MIXED, fastest_first) == [UUIDS[1]]
        change(None, "GPU-aa11")
        assert meant_now(MIXED, fastest_first) == [UUIDS[1]]


def test_the_value_at_the_start_is_the_value_with_which_the_program_was_started():
    code = (
        f"import os; os.environ[{VARIABLE!r}] = '1'\n"
        "from devguard.doors.contexts.visible_devices import visible_at_start; print(repr(visible_at_start()))"
    )
    unset = {name: value for name, value in os.environ.items() if name != VARIABLE}
    for environment, expected in (({**unset, VARIABLE: "2"}, "'2'"), (unset, "None")):
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert output.strip() == expected


def test_without_nvml_no_gpu_is_listed(monkeypatch):
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert list_gpus() == []
