"""The door ``children``: what a child process takes over from a guarded parent, and what it may not.

A child (``multiprocessing`` and ``torch.multiprocessing``: spawn, forkserver, fork) takes over the mode, the modes of
single doors and what is allowed, never the owner: which GPU it owns is for it to say. A worker of torch's DataLoader
owns ``cpu``, if the process that iterates has an owner: opening CUDA there is a stray of this door, and mode ``error``
refuses it before any context exists; what the worker loads from bytes with a GPU's tag is kept on the host (door
``load``). torch's "Cannot re-initialize CUDA in forked subprocess" gets the line that initialised CUDA in the parent.

A child that has settings of its own keeps them. Not seen here: ``os.fork`` by itself, which continues the program with
its owner; ``subprocess``; loky's and other makes of processes.
"""

from __future__ import annotations

import multiprocessing.process
import multiprocessing.reduction
import multiprocessing.spawn
import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.doors import first_use, table
from devguard.modes import DEFAULT_MODE, DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import CPU
from devguard.ownership.prepare import prepare
from devguard.ownership.process import disown, process
from devguard.ownership.stack import local
from devguard.reporting import allowlist
from devguard.support import process_exit
from devguard.support.patching import DoorError, Patches

__all__ = ["install", "status", "uninstall"]

NAME = "children"

_patches = Patches()
_pid = 0  # of the process that opened the door: elsewhere we were forked
_failures: list[str] = []
_taken_over: Settings | None = None


class Settings:
    """What a child takes over: `mode`, the modes of single `doors`, `allowed`, and whether it is a `loader` worker.

    Unpickling one puts it in force in that process.
    """

    __slots__ = ("allowed", "doors", "loader", "mode")

    def __init__(
        self, mode: Any, doors: dict[str, DoorMode], loader: bool, allowed: dict[str, list[str] | None]
    ) -> None:
        self.mode = mode
        self.doors = doors
        self.loader = loader
        self.allowed = allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.mode, self.doors, self.loader, self.allowed)


class _Carrier:
    """A process object and the settings that go with it; unpickles as the process object, the settings first."""

    __slots__ = ("process", "settings")

    def __init__(self, settings: Settings, process: Any) -> None:
        self.settings = settings
        self.process = process

    def __reduce__(self) -> tuple[Any, ...]:
        return _unwrap, (self.settings, self.process)


def install() -> None:
    """Hook the pickling of a process object, and the beginning of a forked child."""
    global _pid
    _pid = os.getpid()
    _failures.clear()
    bootstrap = _find(multiprocessing.process.BaseProcess, "_bootstrap")
    dump = _find(multiprocessing.reduction, "dump")

    def bootstrap_disowned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.getpid() != _pid:
            _safely(_arrive_forked, self)
        try:
            return bootstrap(self, *args, **kwargs)
        finally:
            _safely(process_exit.run)

    def dump_with_settings(obj: Any, file: Any, protocol: Any = None) -> Any:
        if isinstance(obj, multiprocessing.process.BaseProcess):
            settings = _safely(_settings, obj)
            # another interpreter need not have devguard
            if settings is not None and os.fsdecode(multiprocessing.spawn.get_executable()) == sys.executable:
                obj = _Carrier(settings, obj)
        return dump(obj, file, protocol)

    _patches.replace(multiprocessing.process.BaseProcess, "_bootstrap", bootstrap_disowned)
    _patches.replace(multiprocessing.reduction, "dump", dump_with_settings)


def uninstall() -> list[str]:
    """Put the functions of ``multiprocessing`` back, and in a forked child torch's."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what this process took over from its parent, and what went wrong in devguard itself."""
    taken = _taken_over
    return {
        "taken_over": taken and {"mode": taken.mode, "doors": dict(taken.doors), "loader_worker": taken.loader},
        "failures": list(_failures),
    }


def _find(owner: Any, name: str) -> Callable[..., Any]:
    original: Callable[..., Any] | None = vars(owner).get(name)
    if original is None:
        version = sys.version.partition(" ")[0]
        raise DoorError(
            f"{owner.__name__}.{name} is not in Python {version}; this version of devguard does not know it."
        )
    return original


