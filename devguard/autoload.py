"""The entry point ``devguard`` of the group ``torch.backends``, which torch calls at the end of ``import torch``.

If ``DEVGUARD`` is not set, it does nothing and imports nothing. It never raises: ``import torch`` would then fail.
"""

from __future__ import annotations

import os

__all__ = ["activate"]


def activate() -> None:
    """Apply ``DEVGUARD`` and devguard's other variables; if that fails, warn once and leave devguard off."""
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
    except Exception as error:  # noqa: BLE001 - an error here would make `import torch` fail
        _warn(f"{type(error).__name__}: {error}")


def _warn(problem: str) -> None:
    from devguard.ownership.process import process
    from devguard.support.notices import warn_user

    process.fail(problem)
    warn_user(f"devguard is off in this process, although DEVGUARD={os.environ.get('DEVGUARD')!r}: {problem}")
