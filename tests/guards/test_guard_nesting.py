"""Property tests: device and owner are those of the innermost scope, for any nesting and any order of steps."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import devguard
from devguard.modes import MODES
from devguard.ownership import in_force
from devguard.ownership.stack import local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")

FEW = settings(max_examples=60)

DEVICES = st.sampled_from(["cpu", "cuda:0", "cuda:1", "cuda:2", None])  # None: unguarded


def scope_of(device: str | None, mode: Any = None) -> Any:
    return devguard.unguarded() if device is None else devguard.guard(device, mode=mode)


@FEW
@given(st.recursive(st.just([]), lambda inner: st.lists(st.tuples(DEVICES, st.booleans(), inner), max_size=3)))
def test_nested_scopes_restore_device_and_owner(tree: Any) -> None:
    def walk(branches: Any, device: int, owner: str | None) -> None:
        for name, fails, children in branches:
            with contextlib.suppress(LookupError), scope_of(name):
                inside = int(name[5:]) if name and name != "cpu" else device
                assert cuda.current == inside
                assert str(devguard.owner()) == str(name)
                walk(children, inside, name)
                if fails:
                    raise LookupError
            assert cuda.current == device
            assert str(devguard.owner()) == str(owner)

    with FakeCuda(3).installed() as cuda:
        walk(tree, 0, None)
        assert not local.stack


@FEW
@given(st.lists(st.tuples(DEVICES, st.sampled_from([*MODES, None])), max_size=5))
def test_the_innermost_mode_wins(levels: list[tuple[str | None, Any]]) -> None:
    with FakeCuda(3).installed(), contextlib.ExitStack() as stack:
        guarded = "repair"  # the mode of the enclosing guards; unguarded() is off for code directly inside it
        for device, mode in levels:
            stack.enter_context(scope_of(device, mode))
            guarded = guarded if device is None else mode or guarded
            assert in_force.mode_of("load") == ("off" if device is None else guarded)


@FEW
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["next", "throw", "close"])), max_size=30), st.integers(0, 2)
)
def test_generators_in_any_order_of_steps_see_their_own_device_only(steps: list[tuple[int, str]], home: int) -> None:
    with FakeCuda(4).installed() as cuda, devguard.guard(home):
        seen: list[bool] = []

        @devguard.guard(argument="index")
        def work(index: int) -> Generator[None, None, None]:
            def right() -> None:
                seen.append(cuda.current == index and str(devguard.owner()) == f"cuda:{index}")

            try:
                while True:
                    right()
                    with contextlib.suppress(LookupError):
                        with devguard.guard(3):
                            yield
                        right()
                    right()
            finally:
                right()

        running = [work(index) for index in range(4)]
        for index, what in steps:
            if what == "next":
                next(running[index], None)
            elif what == "close":
                running[index].close()
                running[index] = work(index)
            else:
                with contextlib.suppress(LookupError):
                    running[index].throw(LookupError())
            assert cuda.current == home
            assert str(devguard.owner()) == f"cuda:{home}"
        for each in running:
            each.close()
        assert all(seen)
        assert cuda.current == home


DOORS = ["load", "jit", "threads"]
BY_NAME = st.dictionaries(st.sampled_from(DOORS), st.sampled_from(MODES))


@FEW
@given(
    process_wide=st.tuples(st.sampled_from(MODES), BY_NAME),
    levels=st.lists(st.tuples(st.none() | st.sampled_from(MODES), BY_NAME), max_size=4),
)
def test_a_mode_set_by_name_holds_until_a_scope_names_the_door_or_sets_a_mode(process_wide: Any, levels: Any) -> None:
    mode, by_name = process_wide
    with FakeCuda(3).installed(), contextlib.ExitStack() as stack:
        devguard.install(mode, "cuda:0", doors=by_name)
        stack.callback(devguard.uninstall)
        expected = {door: by_name.get(door, mode) for door in DOORS}
        for inner, named in levels:
            stack.enter_context(devguard.guard(1, mode=inner, doors=named))
            expected = {door: named.get(door, inner or expected[door]) for door in DOORS}
            assert {door: in_force.mode_of(door) for door in DOORS} == expected


@FEW
@given(
    device=st.none() | st.integers(0, 200) | st.sampled_from(["cpu", "cuda:3"]),
    mode=st.none() | st.sampled_from(MODES),
    doors=st.none() | st.dictionaries(st.sampled_from(["load", "jit", "buffers"]), st.sampled_from(MODES)),
    kind=st.sampled_from([devguard.guard, devguard.remap]),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_a_scope_is_a_value(device: Any, mode: Any, doors: Any, kind: Any, protocol: int) -> None:
    value = kind(device, mode=mode, doors=doors)
    again = kind(device, mode=mode, doors=doors)
    back = pickle.loads(pickle.dumps(value, protocol))
    assert value == again == back
    assert hash(value) == hash(again) == hash(back)
    assert repr(value) == repr(back)
    assert eval(repr(value)) == value
