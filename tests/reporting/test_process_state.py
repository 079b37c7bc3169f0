"""The state that ``devguard.status()`` and the end of a log file share."""

from __future__ import annotations

import pytest

import devguard
from devguard.reporting import process_state
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence
from devguard.support import accelerator

pytestmark = pytest.mark.usefixtures("clean")


def test_it_names_the_owners_the_mode_and_the_source() -> None:
    devguard.install("warn", "cpu")
    state = process_state.describe()
    assert (state["owner"], state["process_owner"], state["mode"], state["said_by"]) == (
        "cpu",
        "cpu",
        "warn",
        "install",
    )
    assert (state["owned"], state["contexts"]) == (["cpu"], [])
    with devguard.unguarded():
        assert process_state.describe()["owner"] is None


def test_it_counts_the_strays() -> None:
    assert process_state.describe()["strays"] == 0
    journal.record(Occurrence("load", "cuda:0", "cuda:1"), "observed")
    assert process_state.describe()["strays"] == 1


def test_the_status_holds_all_of_it() -> None:
    devguard.install("warn", "cpu")
    assert process_state.describe().items() <= devguard.status().items()


def test_the_transport_is_part_of_the_status_until_it_is_undone() -> None:
    assert devguard.status()["transport"] is None
    process_state.note_transport("host")
    try:
        assert process_state.owners()["transport"] == devguard.status()["transport"] == process_state.transport()
    finally:
        process_state.note_transport(None)
    assert devguard.status()["transport"] is None


def test_a_child_forked_after_cuda_was_initialised_names_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher would wait for its memory, which it cannot report."""
    monkeypatch.setattr(process_state, "_uuids", {})
    for name, result in {"is_initialized": True, "is_in_bad_fork": False, "device_count": 1}.items():
        monkeypatch.setattr(accelerator, name, lambda result=result: result)
    monkeypatch.setattr(accelerator, "uuid_of", lambda index: "a")
    assert process_state._gpus() == {"cuda:0": "a"}
    monkeypatch.setattr(accelerator, "is_in_bad_fork", lambda: True)
    assert process_state._gpus() == {}


def test_devices_without_a_uuid_leave_the_state_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> str:
        raise RuntimeError("no properties")

    monkeypatch.setattr(process_state, "_uuids", {})
    monkeypatch.setattr("devguard.support.accelerator.is_initialized", lambda: True)
    monkeypatch.setattr("devguard.support.accelerator.is_in_bad_fork", lambda: False)
    monkeypatch.setattr("devguard.support.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("devguard.support.accelerator.uuid_of", fail)
    assert process_state.owners()["gpus"] == {}
    monkeypatch.setattr("devguard.support.accelerator.uuid_of", "uuid-{}".format)
    assert process_state.owners()["gpus"] == {"cuda:0": "uuid-0", "cuda:1": "uuid-1"}
