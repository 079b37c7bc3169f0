"""An owner as a value: one device, ``cuda:<index>``, or ``cpu`` for a process that owns no accelerator.

Owners are interned: there is one object per device, so that they compare by identity.
"""

from __future__ import annotations

import operator
import re
from typing import Any

from devguard.errors import DeviceResolutionError

__all__ = ["CPU", "INTERNED", "names_cuda", "owned_tags", "Owner", "owner_of_index", "parse_owner", "UNKNOWN"]


class Owner:
    """A device that a process, thread or scope owns.

    Attributes
    ----------
    index : int
        The CUDA device index, or -1 for ``cpu``.
    tag : str
        ``"cuda:<index>"`` or ``"cpu"``, as torch writes it into files.
    device : torch.device or None
        The same device as a torch value. None until the owner is first entered in this process, because naming an
        owner imports no torch and checks nothing.
    """

    __slots__ = ("device", "index", "tag")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tag = "cpu" if index < 0 else f"cuda:{index}"
        self.device: Any = None

    def __repr__(self) -> str:
        return f"<owner {self.tag}>"


CPU = Owner(-1)
UNKNOWN = Owner(-2)  # placeholder in a scope that finds its owner on entry; it is never entered itself
INTERNED: dict[int, Owner] = {-1: CPU}


def owner_of_index(index: int) -> Owner:
    """Return the one owner with this index."""
    owner = INTERNED.get(index)
    if owner is None:
        owner = INTERNED.setdefault(index, Owner(index))
    return owner


def owned_tags() -> list[str]:
    """Return the tag of every owner that was in force in this process since the doors were opened."""
    return [owner.tag for _, owner in sorted(INTERNED.copy().items()) if owner.device is not None]


def names_cuda(tag: str) -> bool:
    """Return whether `tag` names a CUDA device, with or without an index.

    A tag such as ``"cudafoo:0"`` belongs to another backend, or to a package that registered it with torch.
    """
    return tag == "cuda" or (tag[:5] == "cuda:" and tag[5:].isdecimal())


_DEVICE = re.compile(r"(?:cuda:)?(\d{1,18})", re.ASCII)
_VALID = "a device such as 'cuda:1', 1 or torch.device('cuda', 1), or 'cpu' for a process that owns no accelerator"


def parse_owner(device: object, what: str = "the device") -> Owner:
    """Return the owner that `device` names.

    Parameters
    ----------
    device : int, str or torch.device
        An index, ``"cuda:1"``, ``"1"``, ``"cpu"`` or a ``torch.device``.
    what : str
        The source of the value, for the message.

    Raises
    ------
    DeviceResolutionError
        If `device` is not a device that can be owned.
    """
    if isinstance(device, bool):
        raise DeviceResolutionError(f"{what} is {device!r}, a bool. Valid: {_VALID}.")
    if isinstance(device, str):
        text = device.strip().lower()
        if text == "cpu":
            return CPU
        match = _DEVICE.fullmatch(text)
        if match:
            return owner_of_index(int(match[1]))
        if text == "cuda":
            raise DeviceResolutionError(
                f"{what} is 'cuda' without an index, which does not name one device. Valid: {_VALID}. Or leave it out: "
                "devguard then uses the launcher's local rank, such as LOCAL_RANK."
            )
        raise DeviceResolutionError(f"{what} is {device!r}. Valid: {_VALID}.")
    kind = getattr(device, "type", None)
    if isinstance(kind, str) and hasattr(device, "index"):  # a torch.device, recognised without importing torch
        return parse_owner(str(device), what)
    try:
        index = operator.index(device)  # type: ignore[arg-type]
    except TypeError:
        raise DeviceResolutionError(f"{what} is {device!r}. Valid: {_VALID}.") from None
    if abs(index) >= 10**18:  # Python refuses to print a number with thousands of digits.
        raise DeviceResolutionError(f"{what} is a number out of range. Valid: {_VALID}.")
    if index < 0:
        raise DeviceResolutionError(f"{what} is {index}, a negative index. Valid: {_VALID}.")
    return owner_of_index(index)
