"""The door ``children``: what a child process takes over from a guarded parent, and what it may not.

A child of ``multiprocessing`` takes over the mode, the modes of single doors and the allow-list, but never the owner:
the child must choose which GPU it owns. A worker of torch's DataLoader owns ``cpu`` if the process that iterates has an
owner: opening CUDA there is a stray of this door. The line that initialised CUDA in the parent is added to torch's
"Cannot re-initialize CUDA in forked subprocess".

Out of reach: ``os.fork`` alone, which continues the program with its owner; ``subprocess``; loky and other libraries
with processes of their own. See docs/doors.md.
"""

from __future__ import annotations

import multiprocessing.process
import multiprocessing.reduction
import multiprocessing.spawn
import os
import sys
from typing import Any

from devguard.doors import first_use, table
from devguard.modes import DEFAULT_MODE, DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import CPU
from devguard.ownership.prepare import prepare
from devguard.ownership.process import BY_ENVIRONMENT, BY_PARENT, INSTALLED, disown, process
from devguard.ownership.stack import local
from devguard.reporting import allowlist
from devguard.support import accelerator, process_exit
from devguard.support.notices import Failures
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "children"

_patches = Patches()
_failures = Failures()


class _State:
    """The state of this door.

    Attributes
    ----------
    pid : int
        The process that opened the door; a process with another pid was forked.
    taken_over : Settings or None
        What this process took over from its parent.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.taken_over: Settings | None = None


_state = _State()


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
    """Patch the pickling of a process object, and the start of a forked child."""
    _state.pid = os.getpid()
    _failures.clear()
    bootstrap = _patches.find(multiprocessing.process.BaseProcess, "_bootstrap")
    dump = _patches.find(multiprocessing.reduction, "dump")

    def bootstrap_disowned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.getpid() != _state.pid:
            _failures.safely(_arrive_forked, self)
        try:
            return bootstrap(self, *args, **kwargs)
        finally:
            _failures.safely(process_exit.run)

    def dump_with_settings(obj: Any, file: Any, protocol: Any = None) -> Any:
        if isinstance(obj, multiprocessing.process.BaseProcess):
            settings = _failures.safely(_settings, obj)
            # Another interpreter may have no devguard.
            if settings is not None and os.fsdecode(multiprocessing.spawn.get_executable()) == sys.executable:
                obj = _Carrier(settings, obj)
        return dump(obj, file, protocol)

    _patches.replace(multiprocessing.process.BaseProcess, "_bootstrap", bootstrap_disowned)
    _patches.replace(multiprocessing.reduction, "dump", dump_with_settings)


def uninstall() -> list[str]:
    """Put the functions of ``multiprocessing`` back, and, in a forked child, torch's."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what this process took over from its parent, and errors inside devguard."""
    taken = _state.taken_over
    return {
        "taken_over": taken and {"mode": taken.mode, "doors": dict(taken.doors), "loader_worker": taken.loader},
        "failures": list(_failures),
    }


def _settings(child: Any) -> Settings | None:
    """Return what `child`, which is about to start or was just forked, takes over; None if nothing is set."""
    if not local.stack and process.owner is None and process.mode is None:
        return None
    owner = in_force.owner()
    mode: DoorMode | None
    doors: dict[str, DoorMode]
    if owner is not None and in_force.mode_of(NAME) == "off":
        return None
    loader = owner is not None and _is_loader_worker(child)
    if process.source == BY_ENVIRONMENT and not loader and os.environ.get("DEVGUARD", "").strip():
        # The child reads the same variables, or those set for it. A scope holds for the code here; only a loader worker
        # works for that code.
        mode, doors = None, {}
    elif owner is None or not local.stack:
        # The process's own settings: unguarded() holds for the code here, not for the child's.
        mode, doors = process.mode, dict(process.doors)
    else:
        mode = in_force.mode_of("")
        known = [name for name in table.NAMES if name not in table.ON_REQUEST]
        if not in_force.is_requested(""):  # remap() requests all of them, but only for its own scope
            known += [name for name in table.ON_REQUEST if in_force.is_requested(name)]
        doors = {name: in_force.mode_of(name) for name in known}
        doors = {name: own for name, own in doors.items() if own != mode or name in table.ON_REQUEST}
    allowed = allowlist.allowances()
    nothing_new = not loader and not doors and not allowed and mode in (None, DEFAULT_MODE)
    if nothing_new and not os.environ.get("DEVGUARD"):
        return None
    return Settings(mode, doors, loader, allowed)


def _is_loader_worker(child: Any) -> bool:
    module = sys.modules.get("torch.utils.data._utils.worker")
    return module is not None and getattr(child, "_target", None) is module._worker_loop


def _arrive(mode: Any, doors: dict[str, DoorMode], loader: bool, allowed: dict[str, list[str] | None]) -> Settings:
    """Put the settings of the parent in force in this process."""
    settings = Settings(mode, doors, loader, allowed)
    _failures.safely(_take_over, settings)
    return settings


def _unwrap(settings: Settings, child: Any) -> Any:
    """Return the process object; its target is imported now. Children of this child take over as well."""
    if "torch" in sys.modules:
        _failures.safely(table.open_all)
    return child


def _take_over(settings: Settings) -> None:
    allowlist.take_over(settings.allowed)
    # Otherwise the child's own main module has set it. The parent knew what the environment sets.
    if process.mode is None or (process.source == BY_ENVIRONMENT and settings.mode is not None):
        process.configure(settings.mode, settings.doors, BY_PARENT)
        _state.taken_over = settings
    if settings.loader and process.source != INSTALLED:
        process.own(CPU)
        first_use.report_as(NAME)
        table.open_all()
        prepare(CPU)


def _arrive_forked(child: Any) -> None:
    """Forget the parent's owners, keep its settings, and prepare an explanation of torch's refusal."""
    _state.pid = os.getpid()
    settings = _settings(child)
    disown()
    if settings is not None:
        if settings.mode is not None:
            process.configure(None, process.doors, process.source)  # the parent's own mode; the settings hold it
        _take_over(settings)
    _explain_bad_fork()


def _explain_bad_fork() -> None:
    """Add the line that initialised CUDA before the fork to torch's refusal to initialise it again."""
    if not accelerator.is_in_bad_fork():
        return
    cuda = sys.modules["torch"].cuda
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
