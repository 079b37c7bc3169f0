"""The scopes as values and as context managers: guard, remap, unguarded, no_strays."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError, StrayDeviceError, StrayDeviceWarning
from devguard.guards import unwind
from devguard.guards.base import Bound
from devguard.modes import MODES
from devguard.ownership import in_force
from devguard.ownership.stack import local
from tests.helpers import tagging
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def pick() -> str:
    return "cuda:2"


class Custom(devguard.guard):
    """A guard of a program's own."""


def name(value: object) -> str:
    """The same in every process: no address."""
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


def test_a_subclass_has_plain_guards_of_its_own(cuda: FakeCuda) -> None:
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


# --- what is not a guard ---


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


def test_unguarded_without_parentheses_is_a_type_error() -> None:
    with pytest.raises(TypeError):

        @devguard.unguarded
        def work() -> None: ...


def test_decorating_a_class_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="Model"):

        @devguard.guard("cpu")
        class Model: ...


@pytest.mark.parametrize("thing", [1, "work", None, property(pick)], ids=name)
def test_decorating_what_cannot_be_called_is_a_type_error(thing: Any) -> None:
    with pytest.raises(TypeError, match="decorates functions"):
        devguard.guard("cpu")(thing)


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
    with pytest.raises(ConfigError, match="each say which device"):
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


def test_entering_makes_the_owners_device_current_and_leaving_gives_back(cuda: FakeCuda) -> None:
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


