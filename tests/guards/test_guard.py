"""`guard` as a value and as a context manager."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError, modes
from devguard.ownership.stack import local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def pick() -> str:
    return "cuda:2"


class Custom(devguard.guard):
    """A guard that a program defines."""


def name(value: object) -> str:
    """Return a test id without addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


VALUES = [
    devguard.guard("cuda:1"),
    devguard.guard(1),
    devguard.guard(torch.device("cuda:2")),
    devguard.guard("cpu"),
    devguard.guard(),
    devguard.guard(argument="gpu_id"),
    devguard.guard(resolve=pick),
    devguard.guard("cuda:1", mode="error"),
    devguard.guard("cuda:1", mode="warn", doors={"load": "off", "jit": "error"}),
    devguard.guard(100),
    devguard.remap(),
    devguard.remap("cuda:1"),
    devguard.remap("cuda:1", doors={"load": "warn"}),
    devguard.unguarded(),
    Custom("cuda:1"),
    Custom(1, mode="observe"),
]


# --- values ---


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES, ids=name)
def test_a_scope_survives_pickle(value: Any, protocol: int) -> None:
    back = pickle.loads(pickle.dumps(value, protocol))
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("value", VALUES, ids=name)
def test_a_scope_survives_copy(value: Any, how: Any) -> None:
    back = how(value)
    assert back == value
    assert type(back) is type(value)
    assert hash(back) == hash(value)


@pytest.mark.parametrize("value", [value for value in VALUES if value != devguard.guard(resolve=pick)], ids=name)
def test_the_representation_makes_an_equal_scope(value: Any) -> None:
    assert eval(repr(value).replace("devguard.Custom", "Custom")) == value


def test_scopes_compare_by_value() -> None:
    assert devguard.guard("cuda:1") == devguard.guard(1) == devguard.guard(torch.device("cuda", 1))
    assert hash(devguard.guard("cuda:1")) == hash(devguard.guard(1))
    assert devguard.guard(1) != devguard.guard(2)
    assert devguard.guard(1) != devguard.guard(1, mode="error")
    assert devguard.guard(1) != devguard.guard()
    assert devguard.guard(1) != devguard.remap(1)
    assert devguard.guard(1) != Custom(1)
    assert devguard.guard(1) != 1
    assert devguard.guard(1, doors={"load": "off", "jit": "warn"}) == devguard.guard(
        1, doors={"jit": "warn", "load": "off"}
    )
    assert devguard.unguarded() == devguard.unguarded()
    assert len({devguard.guard(1), devguard.guard("1"), devguard.guard(2), devguard.unguarded()}) == 3


def test_changing_the_doors_given_does_not_change_the_guard() -> None:
    given = {"load": "warn"}
    value = devguard.guard(1, doors=given)
    given["load"] = "off"
    assert value == devguard.guard(1, doors={"load": "warn"})


def test_a_subclass_makes_instances_of_itself(cuda: FakeCuda) -> None:
    assert type(devguard.guard(1)) is devguard.guard
    assert type(Custom(1)) is Custom
    assert type(devguard.remap(1)) is devguard.remap
    with Custom(1):
        assert cuda.current == 1


def test_building_a_guard_checks_no_device_and_touches_no_cuda(cuda: FakeCuda) -> None:
    devguard.guard("cuda:99")
    devguard.guard(63)
    devguard.guard()
    assert cuda.calls == []


def test_a_guard_holds_no_state_of_an_entry(cuda: FakeCuda) -> None:
    value = devguard.guard("cuda:1", mode="error")
    before = pickle.dumps(value)
    with value:
        assert pickle.dumps(value) == before
    assert pickle.dumps(value) == before


# --- invalid arguments ---


def test_guard_without_parentheses_is_a_type_error_that_shows_them() -> None:
    with pytest.raises(TypeError, match=r"@devguard\.guard\(\)"):

        @devguard.guard
        def work() -> None: ...

    with pytest.raises(TypeError, match=r"@devguard\.remap\(\)"):

        @devguard.remap
        def other() -> None: ...

    with pytest.raises(TypeError, match=r"@devguard\.guard\(\)"):

        @devguard.guard
        class Model: ...

    with pytest.raises(TypeError, match=r"@devguard\.guard\(\)"):
        devguard.guard(staticmethod(pick))


@pytest.mark.parametrize("mode", ["loud", "", 1, True])
def test_a_bad_mode_is_a_configuration_error(mode: Any) -> None:
    with pytest.raises(ConfigError, match="repair"):
        devguard.guard("cpu", mode=mode)


def test_a_bad_door_is_a_configuration_error_that_lists_the_doors() -> None:
    with pytest.raises(ConfigError, match=r"buffers,.* jit, load"):
        devguard.guard("cpu", doors={"window": "warn"})
    with pytest.raises(ConfigError, match="'load'"):
        devguard.guard("cpu", doors={"load": "loud"})


@pytest.mark.parametrize("device", ["cuda", "gpu", -1, True, 1.5, torch.device("cuda")], ids=repr)
def test_a_bad_device_is_a_resolution_error_when_the_guard_is_built(device: Any) -> None:
    with pytest.raises(DeviceResolutionError):
        devguard.guard(device)


