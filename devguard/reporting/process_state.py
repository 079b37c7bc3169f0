"""The state of this process that both ``devguard.status()`` and the end of a log file hold."""

from __future__ import annotations

from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.process import process
from devguard.reporting.journal import journal
from devguard.support import accelerator

__all__ = ["describe", "owners"]


def owners() -> dict[str, Any]:
    """Return the owners and the contexts, as plain data; opens no context."""
    return {
        "process_owner": process.owner and process.owner.tag,
        "owned": owned_tags(),
        "contexts": [f"cuda:{index}" for index in accelerator.contexts()],
    }


def describe() -> dict[str, Any]:
    """Return the owners, the mode, the contexts and the number of strays, as plain data; opens no context."""
    owner = in_force.owner()
    return {
        "owner": owner and owner.tag,
        **owners(),
        "said_by": process.source or None,
        "mode": in_force.mode_of(""),
        "strays": journal.total,
        "strays_not_kept": journal.dropped,
    }
