"""SGLang's multimodal tensors through devguard.transport: ``DEVGUARD_TRANSPORT=host``. Opt-in and experimental.

One copy of each tensor lies in an arena of the tokenizer's process, and every rank maps it. SGLang's messages, hops,
barrier and agreement about failures stay. request_leases.py puts, shm_pointer.py reads. Nothing is patched in a process
that does not ask for it: by the environment, or by ``guarded_engine(..., transport="host")`` for one engine.

Where it is off although it is asked for (transport_conditions.py), one line on standard error says so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from devguard import modes
from devguard.activation import environment
from devguard.activation.install import on_uninstall
from devguard.errors import ConfigError
from devguard.integrations.sglang import request_leases, shm_pointer, transport_conditions, versions
from devguard.integrations.sglang.request_leases import LOGGER, Requests, Sender, sending
from devguard.reporting import process_state
from devguard.support import forks
from devguard.support.import_hooks import when_imported
from devguard.support.notices import INFO, alert, log
from devguard.support.patching import Patches

__all__ = ["arm", "arm_if_asked", "disarm", "in_force", "requested", "require", "usage"]

TOKENIZER = "sglang.srt.managers.tokenizer_manager"
SCHEDULER = "sglang.srt.managers.scheduler"
CONTEXT = "sglang.srt.runtime_context"


class _State:
    """The state of the transport in this process."""

    def __init__(self) -> None:
        self.lock = forks.new_lock()
        self.patches = Patches()
        self.armed = False
        self.everywhere = False  # whether the environment asks, and not one engine only
        self.budget = environment.DEFAULT_BUDGET
        self.sender: Sender | None = None


_state = _State()
_requested: ContextVar[bool] = ContextVar("devguard_sglang_requested", default=False)


def arm_if_asked() -> None:
    """Arm the transport if ``DEVGUARD_TRANSPORT`` asks for it.

    Raises
    ------
    ConfigError
        If a variable is not valid.
    """
    if not os.environ.get("DEVGUARD_TRANSPORT", "").strip() or modes.is_killed():
        return
    settings = environment.read()
    if settings.transport == "host":
        arm(settings.budget, everywhere=True)


def arm(budget: int, *, everywhere: bool) -> None:
    """Patch SGLang's functions, now or when they are imported.

    Parameters
    ----------
    budget : int
        The most bytes of the arena of this process, if it is a tokenizer's.
    everywhere : bool
        Whether all tokenizers of this process send through it; otherwise those made inside `requested`.
    """
    with _state.lock:
        _state.armed = True
        _state.everywhere = _state.everywhere or everywhere
        _state.budget = budget
    on_uninstall(disarm)
    begun = sys.modules.get(shm_pointer.MODULE)
    if not getattr(getattr(begun, "__spec__", None), "_initializing", False):
        when_imported(shm_pointer.MODULE, _patch_pointer)
    # Otherwise this import of torch is one of that module's own imports, and the class is not there yet.
    when_imported(TOKENIZER, _patch_tokenizer)
    when_imported(SCHEDULER, _patch_imported_pointer)


def disarm() -> list[str]:
    """Restore SGLang's functions; return the names that other code has patched over devguard.

    Requests that were sent keep their leases until the tokenizer forgets them.
    """
    with _state.lock:
        _state.armed = _state.everywhere = False
        sender, _state.sender = _state.sender, None
        left = _state.patches.restore()
    if sender is not None:
        sender.retire()
    process_state.note_transport(None)
    return left


def in_force() -> bool:
    """Return whether SGLang's class is patched in this process."""
    return bool(_state.patches.replaced)


@contextlib.contextmanager
def requested() -> Iterator[None]:
    """Let the tokenizers that are made inside send through an arena."""
    token = _requested.set(True)
    try:
        yield
    finally:
        _requested.reset(token)