def test_a_guard_on_the_current_device_asks_for_no_more_than_one_exchange(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    with devguard.guard(1):
        pass
    with devguard.guard(1):
        cuda.calls.clear()
        with devguard.guard(1):
            pass
        assert cuda.calls == [("exchange", 1)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_restores_device_and_owner(cuda: FakeCuda, kind: type[BaseException]) -> None:
    with pytest.raises(kind), devguard.guard(1), devguard.guard(2):
        raise kind
    assert cuda.current == 0
    assert not local.stack
    assert devguard.owner() is None


@pytest.mark.parametrize("outer", [0, 1])
def test_a_device_that_the_block_moved_is_given_back(cuda: FakeCuda, outer: int) -> None:
    torch.cuda.set_device(outer)
    with devguard.guard(1):
        torch.cuda.set_device(3)
    assert cuda.current == outer
    with devguard.guard(1):
        with devguard.guard(1):
            torch.cuda.set_device(3)
        assert cuda.current == 1
    assert cuda.current == outer


def test_a_device_moved_before_a_nested_scope_is_given_back_by_the_outer_one(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    with devguard.guard(1):
        torch.cuda.set_device(3)
        with devguard.guard(1):
            assert cuda.current == 1
        assert cuda.current == 3
        with devguard.unguarded():
            assert cuda.current == 3
    assert cuda.current == 1


def test_a_device_moved_inside_unguarded_is_given_back_by_the_guard_around_it(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    with devguard.guard(1):
        with devguard.unguarded():
            torch.cuda.set_device(2)
        assert cuda.current == 2
    assert cuda.current == 1


def test_a_guard_after_uninstall_works_again(cuda: FakeCuda) -> None:
    with devguard.guard(1):
        pass
    devguard.uninstall()
    with devguard.guard(1):
        assert cuda.current == 1
        assert devguard.status()["doors"]["load"]["open"]
    assert cuda.current == 0


def test_uninstall_inside_a_guard_still_lets_it_give_its_device_back(cuda: FakeCuda) -> None:
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
    assert seen[4:] == [(3, "cuda:3")] * 4  # what they took over from who started them


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


def test_async_with_is_a_type_error_that_names_run() -> None:
    async def main(scoped: Any) -> None:
        async with scoped:
            pass

    for scoped in (devguard.guard("cpu"), devguard.remap("cpu"), devguard.unguarded()):
        coroutine = main(scoped)
        with pytest.raises(TypeError, match=r"run\(awaitable\)"):
            coroutine.send(None)


# --- resolve ---


def test_resolve_is_called_at_each_entry(cuda: FakeCuda) -> None:
    devices = iter([1, "cuda:2", torch.device("cpu")])
    value = devguard.guard(resolve=lambda: next(devices))
    for expected in (1, 2, 0):
        with value:
            assert cuda.current == expected


def test_resolve_serves_decorated_functions_too(cuda: FakeCuda) -> None:
    @devguard.guard(resolve=pick)
    def work() -> int:
        return cuda.current

    assert work() == 2


def test_resolve_that_returns_none_leaves_it_to_the_environment(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with devguard.guard(resolve=lambda: None):
        assert cuda.current == 3


def test_what_resolve_returns_wrongly_is_named(cuda: FakeCuda) -> None:
    def choose() -> str:
        return "gpu"

    with pytest.raises(DeviceResolutionError, match=r"choose\(\) returned is 'gpu'"), devguard.guard(resolve=choose):
        pass


def test_an_exception_of_resolve_comes_through_and_no_scope_is_left(cuda: FakeCuda) -> None:
    def choose() -> str:
        raise LookupError("no device today")

    with pytest.raises(LookupError, match="today"), devguard.guard(resolve=choose):
        pass
    assert devguard.owner() is None


# --- modes: the innermost scope that says anything wins ---


def mode(door: str = "load") -> str:
    return in_force.mode_of(door)


def test_repair_is_the_mode_where_nobody_says_anything() -> None:
    with devguard.guard("cpu"):
        assert mode() == "repair"


@pytest.mark.parametrize("value", MODES)
def test_the_innermost_scope_comes_before_the_outer_one(value: Any) -> None:
    with devguard.guard("cpu", mode="warn"):
        assert mode() == "warn"
        with devguard.guard("cpu", mode=value):
            assert mode() == value
            with devguard.guard("cpu"):
                assert mode() == value
            with devguard.remap("cpu"):
                assert mode() == value
        assert mode() == "warn"


def test_doors_come_before_the_mode_of_the_same_scope() -> None:
    with devguard.guard("cpu", mode="error", doors={"load": "observe"}):
        assert mode("load") == "observe"
        assert mode("jit") == "error"


def test_a_mode_inside_comes_before_a_door_outside() -> None:
    with devguard.guard("cpu", doors={"load": "observe"}):
        assert mode("load") == "observe"
        assert mode("jit") == "repair"
        with devguard.guard("cpu", mode="error"):
            assert mode("load") == "error"
        with devguard.guard("cpu", doors={"jit": "warn"}):
            assert mode("load") == "observe"
            assert mode("jit") == "warn"


def test_a_scope_comes_before_install_and_install_before_the_default() -> None:
    devguard.install("warn", "cpu", doors={"jit": "observe"})
    assert mode("load") == "warn"
    assert mode("jit") == "observe"
    with devguard.guard("cpu"):
        assert mode("load") == "warn"
        assert mode("jit") == "observe"
    with devguard.guard("cpu", mode="error"):
        assert mode("load") == mode("jit") == "error"


def test_unguarded_comes_before_everything_around_it() -> None:
    devguard.install("error", "cpu")
    with devguard.guard("cpu", mode="error"), devguard.unguarded():
        assert mode() == "off"
        assert devguard.owner() is None
        with devguard.guard("cpu", mode="warn"):
            assert mode() == "warn"


def test_inside_unguarded_a_guard_guards_again_with_the_mode_from_further_out() -> None:
    with devguard.guard("cpu", mode="warn"), devguard.unguarded():
        assert mode() == "off"
        with devguard.guard("cpu"):
            assert devguard.owner() == torch.device("cpu")
            assert mode() == "warn"
            with devguard.unguarded():
                assert mode() == "off"


# --- modes: what they do (the load door stands for all) ---

PAYLOAD = tagging.dumps(torch.arange(4.0))


@pytest.mark.parametrize(
    ("chosen", "landed", "actions"),
    [
        ("off", ["cuda:3"], []),
        ("observe", ["cuda:3"], ["observed"]),
        ("repair", [], ["repaired"]),
    ],
)
def test_what_a_mode_does(chosen: Any, landed: list[str], actions: list[str]) -> None:
    with tagging.landings() as seen, devguard.guard("cpu", mode=chosen):
        pickle.loads(PAYLOAD)
    assert seen == landed
    assert [stray.action for stray in devguard.strays()] == actions


def test_mode_error_raises_before_anything_lands() -> None:
    with (
        tagging.landings() as seen,
        devguard.guard("cpu", mode="error"),
        pytest.raises(StrayDeviceError, match=r"cuda:3.*owns cpu"),
    ):
        pickle.loads(PAYLOAD)
    assert seen == []
    assert [stray.action for stray in devguard.strays()] == ["refused"]


def test_mode_warn_lets_it_land_and_warns() -> None:
    with (
        tagging.landings() as seen,
        devguard.guard("cpu", mode="warn"),
        pytest.warns(StrayDeviceWarning, match="cuda:3"),
    ):
        pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]
    assert [stray.action for stray in devguard.strays()] == ["warned"]


def test_devguard_off_closes_every_door_whatever_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_devguard_off_still_sets_the_device(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    with devguard.guard(1):
        assert cuda.current == 1
    assert cuda.current == 0


def test_unguarded_leaves_everything_alone() -> None:
    with tagging.landings() as seen, devguard.guard("cpu", mode="error"):
        with devguard.unguarded():
            pickle.loads(PAYLOAD)
        with pytest.raises(StrayDeviceError):
            pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]


def test_unguarded_decorates_too() -> None:
    @devguard.unguarded()
    def work() -> Any:
        return pickle.loads(PAYLOAD)

    with tagging.landings() as seen, devguard.guard("cpu", mode="error"):
        work()
        assert devguard.owner() == torch.device("cpu")
    assert seen == ["cuda:3"]


# --- no_strays ---


def test_no_strays_is_quiet_where_nothing_strays() -> None:
    with devguard.guard("cpu"), devguard.no_strays():
        pickle.loads(pickle.dumps(torch.ones(2)))


def test_no_strays_raises_at_its_end_even_for_what_was_repaired() -> None:
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


# --- scopes that are misused ---


@pytest.fixture
def misuse() -> Iterator[None]:
    unwind._reported.clear()
    yield
    unwind._reported.clear()


@pytest.mark.usefixtures("misuse")
def test_a_scope_left_out_of_order_is_reported_at_the_users_line(cuda: FakeCuda) -> None:
    first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
    first.__enter__()
    second.__enter__()
    with pytest.warns(RuntimeWarning, match=r"held across an await or a yield.*run\(awaitable\)") as caught:
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        first.__exit__(None, None, None)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    assert cuda.current == 2
    assert devguard.owner() == torch.device("cuda:2")
    second.__exit__(None, None, None)
    assert cuda.current == 0
    assert devguard.owner() is None


@pytest.mark.usefixtures("misuse")
def test_a_scope_without_a_device_may_lie_between_those_left_out_of_order(cuda: FakeCuda) -> None:
    torch.cuda.set_device(3)
    first, between, second = devguard.guard("cuda:1"), devguard.guard("cpu"), devguard.guard("cuda:2")
    for each in (first, between, second):
        each.__enter__()
    with pytest.warns(RuntimeWarning, match="held across"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    between.__exit__(None, None, None)
    assert cuda.current == 3


@pytest.mark.usefixtures("misuse")
def test_the_last_device_is_given_back_when_only_scopes_without_one_are_left(cuda: FakeCuda) -> None:
    first, second = devguard.guard("cuda:1"), devguard.unguarded()
    first.__enter__()
    second.__enter__()
    with pytest.warns(RuntimeWarning, match="held across"):
        first.__exit__(None, None, None)
    assert cuda.current == 0
    second.__exit__(None, None, None)
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("scoped", [devguard.guard("cuda:1"), devguard.unguarded()], ids=repr)
def test_a_scope_left_on_another_thread_is_reported_there(cuda: FakeCuda, scoped: Any) -> None:
    caught: list[warnings.WarningMessage] = []
    entered = threading.Event()

    def leave() -> None:
        entered.wait()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            scoped.__exit__(None, None, None)
        caught.extend(seen)

    thread = threading.Thread(target=leave)
    thread.start()  # before the scope is entered: it takes nothing over
    scoped.__enter__()
    entered.set()
    thread.join()
    assert [(one.category, one.filename) for one in caught] == [(RuntimeWarning, __file__)]
    assert "thread that had not entered it" in str(caught[0].message)
    scoped.__exit__(None, None, None)
    assert devguard.owner() is None
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
def test_misuse_is_reported_once_per_call_site(cuda: FakeCuda) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            second.__exit__(None, None, None)
    assert len(caught) == 1
    assert cuda.current == 0


# --- bind ---


def module_level(value: int) -> tuple[int, str]:
    return value, str(devguard.owner())


class Worker:
    def method(self, value: int) -> tuple[int, str]:
        return module_level(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Worker)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("function", [module_level, Worker().method], ids=["function", "method"])
def test_bind_makes_a_picklable_callable(function: Any) -> None:
    bound = devguard.guard("cpu").bind(function)
    assert isinstance(bound, Bound)
    for each in (bound, pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert each(7) == (7, "cpu")
    assert devguard.owner() is None


def test_bind_takes_the_device_from_the_argument(cuda: FakeCuda) -> None:
    def work(gpu_id: int) -> int:
        return cuda.current

    bound = devguard.guard(argument="gpu_id").bind(work)
    assert bound(2) == 2
    assert bound(gpu_id=3) == 3


def test_bind_says_what_it_runs() -> None:
    assert repr(devguard.guard("cpu").bind(module_level)) == "devguard.guard('cpu').bind(module_level)"