@pytest.mark.parametrize(
    "options",
    [{"device": 1, "argument": "x"}, {"device": 1, "resolve": pick}, {"argument": "x", "resolve": pick}],
)
def test_two_ways_of_naming_the_device_are_a_configuration_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="each name the device"):
        devguard.guard(**options)


@pytest.mark.parametrize("argument", ["gpu id", "", 1, "self.gpu"])
def test_argument_must_be_a_name(argument: Any) -> None:
    with pytest.raises(ConfigError, match="name of a parameter"):
        devguard.guard(argument=argument)


def test_resolve_must_be_callable() -> None:
    with pytest.raises(ConfigError, match="callable"):
        devguard.guard(resolve="cuda:1")  # type: ignore[arg-type]


def test_a_guard_by_argument_cannot_be_entered_without_a_function() -> None:
    with pytest.raises(ConfigError, match="only decorate"), devguard.guard(argument="gpu_id"):
        pass


# --- entering ---


def test_entering_makes_the_owners_device_current_and_leaving_restores_the_last_one(cuda: FakeCuda) -> None:
    torch.cuda.set_device(3)
    assert devguard.owner() is None
    with devguard.guard("cuda:1") as device:
        assert device == torch.device("cuda:1")
        assert cuda.current == 1
        assert devguard.owner() == torch.device("cuda:1")
        assert devguard.status()["owner"] == "cuda:1"
    assert cuda.current == 3
    assert devguard.owner() is None


def test_guards_nest_and_are_re_entrant(cuda: FakeCuda) -> None:
    outer = devguard.guard(1)
    with outer:
        with devguard.guard(2), outer:
            assert cuda.current == 1
            with outer:
                assert cuda.current == 1
            with devguard.guard("cpu"):
                assert devguard.owner() == torch.device("cpu")
                assert cuda.current == 1
            assert devguard.owner() == torch.device("cuda:1")
        assert cuda.current == 1
    assert cuda.current == 0