def require() -> None:
    """Raise if the installed release has not the class that the transport needs.

    Raises
    ------
    ConfigError
        It has not, or the Rust server replaces its tokenizer; the message says what it lacks.
    """
    versions.check()
    problem = transport_conditions.find_problem(importlib.import_module(shm_pointer.MODULE))
    if problem:
        raise ConfigError(f'transport="host": {problem}')


def usage() -> dict[str, int] | None:
    """Return what the arena of this process holds and how many tensors it carried; None if nothing sends through it.

    Returns
    -------
    dict
        ``budget``, ``in_use`` and ``peak`` in bytes, ``leases``, ``puts``, and ``fallbacks`` to SGLang's own segments.
    """
    sender = _state.sender
    return None if sender is None else sender.usage()


def _report_off(why: str) -> None:
    alert(f"devguard: host transport is OFF in process {os.getpid()}; tensors travel as SGLang sends them: {why}")


# SGLang's modules.


def _patch_pointer(module: ModuleType) -> None:
    with _state.lock:
        if not _state.armed or _state.patches.replaced:
            return
        try:
            versions.check()
            problem = transport_conditions.find_problem(module)
            if problem:
                _report_off(problem)
            else:
                shm_pointer.patch(_state.patches, module, request_leases.put, _note_reader)
        except Exception as error:  # noqa: BLE001 - devguard must not keep a server from starting
            _state.patches.restore()
            _report_off(f"{type(error).__name__}: {error}")


def _patch_imported_pointer(importer: ModuleType) -> None:
    """Patch the class when a module that imports it has been imported, if that has not been possible before."""
    module = sys.modules.get(shm_pointer.MODULE)
    if module is not None:
        _patch_pointer(module)


def _patch_tokenizer(module: ModuleType) -> None:
    _patch_imported_pointer(module)
    with _state.lock:
        kind = getattr(module, "TokenizerManager", None)
        if not _state.armed or not in_force() or kind is None or _state.patches.has(kind):
            return  # a release that lacks the class has been reported
        start, send = (vars(kind).get(name) for name in ("init_running_status", "_send_one_request"))
        if start is None or not inspect.iscoroutinefunction(send):
            _report_off(f"SGLang {versions.installed()} sends requests in a way that this devguard does not know.")
            return

        @functools.wraps(start)
        def init_running_status(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = start(self, *args, **kwargs)
            try:
                _follow(self)
            except Exception as error:  # noqa: BLE001 - devguard must not keep a server from starting
                _report_off(f"{type(error).__name__}: {error}")
            return result

        @functools.wraps(send)
        async def send_one_request(self: Any, tokenized_obj: Any, *args: Any, **kwargs: Any) -> Any:
            requests = self.rid_to_state
            if not isinstance(requests, Requests):
                return await send(self, tokenized_obj, *args, **kwargs)
            token = sending.set((requests, tokenized_obj.rid))
            try:
                return await send(self, tokenized_obj, *args, **kwargs)
            finally:
                sending.reset(token)

        _state.patches.replace(kind, "init_running_status", init_running_status)
        _state.patches.replace(kind, "_send_one_request", send_one_request)


def _follow(manager: Any) -> None:
    """Let a tokenizer send through an arena, from its start."""
    if not _state.everywhere and not _requested.get():
        return
    context = importlib.import_module(CONTEXT)
    why = transport_conditions.find_exception(context)
    if why:
        _report_off(why)
        return
    readers = transport_conditions.count_readers(context.get_parallel())
    with _state.lock:
        if _state.sender is None:
            _state.sender = Sender(_state.budget)
        manager.rid_to_state = Requests(manager.rid_to_state, _state.sender, readers)
    log(
        f"devguard: SGLang tokenizer: transport host, budget {_state.budget:,} bytes, {readers} readers of each "
        f"multimodal tensor (experimental)",
        INFO,
        LOGGER,
    )
    process_state.note_transport("host")


def _note_reader() -> None:
    """Log the first tensor that this process reads."""
    if process_state.transport() is None:
        process_state.note_transport("host")
        log(f"devguard: process {os.getpid()} reads multimodal tensors by transport host", INFO, LOGGER)
