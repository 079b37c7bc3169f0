"""`call_afterwards`: a function that is called when the call that the user's code is making has returned."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devguard.support import call_end


@pytest.fixture(autouse=True)
def _no_profiler() -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(None)
    yield
    sys.setprofile(before)


def ask(seen: list[str], accepted: list[bool] | None = None) -> Callable[[Any], Any]:
    """Return a hook for json.loads, whose own frames are no user code, which asks for a call afterwards."""

    def hook(value: Any) -> Any:
        frame = sys._getframe(1)
        answer = call_end.call_afterwards(frame, lambda: seen.append("afterwards"))
        (accepted if accepted is not None else []).append(answer)
        seen.append("inside")
        return value

    return hook


def test_the_function_is_called_before_the_next_call_of_the_users_code() -> None:
    seen: list[str] = []
    json.loads("{}", object_hook=ask(seen))
    seen.append("next")
    assert seen == ["inside", "afterwards", "next"]
    assert sys.getprofile() is None


def test_the_function_is_called_before_the_next_python_function_runs() -> None:
    seen: list[str] = []

    def following() -> None:
        seen[len(seen) :] = ["next"]

    json.loads("{}", object_hook=ask(seen))
    following()
    assert seen == ["inside", "afterwards", "next"]


def test_the_function_is_called_when_the_users_function_returns() -> None:
    seen: list[str] = []

    def user() -> Any:
        return json.loads("{}", object_hook=ask(seen))

    user()
    assert seen == ["inside", "afterwards"]


def test_the_function_is_called_after_an_exception() -> None:
    seen: list[str] = []

    def fail(value: Any) -> Any:
        ask(seen)(value)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it is the one above
        json.loads("{}", object_hook=fail)
    assert seen == ["inside", "afterwards"]


def test_what_the_function_raises_does_not_reach_the_program() -> None:
    def hook(value: Any) -> Any:
        call_end.call_afterwards(sys._getframe(1), functools.partial(int, "x"))
        return value

    assert json.loads("{}", object_hook=hook) == {}
    assert sys.getprofile() is None


def test_a_profiler_of_the_program_is_left_alone() -> None:
    def profiler(*event: Any) -> None:
        """Count nothing."""

    seen: list[str] = []
    accepted: list[bool] = []
    sys.setprofile(profiler)
    json.loads("{}", object_hook=ask(seen, accepted))
    assert sys.getprofile() is profiler
    sys.setprofile(None)
    assert (seen, accepted) == (["inside"], [False])


def test_a_call_with_very_many_events_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_end, "MAX_EVENTS", 2)
    seen: list[str] = []

    def hook(value: Any) -> Any:
        ask(seen)(value)
        json.dumps([1])
        return value

    json.loads("{}", object_hook=hook)
    assert seen == ["inside"]
    assert sys.getprofile() is None