def test_a_guard_on_the_current_device_calls_the_runtime_as_often_as_torch_does(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    with devguard.guard(1):
        pass
    with devguard.guard(1):
        cuda.calls.clear()
        with devguard.guard(1):
            pass
        assert cuda.calls == [("exchange", 1), ("maybe_exchange", 1)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_restores_device_and_owner(cuda: FakeCuda, kind: type[BaseException]) -> None:
    with pytest.raises(kind), devguard.guard(1), devguard.guard(2):
        raise kind
    assert cuda.current == 0
    assert not local.stack
    assert devguard.owner() is None


@pytest.mark.parametrize("outer", [0, 1])
def test_the_device_is_restored_after_the_block_moved_it(cuda: FakeCuda, outer: int) -> None:
    torch.cuda.set_device(outer)
    with devguard.guard(1):
        torch.cuda.set_device(3)
    assert cuda.current == outer
    with devguard.guard(1):
        with devguard.guard(1):
            torch.cuda.set_device(3)
        assert cuda.current == 1
    assert cuda.current == outer


MOVERS: dict[str, Callable[[FakeCuda], object]] = {
    "exchange": lambda cuda: torch._C._cuda_exchangeDevice(3),
    "maybe_exchange": lambda cuda: torch._C._cuda_maybeExchangeDevice(3),
    "set_device": lambda cuda: torch.cuda.set_device(3),
    "native code": lambda cuda: setattr(cuda._local, "index", 3),  # as cudaSetDevice in a library: no call of torch
}


@pytest.mark.parametrize("move", MOVERS.values(), ids=MOVERS)
@pytest.mark.parametrize("make", [lambda: devguard.guard(1), lambda: devguard.guard("cuda:1", mode="observe")])
@pytest.mark.parametrize("outer", [0, 1])
def test_the_device_is_restored_whatever_moved_it(
    cuda: FakeCuda, move: Callable[[FakeCuda], object], make: Callable[[], Any], outer: int
) -> None:
    with make():
        pass
    torch.cuda.set_device(outer)
    with make():
        move(cuda)
    assert cuda.current == outer
    make()(lambda: move(cuda))()
    assert cuda.current == outer
    with make():
        with make():
            move(cuda)
        assert cuda.current == 1
        move(cuda)
    assert cuda.current == outer


def test_a_device_moved_before_a_nested_scope_is_restored_by_the_outer_one(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    with devguard.guard(1):
        torch.cuda.set_device(3)
        with devguard.guard(1):
            assert cuda.current == 1
        assert cuda.current == 3
        with devguard.unguarded():
            assert cuda.current == 3
    assert cuda.current == 1


def test_a_guard_after_uninstall_works_again(cuda: FakeCuda) -> None:
    with devguard.guard(1):
        pass
    devguard.uninstall()
    with devguard.guard(1):
        assert cuda.current == 1
        assert devguard.status()["doors"]["load"]["open"]
    assert cuda.current == 0


def test_a_guard_restores_its_device_after_uninstall_inside_it(cuda: FakeCuda) -> None:
    with devguard.guard(1):
        devguard.uninstall()
        assert cuda.current == 1
        torch.cuda.set_device(2)
    assert cuda.current == 0


def test_each_thread_has_scopes_of_its_own(cuda: FakeCuda) -> None:
    shared = devguard.guard(1)
    barrier = threading.Barrier(4)
    seen: list[tuple[int, str]] = []

    def work(index: int) -> None:
        with shared, devguard.guard(index):
            barrier.wait()
            seen.append((cuda.current, str(devguard.owner())))
            barrier.wait()
        seen.append((cuda.current, str(devguard.owner())))

    with devguard.guard(3):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cuda.current == 3
    assert sorted(seen[:4]) == [(index, f"cuda:{index}") for index in range(4)]
    assert seen[4:] == [(3, "cuda:3")] * 4  # the scopes that they inherited from the main thread


def test_many_threads_share_one_guard_object(cuda: FakeCuda) -> None:
    shared = devguard.guard(2, mode="observe")

    def work(_: int) -> bool:
        for _ in range(200):
            with shared, shared:
                if cuda.current != 2:
                    return False
        return cuda.current == 0

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


# --- resolve ---


def test_resolve_is_called_at_each_entry(cuda: FakeCuda) -> None:
    devices = iter([1, "cuda:2", torch.device("cpu")])
    value = devguard.guard(resolve=lambda: next(devices))
    for expected in (1, 2, 0):
        with value:
            assert cuda.current == expected


def test_resolve_is_called_for_decorated_functions_too(cuda: FakeCuda) -> None:
    @devguard.guard(resolve=pick)
    def work() -> int:
        return cuda.current

    assert work() == 2


def test_the_environment_is_read_when_resolve_returns_none(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with devguard.guard(resolve=lambda: None):
        assert cuda.current == 3


def test_a_bad_value_from_resolve_is_an_error_that_names_the_function(cuda: FakeCuda) -> None:
    def choose() -> str:
        return "gpu"

    with pytest.raises(DeviceResolutionError, match=r"choose\(\) returned is 'gpu'"), devguard.guard(resolve=choose):
        pass


def test_an_exception_from_resolve_is_raised_and_no_scope_is_left(cuda: FakeCuda) -> None:
    def choose() -> str:
        raise LookupError("no device today")

    with pytest.raises(LookupError, match="today"), devguard.guard(resolve=choose):
        pass
    assert devguard.owner() is None


def test_devguard_off_still_sets_the_device(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    with devguard.guard(1):
        assert cuda.current == 1
    assert cuda.current == 0


# --- the search for an owner ---


def test_guard_without_a_device_follows_the_environment_then_the_enclosing_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeCuda(4).installed() as cuda, devguard.guard(3):
        with devguard.guard():
            assert cuda.current == 3
        monkeypatch.setenv("LOCAL_RANK", "1")
        with devguard.guard():
            assert cuda.current == 1
        monkeypatch.setenv("DEVGUARD_DEVICE", "cuda:2")
        with devguard.guard():
            assert cuda.current == 2
        assert cuda.current == 3


def test_the_environment_is_read_at_each_entry_and_not_when_the_guard_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = devguard.guard()
    with FakeCuda(4).installed() as cuda:
        for rank in ("1", "2"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            with scope:
                assert cuda.current == int(rank)


def test_a_guard_out_of_range_names_cuda_visible_devices_and_leaves_no_scope() -> None:
    with FakeCuda(2).installed() as cuda:
        with pytest.raises(DeviceResolutionError, match="CUDA_VISIBLE_DEVICES"), devguard.guard(2):
            pass
        assert devguard.owner() is None
        assert cuda.calls == []


@pytest.mark.parametrize("kind", [devguard.guard, devguard.remap])
@pytest.mark.parametrize("mode", modes.MODES)
def test_the_mode_may_follow_the_device(kind: type[devguard.guard], mode: Any) -> None:
    for device in ("cuda:1", 1, "cpu", torch.device("cuda", 1)):
        assert kind(device, mode) == kind(device, mode=mode)
        assert kind(device, mode, doors={"load": "warn"}) == kind(device, mode=mode, doors={"load": "warn"})
    assert kind(argument=mode).parameter == mode  # without a device it is the name of a parameter
    assert kind(None, mode).parameter == mode


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            ("warn", "cuda:1"),
            {},
            r"guard\('warn', 'cuda:1'\): the device comes first, .*Write guard\('cuda:1', 'warn'\)",
        ),
        (("error", "warn"), {}, "the device comes first, then the mode"),
        (("cuda:1", "loud"), {}, "'loud' each name the device.*A mode comes second: off, observe, warn, repair, error"),
        (("cuda:1", "warn"), {"mode": "error"}, "names the mode twice, also by mode='error'"),
        (("cuda:1", "warn"), {"resolve": pick}, "device and resolve each name the device"),
    ],
)
def test_a_confused_order_is_shown_as_it_was_written(values: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devguard.guard(*values, **options)
