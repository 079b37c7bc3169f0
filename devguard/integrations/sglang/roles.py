"""The roles of SGLang's processes, and the device that each role owns.

SGLang's own functions identify the role: `ROLES` lists functions that a process calls before it touches a GPU or
receives a message. These functions are never pickled. The entry points are pickled by name, as targets of spawned
processes, and so are not patched. Arguments are found by name, because their order changes between releases.

devguard must not keep a server from starting: a failure here becomes one line in the server's log.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from devguard import modes
from devguard.activation.install import assign, on_uninstall
from devguard.errors import ConfigError
from devguard.integrations.sglang import host_transport, messages, versions
from devguard.integrations.sglang.request_leases import LOGGER
from devguard.support import forks
from devguard.support.import_hooks import when_imported
from devguard.support.notices import INFO, WARNING, alert, log
from devguard.support.patching import Patches
from devguard.support.strictness import report_off

__all__ = ["announce", "arm", "device_argument", "DEVICE_ARGUMENTS", "disarm", "LOGGER", "Role", "ROLES", "take"]

# The names of the parameter with the device, in order of preference.
DEVICE_ARGUMENTS = ("gpu_id", "local_rank", "device_id", "device_index", "device")
RANKS = {"dp_rank": "DP", "pp_rank": "PP", "tp_rank": "TP"}


@dataclass(frozen=True)
class Role:
    """One kind of process, and the function that identifies it.

    Attributes
    ----------
    module, path : str
        The module of the function, and its qualified name there.
    name : str
        The name of the process in messages.
    owns_gpu : bool
        Whether the process owns the GPU that an argument names; if not, it owns ``cpu``.
    """

    module: str
    path: str
    name: str
    owns_gpu: bool

    @property
    def target(self) -> str:
        """The function's full name."""
        return f"{self.module}.{self.path}"


CONFIGURE = Role("sglang.srt.managers.scheduler", "configure_scheduler_process", "scheduler", True)
ROLES = (
    CONFIGURE,
    # Releases without that function name the GPU here, and so do Ray's actors in some releases with it.
    Role("sglang.srt.managers.scheduler", "Scheduler.__init__", "scheduler", True),
    Role(
        "sglang.srt.managers.data_parallel_controller",
        "DataParallelController.__init__",
        "data-parallel controller",
        False,
    ),
    Role("sglang.srt.managers.detokenizer_manager", "DetokenizerManager.__init__", "detokenizer", False),
)


class _State:
    """The state of the integration in this process."""

    def __init__(self) -> None:
        self.lock = forks.new_lock()
        self.patches = Patches()
        self.armed = False
        self.warned = False
        self.taken: tuple[int, str] | None = None  # Pid and device; after a fork the pid is the parent's.
        self.to_announce: str | None = None  # The label of the process.


_state = _State()


def arm() -> None:
    """Make every SGLang process own its device as soon as its role is known. A second call changes nothing."""
    with _state.lock:
        _state.armed = True
    on_uninstall(disarm)
    for name in {role.module for role in ROLES}:
        when_imported(name, _patch)
    when_imported(messages.MODULE, _patch)
    try:
        host_transport.arm_if_asked()
    except (
        ConfigError
    ) as error:  # With DEVGUARD set, activate() has raised it; without, devguard must not stop a server.
        alert(f"devguard: host transport is OFF in process {os.getpid()}: {error}")


def disarm() -> list[str]:
    """Restore SGLang's functions; return the names that other code has patched over devguard."""
    with _state.lock:
        _state.armed = False
        _state.taken = _state.to_announce = None
        return _state.patches.restore()


