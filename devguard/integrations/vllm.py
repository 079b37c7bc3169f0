"""vLLM: each worker process owns the GPU that vLLM gives it.

The entry point ``devguard`` of the group ``vllm.general_plugins``, which vLLM calls in every process of its own before
a worker is made. Which GPU that will be, the worker decides itself in ``init_device`` (its local rank, shifted by its
data-parallel rank), so its answer is taken: what it does until then is guarded by adoption. A worker that lives in
the user's own process is left to adoption altogether; other accelerators are left alone.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from devguard.activation.install import assign, on_uninstall
from devguard.integrations import is_asked_for
from devguard.ownership.resolve import is_one_of_several
from devguard.support.notices import warn_user

__all__ = ["arm", "disarm", "plugin"]

# where WorkerWrapperBase is, and was in older releases
HOMES = ("vllm.v1.worker.worker_base", "vllm.worker.worker_base")

_armed = False
_patches: Any = None


def plugin() -> None:
    """Guard this process of vLLM, if ``DEVGUARD`` is set or ``VLLM_PLUGINS`` names devguard. It never raises."""
    if not is_asked_for("VLLM_PLUGINS"):
        return
    try:
        arm()
    except Exception as error:  # noqa: BLE001 - vLLM would not start
        _say(error)


def arm() -> None:
    """Wait for vLLM's workers; calling it again changes nothing."""
    global _armed
    from devguard.support import import_hooks

    _armed = True
    on_uninstall(disarm)
    for name in HOMES:
        import_hooks.when_imported(name, _patch)


def disarm() -> list[str]:
    """Leave vLLM as it was found; return the names that somebody else patched over devguard."""
    global _armed
    _armed = False
    left: list[str] = [] if _patches is None else _patches.restore()
    return left


def _patch(module: ModuleType) -> None:
    global _patches
    wrapper = vars(module).get("WorkerWrapperBase")
    if not _armed or wrapper is None or wrapper.__module__ != module.__name__:
        return
    from devguard.support.patching import Patches

    if _patches is None:
        _patches = Patches()
    if any(owner is wrapper for owner, *_ in _patches.replaced):
        return
    original = vars(wrapper).get("init_device")
    if original is None:
        _say(f"{wrapper.__name__}.init_device is not in this version")
        return

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        try:
            _own(self.worker)
        except Exception as error:  # noqa: BLE001 - a worker must not die of its guard
            _say(error)
        return answer

    _patches.replace(wrapper, "init_device", init_device)


def _own(worker: Any) -> None:
    """Make the device of `worker`, which has just chosen it, the owner of this process."""
    from devguard.ownership import adoption

    device: Any = getattr(worker, "device", None)
    if getattr(device, "type", None) != "cuda" or device.index is None:
        return
    if adoption.is_child() or is_one_of_several(os.environ):
        assign(device, role=f"vLLM worker {getattr(worker, 'rank', '')}".rstrip())


def _say(what: object) -> None:
    warn_user(f"devguard does not know the devices of vLLM's workers: {what}")
