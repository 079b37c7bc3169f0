"""The table of doors: valid settings, and opening and closing the doors together."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
import torch.package.package_importer

import devguard
from devguard import ConfigError, modes
from devguard.doors import table
from tests.helpers import tagging
from tests.helpers.torch_state import changed, everything_in_torch, relay_something

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))  # tagged cuda:3


def test_every_door_lies_in_a_family() -> None:
    assert set(table.DOORS.values()) == {"arrivals", "current_device", "concurrency", "contexts"}
    assert list(table.DOORS) == sorted(table.DOORS)  # the order in which they are opened


def test_doors_are_copied_and_checked() -> None:
    given = {"load": "warn"}
    checked = table.check_doors(given)
    given["load"] = "off"
    assert checked == {"load": "warn"}


def test_an_unknown_door_is_an_error_that_lists_the_doors() -> None:
    with pytest.raises(ConfigError, match=r"no door 'laod'. Doors: artefacts, .*, load, .*, visibility\."):
        table.check_doors({"laod": "warn"})


def test_a_bad_mode_of_a_door_names_the_door() -> None:
    with pytest.raises(ConfigError, match=r"door 'load': 'loud' is not a mode"):
        table.check_doors({"load": "loud"})


def test_a_door_may_have_modes_of_its_own() -> None:
    assert table.check_doors({"ipc": "copy"}) == {"ipc": "copy"}
    with pytest.raises(ConfigError, match=r"door 'load': 'copy' is not a mode. Valid modes: .*, error\."):
        table.check_doors({"load": "copy"})
    with pytest.raises(ConfigError, match=r"door 'ipc': 'move' is not a mode. Valid modes: .*, error, copy, uuid\."):
        table.check_doors({"ipc": "move"})
    with pytest.raises(ConfigError, match="'copy' is not a mode"):
        modes.check_mode("copy")


@pytest.mark.parametrize("doors", ["load", ["load"], 1, {("load", "warn")}])
def test_doors_must_be_a_mapping(doors: object) -> None:
    with pytest.raises(ConfigError, match="map door names to modes"):
        table.check_doors(doors)


def test_devguard_off_overrides_the_code_and_keeps_every_door_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    before = torch.serialization._get_restore_location
    devguard.install("error", "cpu")
    with tagging.landings() as seen, devguard.guard("cpu", mode="error"), devguard.remap("cpu"):
        assert torch.serialization._get_restore_location is before
        pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]
    assert devguard.strays() == ()
    assert devguard.status()["killed"]
    assert not any(row["open"] for row in devguard.status()["doors"].values())


def test_a_guard_opens_the_doors_and_uninstall_closes_them() -> None:
    before = everything_in_torch()
    assert not any(row["open"] for row in devguard.status()["doors"].values())
    with devguard.guard("cpu"):
        pass
    assert all(row["open"] for row in devguard.status()["doors"].values())
    devguard.uninstall()
    assert not any(row["open"] for row in devguard.status()["doors"].values())
    assert changed(before, everything_in_torch()) == set()


def test_open_doors_are_inert_without_an_owner() -> None:
    with devguard.guard("cpu"):
        pass
    with tagging.landings() as seen:
        pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]
    assert devguard.strays() == ()


def test_two_threads_open_the_doors_only_once() -> None:
    before = everything_in_torch()
    registry = len(torch.serialization._package_registry)
    for _ in range(10):
        barrier = threading.Barrier(2)

        def work(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with devguard.guard("cpu"):
                pass
            relay_something()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(torch.serialization._package_registry) == registry + 1
        assert devguard.uninstall() == []
        assert changed(before, everything_in_torch()) == set()


def test_a_door_that_this_torch_lacks_is_reported_and_the_others_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "frombuffer")
    with devguard.guard("cpu"):
        rows = devguard.status()["doors"]
        assert not rows["buffers"]["open"]
        assert "cannot watch torch.frombuffer: torch" in rows["buffers"]["problem"]
        assert rows["load"]["open"]
        assert pickle.loads(PAYLOAD).tolist() == [0, 1, 2, 3]


def test_a_door_that_fails_while_opening_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything_in_torch()
    monkeypatch.delattr(torch._utils, "_get_restore_location")
    with devguard.guard("cpu"):
        assert not devguard.status()["doors"]["load"]["open"]
    devguard.uninstall()
    assert changed(before, everything_in_torch()) == {"torch._utils._get_restore_location"}


def test_a_door_whose_relay_cannot_be_patched_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door applies its first patches before it needs the relay."""
    before = everything_in_torch()

    def refuse(*args: Any) -> None:
        raise table.DoorError("TypedStorage.__reduce__ is not in this torch")

    monkeypatch.setattr("devguard.doors.arrivals.relayed_tags._pickled_classes", refuse)
    with devguard.guard("cpu"):
        assert not devguard.status()["doors"]["load"]["open"]
    devguard.uninstall()
    assert changed(before, everything_in_torch()) == set()
