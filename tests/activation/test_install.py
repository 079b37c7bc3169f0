"""Install and uninstall for a whole process: torch is left as it was found."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.package.package_importer

import devguard
from devguard import ConfigError, DeviceResolutionError
from devguard.doors import table
from devguard.doors.arrivals import relayed_tags
from devguard.ownership.owner import INTERNED
from tests.helpers import tagging
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))


def everything_in_torch() -> dict[tuple[str, str], Any]:
    """Return every attribute of every module of torch, and of the classes that doors patch."""
    found: dict[tuple[str, str], Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "torch" and hasattr(module, "__dict__"):
            found.update({(module_name, name): value for name, value in list(vars(module).items())})
    for kind in (torch.storage.TypedStorage, torch.storage.UntypedStorage, torch.storage._StorageBase, torch.Tensor):
        found.update({(kind.__name__, name): value for name, value in list(vars(kind).items())})
    return found


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[str]:
    return {f"{where}.{name}" for (where, name), value in before.items() if after.get((where, name)) is not value}


# by the doors load, jit and buffers; every door's own tests say what else
PATCHED = {
    "torch.frombuffer",
    "torch.jit.load",
    "torch.jit._serialization.load",
    "torch.serialization._get_restore_location",
    "torch._utils._get_restore_location",
    "torch.package.package_importer._get_restore_location",
}
# from the first storage on that is relayed
PATCHED_FOR_RELAYS = {"TypedStorage.__reduce__", "_StorageBase.__reduce__"}


def relay_something() -> None:
    relayed_tags.keep(torch.zeros(1).untyped_storage(), "cuda:0")


def test_uninstall_puts_back_exactly_what_was_found() -> None:
    before = everything_in_torch()
    registry = list(torch.serialization._package_registry)
    devguard.install("repair", "cpu")
    assert changed(before, everything_in_torch()) >= PATCHED
    relay_something()
    assert changed(before, everything_in_torch()) >= PATCHED | PATCHED_FOR_RELAYS
    assert devguard.uninstall() == []
    assert changed(before, everything_in_torch()) == set()
    assert torch.serialization._package_registry == registry


def test_pickling_is_left_alone_until_something_is_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_tags, "_counts", relayed_tags._Counts())
    before = everything_in_torch()
    registry = list(torch.serialization._package_registry)
    devguard.install("repair", "cpu")
    assert not changed(before, everything_in_torch()) & PATCHED_FOR_RELAYS
    assert torch.serialization._package_registry == registry
    relay_something()
    devguard.uninstall()
    devguard.install("repair", "cpu")  # storages from before remember their tags
    assert changed(before, everything_in_torch()) >= PATCHED_FOR_RELAYS
    devguard.uninstall()


def test_uninstall_puts_back_the_functions_that_move_the_device(cuda: FakeCuda) -> None:
    names = ("_cuda_setDevice", "_accelerator_setDeviceIndex")
    before = [getattr(torch._C, name) for name in names]
    devguard.install(device="cuda:1")
    assert all(getattr(torch._C, name) is not found for name, found in zip(names, before, strict=True))
    assert devguard.uninstall() == []
    assert all(getattr(torch._C, name) is found for name, found in zip(names, before, strict=True))


def test_install_and_uninstall_are_idempotent() -> None:
    before = everything_in_torch()
    registry = len(torch.serialization._package_registry)
    for _ in range(3):
        devguard.install("repair", "cpu")
        devguard.install("warn", "cpu")
        with devguard.guard("cpu"):
            pass
        relay_something()
        relay_something()
        assert len(torch.serialization._package_registry) == registry + 1
        assert devguard.uninstall() == []
        assert devguard.uninstall() == []
        assert changed(before, everything_in_torch()) == set()


def test_a_guard_opens_the_doors_and_uninstall_closes_them() -> None:
    before = everything_in_torch()
    assert not any(row["open"] for row in devguard.status()["doors"].values())
    with devguard.guard("cpu"):
        pass
    assert all(row["open"] for row in devguard.status()["doors"].values())
    devguard.uninstall()
    assert not any(row["open"] for row in devguard.status()["doors"].values())
    assert changed(before, everything_in_torch()) == set()


def test_doors_that_are_open_are_inert_without_an_owner() -> None:
    with devguard.guard("cpu"):
        pass
    with tagging.landings() as seen:
        pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]
    assert devguard.strays() == ()


def test_install_from_many_threads_patches_once() -> None:
    before = everything_in_torch()
    barrier = threading.Barrier(8)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(20):
                devguard.install("repair", "cpu")
                with devguard.guard("cpu"):
                    pickle.loads(PAYLOAD)
                if index % 2:
                    devguard.uninstall()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    # no test of what a load gives while another thread closes the doors: only that the two never break each other
    with tagging.landings():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    devguard.install("repair", "cpu")
    assert changed(before, everything_in_torch()) >= PATCHED
    assert devguard.uninstall() == []
    assert changed(before, everything_in_torch()) == set()


def test_two_threads_that_open_the_doors_at_once_open_them_once() -> None:
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


@pytest.fixture
def busy_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_switching")
def test_uninstall_while_other_threads_begin_and_name_new_owners_breaks_nothing() -> None:
    numbers = itertools.count(1000)
    errors: list[BaseException] = []

    def begin() -> None:
        for _ in range(50):
            threads = [threading.Thread(target=devguard.owner) for _ in range(4)]
            for thread in threads:
                devguard.guard(f"cuda:{next(numbers)}")
                thread.start()
            for thread in threads:
                thread.join()

    beginners = [threading.Thread(target=begin) for _ in range(2)]
    for thread in beginners:
        thread.start()
    while any(thread.is_alive() for thread in beginners):
        try:
            devguard.uninstall()
        except RuntimeError as error:
            errors.append(error)
    for thread in beginners:
        thread.join()
    for index in [index for index in INTERNED if index >= 1000]:
        del INTERNED[index]
    assert errors == []


def test_a_patch_over_ours_is_reported_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "frombuffer", torch.frombuffer)  # puts it back at the end
    devguard.install(device="cpu")
    ours = torch.frombuffer

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    torch.frombuffer = theirs
    assert devguard.uninstall() == ["torch.frombuffer"]
    assert torch.frombuffer is theirs
    assert torch.frombuffer(bytearray(4), dtype=torch.uint8).tolist() == [0] * 4


def test_a_patch_under_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.serialization._get_restore_location

    def theirs(map_location: Any) -> Any:
        return original(map_location)

    monkeypatch.setattr(torch.serialization, "_get_restore_location", theirs)
    devguard.install(device="cpu")
    assert pickle.loads(PAYLOAD).tolist() == [0, 1, 2, 3]
    assert devguard.uninstall() == []
    assert torch.serialization._get_restore_location is theirs


def test_patched_functions_keep_the_names_by_which_others_know_them() -> None:
    names = {
        name: (value.__module__, value.__qualname__)
        for name, value in (("frombuffer", torch.frombuffer), ("load", torch.jit.load))
    }
    with devguard.guard("cpu"):
        assert (torch.frombuffer.__module__, torch.frombuffer.__qualname__) == names["frombuffer"]
        assert (torch.jit.load.__module__, torch.jit.load.__qualname__) == names["load"]
        assert pickle.loads(pickle.dumps(torch.jit.load)) is torch.jit.load


# --- the process's owner ---


def test_install_gives_every_thread_an_owner() -> None:
    devguard.install("repair", "cpu")
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append((devguard.owner(), pickle.loads(PAYLOAD).tolist())))
    thread.start()
    thread.join()
    assert results == [(torch.device("cpu"), [0, 1, 2, 3])]
    assert devguard.status()["process_owner"] == "cpu"
    devguard.uninstall()
    assert devguard.owner() is None
    with pytest.raises(RuntimeError, match=tagging.REFUSAL):
        pickle.loads(PAYLOAD)


def test_install_makes_the_device_current_on_this_thread(cuda: FakeCuda) -> None:
    devguard.install(device="cuda:2")
    assert cuda.current == 2
    assert devguard.owner() == torch.device("cuda:2")


def test_install_inside_a_guard_leaves_the_guards_device(cuda: FakeCuda) -> None:
    with devguard.guard(1):
        devguard.install(device=2)
        assert cuda.current == 1
        assert devguard.owner() == torch.device("cuda:1")
    assert cuda.current == 0
    assert devguard.owner() == torch.device("cuda:2")


def test_install_again_replaces_what_was_said(cuda: FakeCuda) -> None:
    devguard.install("error", 1, doors={"jit": "off"})
    devguard.install("observe", 2)
    assert devguard.owner() == torch.device("cuda:2")
    rows = devguard.status()["doors"]
    assert (rows["load"]["mode"], rows["jit"]["mode"]) == ("observe", "observe")


def test_install_finds_the_device_as_a_guard_does(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceResolutionError, match="LOCAL_RANK"):
        devguard.install()
    with devguard.guard(3):
        devguard.install()
    assert devguard.owner() == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    devguard.install()
    assert devguard.owner() == torch.device("cuda:1")


@pytest.mark.parametrize("doors_given", [{"window": "warn"}, {"load": "loud"}])
def test_install_checks_before_it_changes_anything(doors_given: Any) -> None:
    before = everything_in_torch()
    with pytest.raises(ConfigError):
        devguard.install("repair", "cpu", doors=doors_given)
    with pytest.raises(ConfigError):
        devguard.install("loud", "cpu")  # type: ignore[arg-type]
    with pytest.raises(DeviceResolutionError):
        devguard.install(device="gpu")
    assert changed(before, everything_in_torch()) == set()
    assert devguard.owner() is None


def test_install_for_a_device_that_is_not_there_leaves_no_owner(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceResolutionError, match="CUDA_VISIBLE_DEVICES"):
        devguard.install(device=9)
    assert devguard.owner() is None
    assert devguard.status()["process_owner"] is None


# --- status ---


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


def test_a_door_that_acts_on_request_is_off_until_it_is_asked() -> None:
    with devguard.guard("cpu"):
        assert devguard.status()["doors"]["buffers"]["mode"] == "off"
        assert devguard.status()["doors"]["load"]["mode"] == "repair"
        with devguard.remap("cpu"):
            assert devguard.status()["doors"]["buffers"]["mode"] == "repair"
        with devguard.guard("cpu", doors={"buffers": "warn"}):
            assert devguard.status()["doors"]["buffers"]["mode"] == "warn"


def test_status_names_copies_that_pass_a_door_by() -> None:
    copies = type(sys)("copies_of_torch")
    copies.frombuffer = torch.frombuffer
    sys.modules["copies_of_torch"] = copies
    try:
        with devguard.guard("cpu"):
            assert "copies_of_torch.frombuffer" in devguard.status()["doors"]["buffers"]["early_copies"]
    finally:
        del sys.modules["copies_of_torch"]


def test_a_door_that_this_torch_has_not_is_reported_and_the_others_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "frombuffer")
    with devguard.guard("cpu"):
        rows = devguard.status()["doors"]
        assert not rows["buffers"]["open"]
        assert "torch.frombuffer is not in torch" in rows["buffers"]["problem"]
        assert rows["load"]["open"]
        assert pickle.loads(PAYLOAD).tolist() == [0, 1, 2, 3]


def test_a_door_that_fails_half_way_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything_in_torch()
    monkeypatch.delattr(torch._utils, "_get_restore_location")
    with devguard.guard("cpu"):
        assert not devguard.status()["doors"]["load"]["open"]
    devguard.uninstall()
    assert changed(before, everything_in_torch()) == {"torch._utils._get_restore_location"}


def test_a_door_whose_relay_cannot_be_patched_leaves_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door's first patches are in place by then."""
    before = everything_in_torch()

    def refuse(*args: Any) -> None:
        raise table.DoorError("TypedStorage.__reduce__ is not in this torch")

    monkeypatch.setattr("devguard.doors.arrivals.relayed_tags._reducing", refuse)
    with devguard.guard("cpu"):
        assert not devguard.status()["doors"]["load"]["open"]
    devguard.uninstall()
    assert changed(before, everything_in_torch()) == set()
