"""Work handed to the threads of anyio, asgiref, eventlet and gevent, and to loops of uvloop; for the door ``threads``.

Starlette and FastAPI use anyio, Django uses asgiref. What they hand to a thread, and what a thread hands back to the
event loop, runs within the scopes of the code that hands it over; see loops.py for the latter. The libraries may be
imported later, or never.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from devguard.doors.concurrency import loops, thread_plan
from devguard.doors.concurrency.pools import task
from devguard.doors.concurrency.thread_plan import failures
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["unwatch", "watch"]


class _State:
    """The patches of the door; None while it is closed."""

    def __init__(self) -> None:
        self.patches: Patches | None = None


_state = _State()


def watch(patches: Patches) -> None:
    """Patch the libraries, now or when they are imported."""
    _state.patches = patches
    for name, patch in _LIBRARIES.items():
        when_imported(name, patch)


def unwatch() -> None:
    """Patch no library that is imported from here on."""
    _state.patches = None


def _replace(owner: Any, name: str, make: Callable[[Any], Any], inherited: bool = False) -> None:
    """Replace ``owner.name`` by what `make` returns for it; a release that lacks it is recorded."""
    patches = _state.patches
    if patches is not None:
        failures.safely(_replace_in, patches, owner, name, make, inherited)


def _replace_in(patches: Patches, owner: Any, name: str, make: Callable[[Any], Any], inherited: bool) -> None:
    original = patches.find(owner, name, inherited=inherited)
    patches.replace(owner, name, make(getattr(original, "__func__", original)), inherited=inherited)


def _patch_anyio(module: ModuleType) -> None:
    """Patch a backend of anyio; all of anyio's functions end there, early copies of them too."""
    backend = module.backend_class
    _replace(backend, "run_sync_in_worker_thread", _to_worker)
    _replace(backend, "run_sync_from_thread", functools.partial(_handing_over, loops.callback_within))
    _replace(backend, "run_async_from_thread", functools.partial(_handing_over, loops.handed_over))


def _patch_portal(module: ModuleType) -> None:
    for name in ("start_task_soon", "start_task"):
        _replace(module.BlockingPortal, name, functools.partial(_handing_over, loops.handed_over))


def _patch_current_thread_executor(module: ModuleType) -> None:
    _replace(module.CurrentThreadExecutor, "submit", _submitting)


def _patch_async_to_sync(module: ModuleType) -> None:
    _replace(module.AsyncToSync, "main_wrap", _wrapping)


def _patch_gevent(module: ModuleType) -> None:
    # `map` and the like submit in a greenlet of their own, which has no scope.
    for name in ("spawn", "map", "map_async", "imap", "imap_unordered", "apply_async"):
        _replace(module.ThreadPool, name, _submitting, inherited=True)


def _patch_tpool(module: ModuleType) -> None:
    _replace(module, "execute", _executing)


def _patch_uvloop(module: ModuleType) -> None:
    _replace(module.Loop, "call_soon_threadsafe", loops.call_soon_threadsafe, inherited=True)


_LIBRARIES: dict[str, Callable[[ModuleType], None]] = {
    "anyio._backends._asyncio": _patch_anyio,
    "anyio._backends._trio": _patch_anyio,
    "anyio.from_thread": _patch_portal,
    "asgiref.current_thread_executor": _patch_current_thread_executor,
    "asgiref.sync": _patch_async_to_sync,
    "eventlet.tpool": _patch_tpool,
    "gevent.threadpool": _patch_gevent,
    "uvloop": _patch_uvloop,
}


def _to_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run_sync_in_worker_thread``; its first step runs in the scopes of the code that awaits it."""

    async def run_sync_in_worker_thread(cls: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            func = task(func, None)
        return await original(cls, func, *args, **kwargs)

    return run_sync_in_worker_thread


def _submitting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that submits its argument to a pool."""

    def submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            fn = task(fn, self)
        return original(self, fn, *args, **kwargs)

    return submit


def _executing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``eventlet.tpool.execute``."""

    def execute(meth: Any, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            meth = task(meth, None)
        return original(meth, *args, **kwargs)

    return execute


def _handing_over(scoped: Callable[[Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that hands its argument to an event loop."""
    is_finalizing = sys.is_finalizing  # at the end of Python, this module loses its names

    def hand_over(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(func) and not is_finalizing():
            func = scoped(func)
        return original(self, func, *args, **kwargs)

    return hand_over


def _wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that returns a coroutine; another thread steps it, within the scopes of this thread."""

    def wrap(self: Any, *args: Any, **kwargs: Any) -> Any:
        coroutine = original(self, *args, **kwargs)
        start = failures.safely(thread_plan.plan_quietly)
        return coroutine if start is None else loops.step_within(start, coroutine)

    return wrap
