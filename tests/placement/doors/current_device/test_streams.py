"""The door ``streams`` on simulated GPUs: streams and events on a device other than the owner's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.reporting.journal import journal
from tests.helpers.programs import run_child

KINDS = (torch.cuda.Stream, torch.cuda.ExternalStream, torch.cuda.Event)


def found() -> list[tuple[str, str, int]]:
    return [(s.source, s.action, s.count) for s in journal.strays() if s.door == "streams"]


WAYS: dict[str, Callable[[], Any]] = {
    "by index": lambda: torch.cuda.Stream(2),
    "by name": lambda: torch.cuda.Stream(device="cuda:2", priority=-1),
    "by device": lambda: torch.cuda.Stream(torch.device("cuda", 2)),
}


def under_device_2(make: Callable[[], Any]) -> Any:
    with torch.cuda.device(2):
        return make()


@pytest.mark.parametrize("how", [*WAYS, "current"])
class TestAStreamOfAnotherDevice:
    def make(self, how: str) -> Any:
        return WAYS[how]() if how in WAYS else under_device_2(torch.cuda.Stream)

    def test_unguarded_the_stream_is_made_there_and_not_recorded(self, how):
        assert self.make(how).device.index == 2
        assert devguard.strays() == ()

    def test_guarded_the_stream_is_made_there_and_recorded(self, how):
        with guard(1):
            assert self.make(how).device.index == 2
        assert found() == [("cuda:2", "observed" if how == "current" else "kept", 1)]
        (stray,) = (s for s in journal.strays() if s.door == "streams")
        assert stray.site.file == __file__

    def test_error_mode_refuses_before_the_stream_is_made(self, how):
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError, match="cuda:2, but this scope owns"):
            self.make(how)
        assert found() == [("cuda:2", "refused", 1)]

    def test_off_unguarded_and_allowed_record_nothing(self, how):
        with guard(1, mode="off"):
            self.make(how)
        with guard(1), devguard.unguarded():
            self.make(how)
        devguard.allow("cuda:2")
        for mode in ("repair", "error"):
            with guard(1, mode=mode):
                self.make(how)
        assert found() == []


def test_warn_mode_warns_once_for_a_chosen_current_device():
    with guard(1, doors={"streams": "warn"}), pytest.warns(devguard.StrayDeviceWarning) as caught:
        for _ in range(2):
            under_device_2(torch.cuda.Stream)
    assert len(caught) == 1
    assert found() == [("cuda:2", "warned", 2)]


# A thread that has chosen no device, in a process that owns cuda:1: its current device is 0, which holds no context.
LOST = """
import json, _thread, threading, torch, devguard, sys
ctx = lambda: [device.index for device in devguard.contexts()]
rows = lambda: [[s.source, s.target, s.action, s.count] for s in devguard.strays() if s.door == "streams"]
def lost(work):
    got, ended = [], threading.Lock()
    ended.acquire()
    def run():
        try: got.append(work())
        except BaseException as error: got.append(type(error).__name__)
        finally: ended.release()
    _thread.start_new_thread(run, ()); ended.acquire()
    return got[0]
