"""Greenlets (gevent, eventlet): each has its own scopes and current device, as a thread has.

The runtime keeps one current device for a thread, and greenlets take turns on it. So where a thread that has taken a
device runs greenlets, each switch saves the device and the scopes of the greenlet that is left, and restores those of
the one that goes on. A new greenlet starts without scopes, like a new task of asyncio, on the device that was current
outside the scopes of the greenlet that was left. Where a library has replaced ``threading.local``, the stacks are the
greenlets' own anyway, and only the device is exchanged.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from devguard.support.accelerator import Exchange
from devguard.support.notices import alert

__all__ = ["forget_devices", "is_imported", "on_import", "register", "stop", "watch"]

Trace = Callable[[str, Any], object]


# What a stack holds beside its entries, with what it is at the start of a greenlet.
_FRESH: dict[str, Callable[[], Any]] = {
    "changes": list,
    "hidden": tuple,
    "inherited": lambda: None,
    "judged": lambda: None,
    "starts": dict,
    "task": lambda: None,
}


class Suspended(NamedTuple):
    """What a greenlet that does not run has left: its device, the entries of its stack, and what else that holds."""

    device: int
    entries: Sequence[Any]
    rest: Mapping[str, Any]


# The stacks of greenlets, where a library has replaced ``threading.local``.
_stacks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Watch:
    """The trace function of one thread, which ``greenlet`` calls at each switch, in the greenlet that goes on.

    Parameters
    ----------
    stack : Stack or None
        The stack of the thread; None if each greenlet has one.
    exchange : Exchange or None
        Reads and restores the device; None until the thread takes one.
    """

    def __init__(self, stack: Any, exchange: Exchange | None) -> None:
        self.stopped = False
        self.previous: Trace | None = None
        self.exchange = exchange
        self._stack = stack
        self._suspended: weakref.WeakKeyDictionary[Any, Suspended] = weakref.WeakKeyDictionary()

    def __call__(self, event: str, args: Any) -> None:
        if event in ("switch", "throw") and not self.stopped:
            try:
                self._switch(*args)
            except Exception as error:  # noqa: BLE001 - it would be raised in the program's greenlet
                self.stopped = True
                alert(f"devguard no longer keeps greenlets of this thread apart: {type(error).__name__}: {error}")
        if self.previous is not None:
            self.previous(event, args)

    def _switch(self, origin: Any, target: Any) -> None:
        exchange = self.exchange
        device = -1 if exchange is None else exchange.read()
        stack = self._stack
        left = _stacks.get(origin) if stack is None else stack
        entries = [] if left is None else left.copy()
        kept = {} if stack is None else {name: getattr(stack, name) for name in _FRESH}
        self._suspended[origin] = Suspended(device, entries, kept)
        state = self._suspended.pop(target, None)
        if state is None:
            state = Suspended(-1, (), {name: make() for name, make in _FRESH.items()})
        known = state.device  # -1: it has not run yet, or not since the thread has taken a device
        resumed = known if known >= 0 else next((previous for _, _, previous in entries if previous >= 0), device)
        if stack is not None:
            stack[:] = state.entries
            for name, value in state.rest.items():
                setattr(stack, name, value)
        if exchange is not None and resumed != device:
            exchange.back(resumed)


# By the system's thread. A watch lives as long as its thread: greenlet keeps it as that thread's trace function.
_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
_prepare_again: list[Callable[[], None]] = []


def register(stack: Any) -> None:
    """Register the stack of the running greenlet, where each greenlet has one."""
    greenlet: Any = sys.modules.get("greenlet")
    if greenlet is not None:
        _stacks[greenlet.getcurrent()] = stack


def is_imported() -> bool:
    """Return whether this process can have greenlets."""
    return "greenlet" in sys.modules


def watch(stack: Any, exchange: Exchange | None) -> None:
    """Watch the greenlets of this thread, from now on also its device if `exchange` is given."""
    greenlet: Any = sys.modules["greenlet"]
    if not hasattr(greenlet, "settrace"):  # it is being imported
        return
    thread = threading.get_native_id()
    known = _watches.get(thread)
    if known is not None and not known.stopped and greenlet.gettrace() is not None:
        known.exchange = exchange or known.exchange
        return
    trace = Watch(stack, exchange)
    previous = greenlet.settrace(trace)
    trace.previous = previous.previous if isinstance(previous, Watch) else previous
    _watches[thread] = trace


def forget_devices() -> None:
    """Exchange only the scopes from now on, in a forked child that cannot use CUDA."""
    for trace in list(_watches.values()):
        trace.exchange = None


def on_import(prepare_again: Callable[[], None]) -> None:
    """Call `prepare_again` when ``greenlet`` is imported: threads that take a device are watched from then on."""
    if not _prepare_again:
        from devguard.support.import_hooks import when_imported  # imports wrapt

        when_imported("greenlet", _imported)
    _prepare_again[:] = [prepare_again]


def _imported(_: Any) -> None:
    for prepare_again in _prepare_again:
        prepare_again()


def stop() -> None:
    """Stop all watches. Another thread's trace function cannot be removed from here; it does nothing from now on."""
    _prepare_again.clear()
    greenlet: Any = sys.modules.get("greenlet")
    for trace in list(_watches.values()):
        trace.stopped = True
    _watches.clear()
    current = greenlet.gettrace() if greenlet is not None and hasattr(greenlet, "gettrace") else None
    if isinstance(current, Watch):
        greenlet.settrace(current.previous)
