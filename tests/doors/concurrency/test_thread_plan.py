"""What a thread or a task takes over, as planned on the thread that starts it."""

from __future__ import annotations

import threading
from concurrent.futures.thread import _worker  # type: ignore[attr-defined]
from typing import Any

import pytest
import wrapt

import devguard
from devguard.doors.concurrency import thread_plan
from devguard.doors.concurrency.thread_plan import Start
from devguard.ownership.owner import owner_of_index
from devguard.ownership.stack import local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean", "cuda")


def work() -> None:
    """Count as user code."""


def plan(default: int | None = 0) -> tuple[list[str | None], int, bool]:
    """Return the owners and the device of the plan for `work`, and whether it is only observed."""
    start: Start | None = thread_plan.plan(work, default)
    assert start is not None
    return [owner and owner.tag for _, owner, _ in start.entries], start.device, start.observed


def strays() -> list[tuple[str, str, str]]:
    return [(stray.door, stray.source, stray.action) for stray in devguard.strays()]


def test_without_an_owner_and_a_scope_a_thread_is_left_alone() -> None:
    assert thread_plan.plan(work, 0) is None


def test_a_thread_takes_over_the_scopes_and_the_device() -> None:
    with devguard.guard("cpu"), devguard.guard(1):
        assert plan() == (["cpu", "cuda:1"], 1, False)
    assert strays() == [("threads", "cuda:0", "placed")]


def test_the_owner_of_device_0_and_the_owner_cpu_cause_no_stray() -> None:
    with devguard.guard(0):
        assert plan() == (["cuda:0"], 0, False)
    with devguard.guard("cpu"):
        assert plan() == (["cpu"], -1, False)
    assert strays() == []


@pytest.mark.parametrize("mode", ["observe", "warn"])
def test_a_mode_that_does_not_repair_leaves_the_device_and_judges_later(mode: Any) -> None:
    with devguard.guard(1, mode=mode):
        assert plan() == (["cuda:1"], -1, True)
        start = thread_plan.plan(work, 0)
    assert start is not None
    assert start.origin is not None
    assert strays() == []


def test_a_closed_door_leaves_the_thread_alone() -> None:
    with devguard.guard(1, doors={"threads": "off"}):
        assert thread_plan.plan(work, 0) is None
    with devguard.guard(1), devguard.unguarded():
        assert plan() == (["cuda:1", None], -1, False)


def test_the_mode_error_refuses_only_where_it_names_the_door() -> None:
    with devguard.guard(1, mode="error"):
        assert plan() == (["cuda:1"], 1, False)
    with devguard.guard(1, doors={"threads": "error"}), pytest.raises(devguard.StrayDeviceError, match="threads"):
        thread_plan.plan(work, 0)


def test_an_inherited_scope_sets_the_same_modes() -> None:
    scope = devguard.guard(1, mode="warn", doors={"load": "off"})
    inherited = thread_plan.Inherited((scope, None, -1), local.stack)
    assert (inherited.mode_of("load"), inherited.mode_of("jit")) == ("off", "warn")
    assert inherited.names("load")
    assert not inherited.names("jit")
    assert not inherited.requests("buffers")


def test_a_worker_of_a_pool_takes_over_only_the_owner_of_the_process() -> None:
    with devguard.guard(1):
        assert thread_plan.plan_worker() is None
        devguard.install(device=2)
        start = thread_plan.plan_worker()
    assert start is not None
    assert (start.entries, start.device) == ((), 2)
    devguard.install("observe", 2)
    assert thread_plan.plan_worker() is None


@pytest.mark.parametrize("wrapped", [None, (threading.Thread, "run"), (threading.Timer, "run"), (threading, "Timer")])
def test_wrappers_of_a_tracer_change_no_plan(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper of a method is a new object at each look-up, and a function may replace the class."""

    class OwnRun(threading.Thread):
        def run(self) -> None: ...

    kinds = threading.Thread(target=_worker), threading.Thread(target=work), threading.Timer(0, _worker), OwnRun()
    if wrapped == (threading, "Timer"):
        monkeypatch.setattr(threading, "Timer", lambda *arguments: None)
    elif wrapped:
        wrapper = wrapt.FunctionWrapper(
            vars(wrapped[0])[wrapped[1]], lambda call, _, args, kwargs: call(*args, **kwargs)
        )
        monkeypatch.setattr(*wrapped, wrapper)
    with devguard.guard(1):
        plans = [thread_plan.plan_thread(each, None, None) for each in kinds]
    assert [start and start.device for start in plans] == [None, 1, None, 1]
    assert strays() == [("threads", "cuda:0", "placed")]


def test_a_verdict_passes_and_an_error_inside_devguard_is_recorded(cuda: FakeCuda) -> None:
    with devguard.guard(1, doors={"threads": "error"}), pytest.raises(devguard.StrayDeviceError):
        thread_plan.failures.safely(thread_plan.judge_placement, owner_of_index(1), 0)
    thread_plan.failures.clear()
    assert thread_plan.failures.safely(lambda: 1 / 0) is None
    assert list(thread_plan.failures) == ["ZeroDivisionError: division by zero"]
    thread_plan.failures.clear()
