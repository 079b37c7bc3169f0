"""What holds in this process where no scope says anything else: ``devguard.install``, or the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from devguard.settings import DEFAULT_MODE, DoorMode, Mode

if TYPE_CHECKING:
    from devguard.adoption import Adoption
    from devguard.owners import Owner

__all__ = ["Process", "on_owner", "process"]

# called with what becomes the owner of the process, before that and after
on_owner: list[Callable[[Owner | None], None]] = []


class Process:
    """What holds where no scope does: the owner and the modes given to ``install``, or by the environment.

    Attributes
    ----------
    owner, mode, doors, adoption
        To be replaced, not to be changed in place.
    era : object
        Another one whenever one of them is set, or `renew` is called: what was judged before may be judged otherwise.
    """

    __slots__ = ("adoption", "doors", "era", "mode", "owner", "restart", "said_by")
    era: object

    def __init__(self) -> None:
        self.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        looks = tuple(on_owner) if name == "owner" else ()
        for look in looks:  # it may be in force from here on
            look(value)
        object.__setattr__(self, name, value)
        for look in looks:  # and the one before it is no more
            look(value)
        self.renew()

    def renew(self) -> None:
        """Begin another era."""
        object.__setattr__(self, "era", object())

    def reset(self) -> None:
        self.owner: Owner | None = None
        self.mode: Mode | None = None
        self.doors: Mapping[str, DoorMode] = {}
        self.said_by = ""  # who said so: "install", "environment", "parent", or the role that an integration knows
        self.adoption: Adoption | None = None  # how the environment found the owner
        self.restart: Callable[[], None] | None = None  # finds the owner anew, in a forked child

    def mode_of(self, door: str, default: Mode = DEFAULT_MODE) -> DoorMode:
        """Return the mode of `door` where no scope is in force."""
        mode = self.doors.get(door) or self.mode or default
        return mode if self.adoption is None else self.adoption.mode(mode)


process = Process()
