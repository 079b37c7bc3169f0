"""The state of this process that both ``devguard.status()`` and the end of a log file hold."""

from __future__ import annotations

from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.process import process, unguarded_contexts
from devguard.reporting import allowlist
from devguard.reporting.journal import journal
from devguard.support import accelerator

__all__ = ["describe", "note_transport", "owners", "transport"]

_transport: str | None = None
_uuids: dict[str, str] = {}


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
    """Return the owners, the contexts and the transport, as plain data; opens no context.

    `gpus` has the UUID of each visible device; it is empty until torch has initialised CUDA.
    """
    return {
        "process_owner": process.owner and process.owner.tag,
        "owned": owned_tags(),
        "contexts": [f"cuda:{index}" for index in accelerator.contexts()],
        "transport": _transport,
        "said_by": process.source or None,
        "process_mode": process.mode,
        "gpus": _gpus(),
        "allowed": _allowed(),
    }


def _allowed() -> list[str]:
    """Return the devices that all or some modules may use, and those that `unguarded` has let the program open."""
    return sorted({*allowlist.allowances(), *(f"cuda:{index}" for index in unguarded_contexts)})


def _gpus() -> dict[str, str]:
    """Return the UUID of each visible device; they are read once, because a process never sees others."""
    if not accelerator.is_initialized() or accelerator.is_in_bad_fork():
        return {}  # A child that was forked after CUDA was initialised has those of its parent, which it cannot use.
    if not _uuids:
        try:
            found = {f"cuda:{index}": accelerator.uuid_of(index) for index in range(accelerator.device_count())}
        except Exception:  # noqa: BLE001 - a status without UUIDs is better than none; the door visibility says why
            return {}
        _uuids.update(found)
    return dict(_uuids)


def describe() -> dict[str, Any]:
    """Return the owners, the mode, the contexts and the number of strays, as plain data; opens no context."""
    owner = in_force.owner()
    return {
        "owner": owner and owner.tag,
        **owners(),
        "mode": in_force.mode_of(""),
        "strays": journal.total,
        "strays_not_kept": journal.dropped,
    }
