"""What may surround a program: options of Python, event loops, green threads, and tracers.

``python [OPTIONS] -m tests.helpers.surroundings NAME MODULE [ARGUMENT ...]`` sets the surroundings up and calls the
function ``main(surroundings, *arguments)`` of the module, which is imported after what comes before torch.
"""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import threading
import types
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

Remove = Callable[[], None]


class Surroundings:
    """Python as it is; the base of all others.

    Attributes
    ----------
    options : tuple of str
        Options of Python.
    is_outer : bool
        Whether it puts wrappers around devguard's.
    """

    options: tuple[str, ...] = ()
    is_outer = False

    def before_torch(self) -> None:
        """Set up what comes before torch is imported."""

    def before_first_guard(self) -> None:
        """Set up what comes after torch, and before the doors open."""

    def after_first_guard(self) -> None:
        """Set up what comes after the doors have opened."""

    def is_in_place(self) -> bool:
        """Return whether the program runs in these surroundings."""
        return not sys.warnoptions and not sys.flags.optimize and not sys.flags.dev_mode

    def remove(self) -> None:
        """Remove all wrappers."""

    def remove_outer(self) -> None:
        """Remove the wrappers around devguard's."""

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run an event loop until the coroutine has finished."""
        return asyncio.run(coroutine)

    async def together(self, *coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
        """Run coroutines as tasks; return their results."""
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        return [await task for task in tasks]

    @property
    def in_thread(self) -> Callable[..., Awaitable[Any]]:
        """The library's function that calls a function in a worker thread."""
        return asyncio.to_thread


class _WithOptions(Surroundings):
    def __init__(self, *options: str) -> None:
        self.options = options

    def is_in_place(self) -> bool:
        return "".join(self.options) in "".join(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]


class _Gevent(Surroundings):
    def before_torch(self) -> None:
        from gevent import monkey

        monkey.patch_all()

    def is_in_place(self) -> bool:
        from gevent import monkey

        return bool(monkey.is_module_patched("threading"))


class _Eventlet(Surroundings):
    def before_torch(self) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and says so
            import eventlet
        eventlet.monkey_patch()

    def is_in_place(self) -> bool:
        from eventlet import patcher

        return bool(patcher.is_monkey_patched("thread"))


class _Uvloop(Surroundings):
    def is_in_place(self) -> bool:
        async def module_of_the_loop() -> str:
            return type(asyncio.get_running_loop()).__module__

        return self.run(module_of_the_loop()) == "uvloop"

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        import uvloop

        return uvloop.run(coroutine)


class _Anyio(Surroundings):
    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        import anyio

        async def main() -> Any:
            return await coroutine

        return anyio.run(main)

    async def together(self, *coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
        import anyio

        results: dict[int, Any] = {}

        async def keep(index: int, coroutine: Coroutine[Any, Any, Any]) -> None:
            results[index] = await coroutine

        async with anyio.create_task_group() as group:
            for index, coroutine in enumerate(coroutines):
                group.start_soon(keep, index, coroutine)
        return [results[index] for index in range(len(coroutines))]

    @property
    def in_thread(self) -> Callable[..., Awaitable[Any]]:
        import anyio.to_thread

        return anyio.to_thread.run_sync


class _Traced(Surroundings):
    """Wrappers of a tracer, under devguard's or around them."""

    def __init__(self, package: str, function: str, *, is_first: bool) -> None:
        self._wrap = lambda: getattr(installed_as(package), function)()
        self.is_outer = not is_first
        self._removes: list[Remove] = []

    def _apply(self) -> None:
        self._removes.append(self._wrap())

    def before_torch(self) -> None:
        if not self.is_outer:
            self._apply()

    before_first_guard = before_torch  # torch's own functions

    def is_in_place(self) -> bool:
        found: Any = vars(threading.Thread)["start"]
        is_outer = is_of_tracer(found)
        return is_outer == self.is_outer and (is_outer or is_of_tracer(found.__wrapped__))

    def after_first_guard(self) -> None:
        if self.is_outer:
            self._apply()

    def remove(self) -> None:
        while self._removes:
            self._removes.pop()()

    def remove_outer(self) -> None:
        if self.is_outer:
            self.remove()


def is_of_tracer(function: Any) -> bool:
    """Return whether a function is a wrapper of tracers.py."""
    return hasattr(function, "traced") or hasattr(function, "_self_wrapper")


def installed_as(package: str) -> types.ModuleType:
    """Load tracers.py as a module of an installed package, whose code is not the user's."""
    name = f"{package}.tracers"
    if name not in sys.modules:
        module = types.ModuleType(name)
        source = Path(__file__).with_name("tracers.py").read_text()
        exec(compile(source, f"/environment/site-packages/{package}/tracers.py", "exec"), vars(module))
        sys.modules[name] = module
    return sys.modules[name]


SURROUNDINGS: dict[str, Surroundings] = {
    "plain": Surroundings(),
    "-W error": _WithOptions("-W", "error"),
    "-O": _WithOptions("-O"),
    "-X dev": _WithOptions("-X", "dev"),
    "gevent": _Gevent(),
    "eventlet": _Eventlet(),
    "uvloop": _Uvloop(),
    "anyio": _Anyio(),
    "wrapt, before": _Traced("ddtrace", "with_wrapt", is_first=True),
    "wrapt, after": _Traced("ddtrace", "with_wrapt", is_first=False),
    "closures, before": _Traced("opentelemetry", "with_closures", is_first=True),
    "closures, after": _Traced("opentelemetry", "with_closures", is_first=False),
}


def main(name: str, module: str, *arguments: str) -> None:
    surroundings = SURROUNDINGS[name]
    surroundings.before_torch()
    importlib.import_module(module).main(surroundings, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