def take(role: Role, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Make the device of `role` the owner of this process, before `function` is called with these arguments.

    Acts once in a process, and never raises.
    """
    if modes.is_killed():
        return
    try:
        _take(role, function, args, kwargs)
    except Exception as error:  # noqa: BLE001 - devguard must not keep a server from starting
        _state.to_announce = None
        report_off(f"devguard: this {role.name} is NOT guarded: {type(error).__name__}: {error}")


def _take(role: Role, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    values = bound(function, args, kwargs)
    if role.owns_gpu:
        device = device_argument(values)
        if device is None:
            return  # This release names the device elsewhere.
    elif multiprocessing.parent_process() is None:
        return  # The user's own process made this object, and its owner is the user's choice.
    else:
        device = "cpu"
    with _state.lock:
        if _state.taken is not None and _state.taken[0] == os.getpid():
            return

        label = " ".join(filter(None, (role.name, _ranks(values, function))))
        if assign(device, role=f"SGLang {label}"):
            _state.to_announce = label
        else:
            log(f"devguard: this {label} keeps the owner that the program installed", INFO, LOGGER)
        _state.taken = os.getpid(), str(device)


def announce() -> None:
    """Log the owner, mode and open doors of this process; once, as soon as logging is configured."""
    with _state.lock:
        label, _state.to_announce = _state.to_announce, None
    if label is None:
        return
    try:
        from devguard.activation.status import status  # not needed to activate

        found = status()
        doors = [name for name, row in found["doors"].items() if row["open"]]
        closed = [f"{name} ({row['problem']})" for name, row in found["doors"].items() if "problem" in row]
        owner, mode = found["process_owner"], found["mode"]
        if owner is None or not doors:
            report_off(f"devguard: {label} is NOT guarded: no door is open")
            return
        transport = ", transport host" if host_transport.in_force() else ""
        log(f"devguard: {label} owns {owner}, mode {mode}{transport}, doors {', '.join(doors)}", INFO, LOGGER)
        if closed:
            log(f"devguard: {label}: doors that could not be opened: {'; '.join(closed)}", WARNING, LOGGER)
    except Exception as error:  # noqa: BLE001 - devguard must not keep a server from starting
        log(f"devguard: {label}: {type(error).__name__}: {error}", WARNING, LOGGER)


def device_argument(values: Mapping[str, Any], names: Iterable[str] = DEVICE_ARGUMENTS) -> Any:
    """Return the value of the first of these arguments that is not None, or None."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, without defaults."""
    found = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    found.update(found.pop("kwargs", {}))
    return found


def _ranks(values: Mapping[str, Any], function: Callable[..., Any]) -> str:
    """Return the ranks, as in ``DP0 TP1``: from the arguments, or in newer releases from SGLang's context."""
    known = {name: values.get(name) for name in RANKS}
    context = getattr(inspect.unwrap(function), "__globals__", {}).get("get_parallel")
    if known["tp_rank"] is None and context is not None:
        try:
            known = {name: getattr(context(), name, None) for name in RANKS}
        except Exception:  # noqa: BLE001 - SGLang may not have published it yet, and the label is only informative
            known = {}
    if getattr(values.get("server_args"), "pp_size", 1) == 1:
        known.pop("pp_rank", None)
    return " ".join(f"{short}{known[name]}" for name, short in RANKS.items() if known.get(name) is not None)


def _patch(module: ModuleType) -> None:
    """Patch the functions of `ROLES` in a module of SGLang that was just imported."""
    with _state.lock:
        if not _state.armed:
            return
        try:
            versions.check()
        except versions.UnsupportedVersionError as error:
            if not _state.warned:
                _state.warned = True
                log(f"devguard: {error}", WARNING, LOGGER)
            return
        if module.__name__ == messages.MODULE:
            messages.patch(_state.patches, module)
        for role in ROLES:
            if role.module == module.__name__:
                _replace(module, role)


def _replace(module: ModuleType, role: Role) -> None:
    *within, name = role.path.split(".")
    holder: Any = getattr(module, within[0], None) if within else module
    original = vars(holder).get(name) if holder is not None else None
    if original is None or any(row[0] is holder and row[1] == name for row in _state.patches.replaced):
        return  # The function is not in this release, or already patched.

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        take(role, original, args, kwargs)
        if within:
            announce()
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        announce()  # `original` has configured logging by now.
        return result

    _state.patches.replace(holder, name, hooked)