def _safely(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; a failure of devguard itself is noted and costs no process its life."""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001 - see above
        _failures.append(f"{type(error).__name__}: {error}")
        return None


def _settings(child: Any) -> Settings | None:
    """Return what `child`, which is about to start or was just forked, takes over; None if nothing was said."""
    if not local.stack and process.owner is None and process.mode is None:
        return None
    owner = in_force.owner()
    mode: DoorMode | None
    if owner is not None and in_force.mode_of(NAME) == "off":
        return None
    if owner is None or not local.stack:
        # the process's own, as it was said; unguarded() is said of the code here, not of the child's
        mode, doors = process.mode, dict(process.doors)
    else:
        mode = in_force.mode_of("")
        known = [name for name in table.NAMES if name not in table.ON_REQUEST]
        if not in_force.is_requested(""):  # remap() requests all of them, but only for its own scope
            known += [name for name in table.ON_REQUEST if in_force.is_requested(name)]
        doors = {name: in_force.mode_of(name) for name in known}
        doors = {name: its for name, its in doors.items() if its != mode or name in table.ON_REQUEST}
    loader = owner is not None and _is_loader_worker(child)
    allowed = allowlist.allowances()
    nothing_new = not loader and not doors and not allowed and mode in (None, DEFAULT_MODE)
    if nothing_new and not os.environ.get("DEVGUARD"):
        return None
    return Settings(mode, doors, loader, allowed)


def _is_loader_worker(child: Any) -> bool:
    module = sys.modules.get("torch.utils.data._utils.worker")
    return module is not None and getattr(child, "_target", None) is module._worker_loop


def _arrive(mode: Any, doors: dict[str, DoorMode], loader: bool, allowed: dict[str, list[str] | None]) -> Settings:
    """Put what the parent sent in force in this process, a child of it."""
    settings = Settings(mode, doors, loader, allowed)
    _safely(_take_over, settings)
    return settings


def _unwrap(settings: Settings, child: Any) -> Any:
    """Return the process object, whose target is imported by now; children of its own are to take over as well."""
    if "torch" in sys.modules:
        _safely(table.open_all)
    return child


def _take_over(settings: Settings) -> None:
    global _taken_over
    allowlist.take_over(settings.allowed)
    # else the child's own main module has said it; what the environment says, the parent knew
    if process.mode is None or (process.source == "environment" and settings.mode is not None):
        process.configure(settings.mode, settings.doors, "parent")
        _taken_over = settings
    if settings.loader and process.source != "install":
        process.own(CPU)
        first_use.report_as(NAME)
        table.open_all()
        prepare(CPU)


def _arrive_forked(child: Any) -> None:
    """Leave the parent's owners behind, keep its settings, and be ready to explain torch's refusal."""
    global _pid
    _pid = os.getpid()
    settings = _settings(child)
    disown()
    if settings is not None:
        process.configure(None, process.doors, process.source)  # the parent's own mode; the settings hold it
        _take_over(settings)
    _explain_bad_fork()


def _explain_bad_fork() -> None:
    """Append to torch's refusal to initialise CUDA after a fork who had initialised it before."""
    cuda = sys.modules["torch"].cuda
    if not cuda._is_in_bad_fork():
        return
    original = _patches.find(cuda, "_lazy_init")

    def _lazy_init() -> Any:
        try:
            return original()
        except RuntimeError as error:
            if "Cannot re-initialize CUDA" in str(error):
                error.args = (
                    f"{error}\ndevguard: CUDA was initialised in the parent, {first_use.describe()}. Start processes "
                    "before that, or keep CUDA out of the parent.",
                )
            raise

    for name, module in list(sys.modules.items()):
        if (name == "torch.cuda" or name.startswith("torch.cuda.")) and vars(module).get("_lazy_init") is original:
            _patches.replace(module, "_lazy_init", _lazy_init)