devguard.install(mode=sys.argv[1], device=1)
"""


def lost(code: str, mode: str = "repair", prelude: str = LOST) -> Any:
    """Run `code` in a fresh process that owns cuda:1; return the JSON that it prints."""
    return json.loads(run_child(code, prelude=prelude, arguments=[mode], options=["-W", "error::UserWarning"]))


MAKERS = {
    "a stream": "torch.cuda.Stream().device.index",
    "a stream of a bare cuda": "torch.cuda.Stream('cuda', -1).device.index",
    "a stream by keyword": "torch.cuda.Stream(device=None, priority=-1).device.index",
    "an external stream": "torch.cuda.ExternalStream(pointer).device.index",
    "an event": "[event := torch.cuda.Event(), event.record(), event.device.index][-1]",
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
class TestOnAThreadThatHasChosenNoDevice:
    CODE = "pointer = torch.cuda.Stream(1).cuda_stream\nprint(json.dumps([lost(lambda: {}), ctx(), rows()]))"

    def test_unguarded_the_object_is_made_on_device_0(self, make):
        code = self.CODE.replace("ctx()", "0 in ctx()").format(make)
        unguarded = LOST.replace("devguard.install", "torch.cuda.set_device(1); (lambda **_: 0)")
        assert lost(code, prelude=unguarded) == [0, "External" not in make, []]  # an external stream makes nothing

    def test_guarded_the_object_is_made_on_the_owner(self, make):
        assert lost(self.CODE.format(make)) == [1, [1], [["cuda:0", "cuda:1", "repaired", 1]]]

    def test_observe_records_error_refuses_and_off_ignores(self, make):
        index, contexts, strays = lost(self.CODE.format(make), "observe")
        assert (index, 0 in contexts) == (0, "External" not in make)
        assert strays == [["cuda:0", "cuda:0", "observed", 1]]
        assert lost(self.CODE.format(make), "error") == [
            "StrayDeviceError",
            [1],
            [["cuda:0", "cuda:0", "refused", 1]],
        ]
        assert lost(self.CODE.format(make), "off")[::2] == [0, []]

    def test_device_0_is_used_if_it_has_a_context(self, make):
        opened = (
            "import ctypes; ctypes.CDLL('libcuda.so.1').cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)"
        )
        index, _, strays = lost(f"torch.cuda.init()\n{opened}\n{self.CODE.format(make)}")
        assert index == 0
        assert strays == [["cuda:0", "cuda:0", "observed", 1]] or "Event" in make


def test_the_first_stream_of_the_process_is_made_on_the_owner_too():
    """For the first stream torch queries the current device's range of priorities, which opens that device."""
    code = f"torch.cuda.init()\nprint(json.dumps([lost(lambda: {MAKERS['an event']}), ctx(), len(rows())]))"
    assert lost(code) == [1, [1], 1]


def test_an_event_that_is_recorded_on_a_stream_of_the_owner_is_no_stray():
    code = (
        "stream = torch.cuda.Stream(1)\n"
        "def work():\n"
        "    event = torch.cuda.Event(); event.record(stream); return [event.device.index, event.query()]\n"
        "print(json.dumps([lost(work), ctx(), rows()]))"
    )
    assert lost(code, "error") == [[1, True], [1], []]


class TestExternalStreams:
    def test_an_external_stream_is_recorded_once_with_the_named_or_current_device(self):
        pointer = torch.cuda.Stream(2).cuda_stream
        with guard(1):
            assert torch.cuda.ExternalStream(pointer, 2).device.index == 2
            assert torch.cuda.ExternalStream(stream_ptr=pointer, device="cuda:2").cuda_stream == pointer
            under_device_2(lambda: torch.cuda.ExternalStream(pointer))
            torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)
        assert [row[1:] for row in found()] == [("kept", 1), ("kept", 1), ("observed", 1)]


class TestEvents:
    def test_an_event_made_while_another_device_is_current_is_recorded_or_refused(self):
        with guard(1):
            under_device_2(lambda: torch.cuda.Event(enable_timing=True))
        with guard(1, mode="error"), pytest.raises(devguard.StrayDeviceError):
            under_device_2(torch.cuda.Event)
        assert [row[:2] for row in found()] == [("cuda:2", "observed"), ("cuda:2", "refused")]

    def test_an_event_that_torch_makes_for_a_stream_of_the_owner_is_no_stray(self):
        with guard(1, doors={"streams": "error"}):
            stream, side = torch.cuda.Stream(), torch.cuda.Stream()
            with torch.cuda.device(2):
                stream.record_event().synchronize()
                side.wait_stream(stream)
        assert found() == []


