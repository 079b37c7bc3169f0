"""`install` and `uninstall` for a whole process: `uninstall` restores torch exactly."""

from __future__ import annotations

import itertools
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
from devguard.ownership.owner import INTERNED
from tests.helpers import tagging
from tests.helpers.fakecuda import FakeCuda
from tests.helpers.torch_state import changed, everything_in_torch, relay_something

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))


# the patches of the doors load, jit and buffers; the other doors have their own tests
PATCHED_FOR_RELAYS = {"TypedStorage.__reduce__", "_StorageBase.__reduce__"}
PATCHED = {
    "torch.frombuffer",
    "torch.jit.load",
    "torch.jit._serialization.load",
    "torch.serialization._get_restore_location",
    "torch._utils._get_restore_location",
    "torch.package.package_importer._get_restore_location",
}


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


def test_uninstall_puts_back_the_functions_that_move_the_device(cuda: FakeCuda) -> None:
    names = ("_cuda_setDevice", "_accelerator_setDeviceIndex")
    before = [getattr(torch._C, name) for name in names]
    devguard.install(device="cuda:1")
    assert all(getattr(torch._C, name) is not found for name, found in zip(names, before, strict=True))
    assert devguard.uninstall() == []
    assert all(getattr(torch._C, name) is found for name, found in zip(names, before, strict=True))


def test_install_and_uninstall_are_idempotent() -> None:
    before = everything_in_torch()
    registry = list(torch.serialization._package_registry)
    for _ in range(3):
        devguard.install("repair", "cpu")
        devguard.install("warn", "cpu")
        with devguard.guard("cpu"):
            pass
        relay_something()
        once = everything_in_torch()
        relay_something()
        assert changed(once, everything_in_torch()) == set()
        assert torch.serialization._package_registry == registry
        assert devguard.uninstall() == []
        assert devguard.uninstall() == []
        assert changed(before, everything_in_torch()) == set()


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
    # What a load returns while another thread closes the doors is not specified; neither may raise.
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


@pytest.fixture
def busy_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_switching")
def test_uninstall_is_safe_while_other_threads_start_and_create_owners() -> None:
    numbers = itertools.count(1000)
    errors: list[BaseException] = []

    def start_threads() -> None:
        for _ in range(50):
            threads = [threading.Thread(target=devguard.owner) for _ in range(4)]
            for thread in threads:
                devguard.guard(f"cuda:{next(numbers)}")
                thread.start()
            for thread in threads:
                thread.join()

    starters = [threading.Thread(target=start_threads) for _ in range(2)]
    for thread in starters:
        thread.start()
    while any(thread.is_alive() for thread in starters):
        try:
            devguard.uninstall()
        except RuntimeError as error:
            errors.append(error)
    for thread in starters:
        thread.join()
    for index in [index for index in INTERNED if index >= 1000]:
        del INTERNED[index]
    assert errors == []


def test_a_foreign_patch_on_top_is_reported_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "frombuffer", torch.frombuffer)  # restored at the end of the test
    devguard.install(device="cpu")
    ours = torch.frombuffer

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    torch.frombuffer = theirs
    assert devguard.uninstall() == ["torch.frombuffer"]
    assert torch.frombuffer is theirs
    assert torch.frombuffer(bytearray(4), dtype=torch.uint8).tolist() == [0] * 4


def test_a_foreign_patch_underneath_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.serialization._get_restore_location

    def theirs(map_location: Any) -> Any:
        return original(map_location)

    monkeypatch.setattr(torch.serialization, "_get_restore_location", theirs)
    devguard.install(device="cpu")
    assert pickle.loads(PAYLOAD).tolist() == [0, 1, 2, 3]
    assert devguard.uninstall() == []
    assert torch.serialization._get_restore_location is theirs


def test_patched_functions_keep_their_qualified_names() -> None:
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


def test_a_second_install_replaces_the_owner_the_mode_and_the_doors(cuda: FakeCuda) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        (("cpu", "warn"), {}),
        (("warn", "cpu"), {}),
        (("warn",), {"device": "cpu"}),
        (("cpu",), {"mode": "warn"}),
        ((), {"device": "cpu", "mode": "warn"}),
        ((None, "warn"), {"device": "cpu"}),
    ],
)
def test_install_takes_the_device_first_as_a_guard_does_and_the_old_order_too(arguments: Any, keywords: Any) -> None:
    devguard.install(*arguments, **keywords)
    status = devguard.status()
    assert (status["process_owner"], status["mode"]) == ("cpu", "warn")
    devguard.uninstall()
    devguard.install("cpu")
    assert (devguard.status()["process_owner"], devguard.status()["mode"]) == ("cpu", "repair")


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("warn", "error"), {}, "names two modes. Give the device, then the mode"),
        (("cpu", "loud"), {}, "'loud' is not a mode"),
        (("loud", "cpu"), {}, "'cpu' is not a mode"),
        (("cpu",), {"device": "cpu"}, "names the device twice"),
        (("cpu", "warn"), {"mode": "error"}, "names the mode twice"),
        (("warn",), {"mode": "error", "device": "cpu"}, "names the mode twice"),
    ],
)
def test_an_ambiguous_install_is_an_error_that_shows_the_order(arguments: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devguard.install(*arguments, **keywords)
    assert devguard.owner() is None
