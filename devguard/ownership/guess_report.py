"""What devguard reports about a guessed owner: that the guess was given up, or that this process only observes."""

from __future__ import annotations

from collections.abc import Mapping

from devguard.modes import DoorMode, Mode
from devguard.ownership.owner import CPU, Owner

__all__ = ["describe_demotion", "describe_limit", "list_active_modes"]

_PASSIVE = ("off", "observe")


def list_active_modes(mode: Mode | None, doors: Mapping[str, DoorMode]) -> list[str]:
    """Return the modes of a process that do more than observe, as the user writes them."""
    active = [] if mode is None or mode in _PASSIVE else [str(mode)]
    return active + [f"{door}={mode}" for door, mode in doors.items() if mode not in _PASSIVE]


def describe_demotion(owner: Owner, source: str, reason: str) -> str:
    """Return the text for a guess that the program has refuted.

    Parameters
    ----------
    owner, source : Owner, str
        The guess, and where it came from.
    reason : str
        What the program did.
    """
    return (
        f"devguard assumed that this process owns {owner.tag} (from {source}), but {reason}. It now only observes. "
        f"{_advise(owner)}"
    )


def describe_limit(owner: Owner | None, source: str, active: list[str]) -> str:
    """Return the text for a process that only observes, although its modes in `active` promise more."""
    if owner is None:
        reason = "it cannot tell which GPU this process owns: no variable names one, and the program selected none"
    else:
        reason = (
            f"that this process owns {owner.tag} is a guess (from {source}), and nothing shows that it is one of "
            "several processes with a GPU each"
        )
    mode = ", ".join(active)
    return f"devguard only observes in this process, although its mode is {mode}: {reason}. {_advise(owner)}"


def _advise(owner: Owner | None) -> str:
    index = 1 if owner is None or owner is CPU else owner.index
    return (
        f"Name the owner, for example cuda:{index}: `devguard run --device cuda:{index} -- ...`, "
        f"DEVGUARD_DEVICE=cuda:{index}, or devguard.guard({index}) in the program. If the program works on several "
        "GPUs on purpose, choose the mode observe."
    )
