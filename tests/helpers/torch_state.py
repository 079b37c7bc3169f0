"""Every attribute of torch, to test that closing the doors leaves torch as it was found."""

from __future__ import annotations

import sys
from typing import Any

import torch

from devguard.doors.arrivals import relayed_tags

State = dict[tuple[str, str], Any]


def everything_in_torch() -> State:
    """Return every attribute of every module of torch, and of the classes that doors patch."""
    found: State = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "torch" and hasattr(module, "__dict__"):
            found.update({(module_name, name): value for name, value in list(vars(module).items())})
    for kind in (torch.storage.TypedStorage, torch.storage.UntypedStorage, torch.storage._StorageBase, torch.Tensor):
        found.update({(kind.__name__, name): value for name, value in list(vars(kind).items())})
    return found


def changed(before: State, after: State) -> set[str]:
    """Return the names whose values differ."""
    return {f"{where}.{name}" for (where, name), value in before.items() if after.get((where, name)) is not value}


def relay_something() -> None:
    """Keep a tag, after which the door ``load`` also patches how storages are pickled."""
    relayed_tags.keep(torch.zeros(1).untyped_storage(), "cuda:0")
