"""Work that is handed to other threads: what it must find there, and that the patched functions are restored."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import devguard


def on_a_fresh_thread(scope: Any, work: Callable[[], Any]) -> Any:
    """Return what `work` returns on a thread that is started within a scope."""
    got: list[Any] = []
    with devguard.guard(0):
        pass  # opens the doors
    with scope:
        thread = threading.Thread(target=lambda: got.append(work()))
        thread.start()
        thread.join()
    return got[0]


def check_restored(patched: Sequence[tuple[Any, str]]) -> None:
    """Check that a guard replaces each of these attributes, and that ``uninstall`` restores them."""

    def found() -> list[Any]:
        return [inspect.getattr_static(owner, name) for owner, name in patched]

    before = found()
    with devguard.guard(1):
        assert not any(now is then for now, then in zip(found(), before, strict=True))
    assert devguard.uninstall() == []
    assert all(now is then for now, then in zip(found(), before, strict=True))