class TestWellBehavedPrograms:
    def test_streams_and_events_on_the_owner_are_not_recorded(self):
        with guard(1, mode="error"):
            for device in (None, 1, -1, "cuda:1", "cuda", torch.device("cuda")):
                assert torch.cuda.Stream(device).device.index == 1
            with torch.cuda.stream(torch.cuda.Stream()):
                event = torch.cuda.Event()
                event.record()
                torch.ones(4, device="cuda").record_stream(torch.cuda.current_stream())
            event.synchronize()
        assert found() == []

    def test_current_and_default_streams_of_any_device_are_no_strays(self):
        with guard(1, mode="error"):
            for index in range(torch.cuda.device_count()):
                assert torch.cuda.current_stream(index).device.index == index
                assert torch.cuda.default_stream(f"cuda:{index}").device.index == index
        assert found() == []

    def test_torchs_own_errors_are_raised(self):
        with guard(1, mode="error"):
            with pytest.raises((RuntimeError, ValueError)):
                torch.cuda.Stream("cpu")
            with pytest.raises(TypeError):
                torch.cuda.Stream(priority="high")
            with pytest.raises(TypeError):
                torch.cuda.Event(nothing=1)
            with pytest.raises(RuntimeError):
                torch.cuda.Stream("nonsense")

    def test_subclasses_from_before_and_after_the_door_opened_work(self):
        class Before(torch.cuda.Stream):
            def __new__(cls, tag: str, **options: Any) -> Any:
                made = super().__new__(cls, **options)
                made.tag = tag
                return made

        with guard(1):

            class After(torch.cuda.Stream):
                pass

            one, two = Before("x"), After(priority=-1)
            assert (type(one), one.tag, type(two)) == (Before, "x", After)
            assert isinstance(one, torch.cuda.Stream)
            assert issubclass(After, torch._C._CudaStreamBase)
            Before("y", device=2)
        assert found() == [("cuda:2", "kept", 1)]
        assert isinstance(After(), After)

    def test_torch_compile_traces_streams_as_before(self):
        def step(x: torch.Tensor) -> torch.Tensor:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y = x.reshape(2, 4)
            torch.cuda.current_stream().wait_stream(side)
            return y

        with guard(1, mode="error"):
            x = torch.ones(8).to("cuda:1")
            compiled: Callable[..., Any] = torch.compile(step, backend="eager")
            assert compiled(x).shape == (2, 4)
        assert found() == []


class TestTheCpuOwner:
    def test_error_mode_refuses_a_stream_before_cuda_is_initialised(self):
        code = (
            "with devguard.guard('cpu', mode='error'):\n"
            "    torch.cuda.Event()\n"
            "    for make in (torch.cuda.Stream, lambda: torch.cuda.Stream(1)):\n"
            "        try: make()\n"
            "        except devguard.StrayDeviceError: print(torch.cuda.is_initialized(), devguard.contexts())\n"
        )
        assert run_child(code).splitlines() == ["False ()", "False ()"]


def test_names_and_signatures_are_torchs():
    before = [(vars(kind)["__new__"].__func__, inspect.signature(kind)) for kind in KINDS]
    with guard(1):
        for kind, (original, signature) in zip(KINDS, before, strict=True):
            assert kind.__new__ is not original
            assert kind.__new__.__qualname__ == original.__qualname__
            assert inspect.signature(kind) == signature


def test_uninstall_restores_exactly_the_originals():
    before = [vars(kind)["__new__"] for kind in KINDS]
    record = vars(torch.cuda.Event)["record"]
    with guard(1):
        assert devguard.status()["doors"]["streams"]["watched"] == [f"torch.cuda.{kind.__name__}" for kind in KINDS]
    assert devguard.uninstall() == []
    assert vars(torch.cuda.Event)["record"] is record
    assert all(vars(kind)["__new__"] is original for kind, original in zip(KINDS, before, strict=True))
    with guard(1):
        devguard.uninstall()
        under_device_2(torch.cuda.Event)
        torch.cuda.Stream(2)
    assert found() == []


def test_a_torch_without_the_method_is_a_problem_in_the_status(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", type("Event", (), {"__module__": torch.cuda.Event.__module__}))
    with guard(1):
        row = devguard.status()["doors"]["streams"]
    assert not row["open"]
    assert "Event.__new__: torch" in row["problem"]
    assert isinstance(vars(torch.cuda.Stream)["__new__"], staticmethod)
