"""Wrappers such as tracers put around functions of Python and torch: `with_wrapt`, and `with_closures`.

Each returns a function that removes its wrappers. `surroundings.installed_as` loads this file under the name of a
tracer, because it stands for an installed package.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import wrapt

Remove = Callable[[], None]

_FUNCTIONS = [
    (concurrent.futures.ThreadPoolExecutor, "submit"),
    (pickle, "loads"),
    (pickle, "load"),
    (asyncio.BaseEventLoop, "create_task"),
    (asyncio, "create_task"),
]
_context: contextvars.ContextVar[object] = contextvars.ContextVar("trace", default=None)


def _of_torch() -> list[tuple[Any, str]]:
    return [(sys.modules["torch"], "load")] if "torch" in sys.modules else []


def with_wrapt() -> Remove:
    """Wrap functions and methods as ddtrace does; the class ``pickle.Unpickler`` and new locks are proxies, too."""

    def traced(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    def profiled(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapt.ObjectProxy(wrapped(*args, **kwargs))

    methods = [(threading.Thread, name) for name in ("__init__", "start", "run")]
    put: list[tuple[Any, str]] = [*methods, *_FUNCTIONS, (pickle, "Unpickler"), (threading, "Lock"), *_of_torch()]
    put = [(owner, name) for owner, name in put if type(vars(owner)[name]) is not wrapt.FunctionWrapper]
    for owner, name in put:
        setattr(owner, name, wrapt.FunctionWrapper(vars(owner)[name], profiled if name == "Lock" else traced))

    def remove() -> None:
        for owner, name in put:
            found = vars(owner)[name]
            if isinstance(found, wrapt.FunctionWrapper):
                setattr(owner, name, found.__wrapped__)

    return remove


def with_closures() -> Remove:
    """Wrap functions in closures, and attach a context to threads, timers and tasks, as OpenTelemetry does.

    A thread that is started gets a `run` of its own, too, as Sentry's integration does it.
    """
    put: list[tuple[Any, str, Any, Any]] = []

    def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = vars(owner)[name]
        if not hasattr(original, "traced"):
            ours = functools.wraps(original)(make(original))
            ours.traced = True
            put.append((owner, name, original, ours))
            setattr(owner, name, ours)

    def starting(original: Any) -> Any:
        def start(self: Any) -> None:
            self.trace = _context.get()
            run = self.run
            self.run = functools.wraps(run)(lambda: run())
            return original(self)

        return start

    def running(original: Any) -> Any:
        def run(self: Any) -> None:
            token = _context.set(self.trace)
            try:
                return original(self)
            finally:
                _context.reset(token)

        return run

    def submitting(original: Any) -> Any:
        def submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            trace = _context.get()

            def attached(*args: Any, **kwargs: Any) -> Any:
                token = _context.set(trace)
                try:
                    return fn(*args, **kwargs)
                finally:
                    _context.reset(token)

            return original(self, attached, *args, **kwargs)

        return submit

    def calling(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        return call

    replace(threading.Thread, "start", starting)
    replace(threading.Thread, "run", running)
    replace(threading.Timer, "run", running) if isinstance(threading.Timer, type) else None
    replace(threading, "Timer", calling)
    replace(*_FUNCTIONS[0], submitting)
    for owner, name in [*_FUNCTIONS[1:], *_of_torch()]:
        replace(owner, name, calling)

    def remove() -> None:
        for owner, name, original, ours in reversed(put):
            if vars(owner)[name] is ours:
                setattr(owner, name, original)

    return remove
