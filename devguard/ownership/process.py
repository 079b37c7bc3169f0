"""Process-wide settings: the owner and the modes that apply outside every scope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from devguard.modes import DEFAULT_MODE, DoorMode, Mode
from devguard.ownership.adoption import Adoption
from devguard.ownership.owner import INTERNED, Owner
from devguard.ownership.prepare import forget
from devguard.ownership.stack import local, stacks

__all__ = [
    "BY_ENVIRONMENT",
    "BY_PARENT",
    "disown",
    "forget_past_owners",
    "INSTALLED",
    "on_owner",
    "Process",
    "process",
    "unguarded_contexts",
]

# Sources of the settings of the process, besides the roles that integrations know.
INSTALLED = "install"
BY_ENVIRONMENT = "environment"
BY_PARENT = "parent"

# Called with the next owner of the process, before the change and after it.
on_owner: list[Callable[[Owner | None], None]] = []


class Process:
    """The owner and the modes that apply where no scope is in force.

    ``devguard.install``, the environment, a parent process or an integration sets them. Read the attributes; change
    them through the methods. A change of the owner or of the modes starts a new era.

    Attributes
    ----------
    owner : Owner or None
        The owner.
    mode : str or None
        The mode of every door that `doors` does not name.
    doors : mapping of str to str
        The mode of single doors.
    source : str
        Where the settings come from: `INSTALLED`, `BY_ENVIRONMENT`, `BY_PARENT`, or the role that an integration knows.
    adoption : Adoption or None
        How the environment found the owner; None if it was named.
    restart : callable or None
        Finds the owner again, in a forked child.
    problem : str or None
        Why the guard is off in this process although ``DEVGUARD`` sets a mode. `reset` keeps it.
    era : object
        Replaced whenever a verdict could differ from an earlier one.
    """

    __slots__ = ("adoption", "doors", "era", "mode", "owner", "problem", "restart", "source")

    def __init__(self) -> None:
        self.owner: Owner | None = None
        self.mode: Mode | None = None
        self.doors: Mapping[str, DoorMode] = {}
        self.source = ""
        self.adoption: Adoption | None = None
        self.restart: Callable[[], None] | None = None
        self.problem: str | None = None
        self.era: object = object()

    def renew(self) -> None:
        """Start a new era."""
        self.era = object()

    def own(self, owner: Owner | None, adoption: Adoption | None = None) -> None:
        """Replace the owner, and how it was found."""
        for notify in tuple(on_owner):  # before the change: the next owner may be in force from here on
            notify(owner)
        self.owner, self.adoption = owner, adoption
        for notify in tuple(on_owner):  # after it: the last owner no longer is
            notify(owner)
        self.renew()

    def configure(self, mode: Mode | None, doors: Mapping[str, DoorMode], source: str) -> None:
        """Replace the modes, and where they come from."""
        self.mode, self.doors, self.source = mode, doors, source
        self.renew()

    def restart_with(self, restart: Callable[[], None]) -> None:
        """Let a forked child find its owner with `restart`."""
        self.restart = restart

    def fail(self, problem: str) -> None:
        """Keep the reason why the guard is off in this process, although ``DEVGUARD`` asks for one."""
        self.problem = problem

    def reset(self) -> None:
        """Forget the owner and the modes."""
        self.configure(None, {}, "")
        self.restart = None
        self.own(None)

    def mode_of(self, door: str, default: Mode = DEFAULT_MODE) -> DoorMode:
        """Return the mode of `door` where no scope is in force."""
        mode = self.doors.get(door) or self.mode or default
        return mode if self.adoption is None else self.adoption.limit_mode(mode)


process = Process()

# Devices on which unguarded code opened contexts, on purpose.
unguarded_contexts: set[int] = set()


def disown() -> None:
    """Forget every owner and scope, in a forked child: of all threads only this one was copied."""
    local.stack.clear()
    process.own(None)
    unguarded_contexts.clear()
    forget()
    if process.restart is not None:
        process.restart()


def forget_past_owners() -> dict[Owner, Any]:
    """Forget the owners that are no longer in force anywhere; return them with their devices.

    From here on their devices are not owned. To undo it, give an owner its device back.
    """
    in_force = {owner for stack in stacks() for _, owner, _ in tuple(stack)} | {process.owner}
    past = [owner for owner in list(INTERNED.values()) if owner.device is not None and owner not in in_force]
    forgotten = {owner: owner.device for owner in past}
    for owner in forgotten:
        owner.device = None
    return forgotten
