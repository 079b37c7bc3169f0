"""The table of doors: valid settings, and opening and closing the doors together."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.package.package_importer

import devguard
from devguard import ConfigError, modes
from devguard.doors import table
from devguard.doors.concurrency import threads
from devguard.doors.current_device import streams
from devguard.support import patching
from devguard.support.forks import opening
from tests.helpers import tagging
from tests.helpers.interrupts import interrupted, is_uninterruptible, lines
from tests.helpers.torch_state import changed, everything_in_torch, relay_something

pytestmark = pytest.mark.usefixtures("clean")

Originals = dict[tuple[int, Any], tuple[Any, Any]]
PACKAGE = os.path.dirname(devguard.__file__)
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
        assert len(torch.serialization._package_registry) == registry
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


def watched() -> Originals:
    """Return each attribute that the open doors have replaced, by owner and name, with its original."""
    return {
        (id(owner), name): (owner, None if patching._inherited(owner, name) is original else original)
        for patches in list(patching._all)
        for owner, name, original, _ in reversed(patches.replaced)  # the oldest patch has the original
    }


def replaced(originals: Originals) -> list[Any]:
    """Return the names of these attributes that do not hold their originals."""
    return [name for (_, name), (owner, original) in originals.items() if patching._found(owner, name) is not original]


@pytest.fixture
def originals() -> Originals:
    table.open_all()
    found = watched()
    table.close_all()
    assert len(found) > 20
    assert replaced(found) == []
    return found


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    """Release the lock of the doors, which an interrupt between two steps of a `with` statement leaves held."""
    yield
    while opening._is_owned():
        opening.release()


STRIDE = 17  # all lines take minutes


@pytest.mark.parametrize("first", [1, 6, 11])
def test_an_interrupt_while_the_doors_open_leaves_all_closed_and_nothing_patched_twice(
    first: int, originals: Originals
) -> None:
    number = lines(table.open_all)
    table.close_all()
    assert number > 300
    for line in range(first, number + 1, STRIDE):
        if interrupted(table.open_all, line) and not table._stage.complete:
            assert replaced(originals) == [], f"line {line}"
        table.open_all()
        assert all(row["open"] for row in table.status().values()), f"line {line}"
        assert table.close_all() == [], f"line {line}"
        assert replaced(originals) == [], f"line {line}"


@pytest.mark.parametrize("first", [1, 6, 11])
def test_an_interrupt_while_the_doors_close_leaves_nothing_patched_twice(first: int, originals: Originals) -> None:
    table.open_all()
    number = lines(table.close_all)
    assert number > 100
    for line in range(first, number + 1, STRIDE):
        table.open_all()
        interrupted(table.close_all, line)
        table.open_all()
        assert all(row["open"] for row in table.status().values()), f"line {line}"
        assert table.close_all() == [], f"line {line}"
        assert replaced(originals) == [], f"line {line}"


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_second_interrupt_during_the_removal_leaves_nothing_patched_twice(first: int) -> None:
    table.open_all()
    table.close_all()
    before = everything_in_torch()

    class Interrupted:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function, self.calls = function, 0

        def __call__(self) -> Any:
            self.calls += 1
            if self.calls <= first:
                raise KeyboardInterrupt
            return self.function()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "install", Interrupted(threads.install))
        patch.setattr(streams, "uninstall", Interrupted(streams.uninstall))
        while not table._stage.complete:
            with contextlib.suppress(KeyboardInterrupt):
                table.open_all()
        assert table.close_all() == []
    assert changed(before, everything_in_torch()) == set()


class TestPatchesThatOutliveUninstall:
    def test_a_mock_that_ends_after_uninstall_brings_an_inert_function_back(self) -> None:
        original = torch.serialization._get_restore_location
        with devguard.guard("cpu"):
            with mock.patch("torch.serialization._get_restore_location", lambda where: original(where)):
                assert devguard.uninstall() == ["torch.serialization._get_restore_location"]
            assert torch.serialization._get_restore_location is not original
            with tagging.landings() as seen:  # the scope is still entered
                pickle.loads(PAYLOAD)
        assert seen == ["cuda:3"]
        assert devguard.strays() == ()
        with devguard.guard("cpu"):
            pass
        devguard.uninstall()
        assert torch.serialization._get_restore_location is original

    def test_doors_that_open_again_judge_once_and_restore_the_original(self) -> None:
        before = everything_in_torch()
        with devguard.guard("cpu"), mock.patch("torch.serialization._get_restore_location"):
            devguard.uninstall()
        with tagging.landings(), devguard.guard("cpu", mode="observe"):
            pickle.loads(PAYLOAD)
        assert [stray.count for stray in devguard.strays()] == [1]
        assert devguard.uninstall() == []
        assert changed(before, everything_in_torch()) == set()

    def test_a_mock_may_outlive_uninstall_and_end_while_the_doors_are_open_again(self) -> None:
        original = torch.serialization._get_restore_location
        with devguard.guard("cpu"):
            pass
        with mock.patch("torch.serialization._get_restore_location"):
            devguard.uninstall()
            with devguard.guard("cpu"):
                pass
        with tagging.landings() as seen, devguard.guard("cpu"):
            pickle.loads(PAYLOAD)
        assert seen == []
        assert [stray.action for stray in devguard.strays()] == ["repaired"]
        devguard.uninstall()
        assert torch.serialization._get_restore_location is original

    @pytest.mark.parametrize("target", ["torch.frombuffer", "torch.jit.load", "torch.from_dlpack"])
    def test_any_function_of_a_door(self, target: str) -> None:
        before = everything_in_torch()
        for _ in range(3):
            with devguard.guard("cpu"), mock.patch(target):
                assert target in devguard.uninstall()
        with devguard.guard("cpu"):
            pass
        assert devguard.uninstall() == []
        assert changed(before, everything_in_torch()) == set()


def test_an_interrupt_at_any_line_of_the_opening_itself_leaves_it_possible(originals: Originals) -> None:
    code = table.open_all.__code__

    def interrupt(line: int) -> Callable[..., Any]:
        def trace(frame: FrameType, event: str, argument: object) -> Any:
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == line and not is_uninterruptible(frame):
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        return trace

    for line in sorted({line for _, _, line in code.co_lines() if line is not None}):
        with contextlib.suppress(KeyboardInterrupt):
            try:
                sys.settrace(interrupt(line))
                table.open_all()
            finally:
                sys.settrace(None)
        table.open_all()
        assert all(row["open"] for row in table.status().values()), f"line {line}"
        assert table.close_all() == [], f"line {line}"
        assert replaced(originals) == [], f"line {line}"
