"""What torch calls at the end of ``import torch``: the entry point ``devguard`` of the group ``torch.backends``.

It does nothing where ``DEVGUARD`` is not set, and imports nothing for it. It never raises: ``import torch`` would fail.
"""

from __future__ import annotations

import os

__all__ = ["activate"]


def activate() -> None:
    """Put in force what ``DEVGUARD`` and its companions say; a failure becomes one warning, and the guard stays off."""
    if not os.environ.get("DEVGUARD", "").strip():
        return
    try:
        from devguard import integrations
        from devguard.activation.activate import activate
        from devguard.activation.install import uninstall

        if activate():
            try:
                integrations.arm()
            except Exception:
                uninstall()
                raise
    except Exception as error:  # noqa: BLE001 - see above
        _say(f"{type(error).__name__}: {error}")


def _say(what: str) -> None:
    from devguard.ownership.process import process
    from devguard.support.notices import warn_user

    process.problem = what
    warn_user(f"devguard is off in this process, although DEVGUARD={os.environ.get('DEVGUARD')!r}: {what}")
