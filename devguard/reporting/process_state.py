"""The state of this process that both ``devguard.status()`` and the end of a log file hold."""

from __future__ import annotations

from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.process import process
from devguard.reporting.journal import journal
from devguard.support import accelerator

__all__ = ["describe", "note_transport", "owners", "transport"]

_transport: str | None = None


def transport() -> str | None:
    """Return how an integration carries a framework's tensors; None: as the framework sends them."""
    return _transport


def note_transport(name: str | None) -> None:
    """Set what `transport` returns, and write it to the log."""
    global _transport
    if name != _transport:
        _transport = name
        journal.note_state()


def owners() -> dict[str, Any]:
    """Return the owners, the contexts and the transport, as plain data; opens no context."""
    return {
        "process_owner": process.owner and process.owner.tag,
        "owned": owned_tags(),
        "contexts": [f"cuda:{index}" for index in accelerator.contexts()],
        "transport": _transport,
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
