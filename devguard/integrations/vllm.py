"""vLLM: each worker process owns the GPU that vLLM gives its worker.

`plugin` is the entry point ``devguard`` of the group ``vllm.general_plugins``. vLLM calls it in each of its processes
before it makes a worker. The worker chooses its GPU in ``init_device`` (its local rank, shifted by its data-parallel
rank), and devguard takes the device from there; until then adoption guards the process. A worker in the user's own
process is left to adoption altogether. Other accelerators are ignored.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from devguard.integrations import is_asked_for
from devguard.support.notices import warn_user

__all__ = ["arm", "disarm", "plugin"]

# The module of WorkerWrapperBase in current and in older releases.
HOMES = ("vllm.v1.worker.worker_base", "vllm.worker.worker_base")

_armed = False
_patches: Any = None


def plugin() -> None:
    """Guard this process of vLLM, if ``DEVGUARD`` is set or ``VLLM_PLUGINS`` names devguard. Never raises."""
    if not is_asked_for("VLLM_PLUGINS"):
        return
    try:
        arm()
    except Exception as error:  # noqa: BLE001 - an error here would keep vLLM from starting
        _warn(error)


def arm() -> None:
    """Patch vLLM's workers as soon as they are imported. A second call changes nothing."""
    global _armed
    from devguard.activation.install import on_uninstall
    from devguard.support import import_hooks

    _armed = True
    on_uninstall(disarm)
    for name in HOMES:
        import_hooks.when_imported(name, _patch)


def disarm() -> list[str]:
    """Restore vLLM's functions; return the names that other code has patched over devguard."""
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
    if _patches.has(wrapper):
        return
    original = vars(wrapper).get("init_device")
    if original is None:
        _warn(f"this version has no {wrapper.__name__}.init_device")
        return

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            _own(self.worker)
        except Exception as error:  # noqa: BLE001 - an error in devguard must not stop the worker
            _warn(error)
        return result

    _patches.replace(wrapper, "init_device", init_device)


def _own(worker: Any) -> None:
    """Make the device that `worker` has just chosen the owner of this process."""
    from devguard.activation.install import assign
    from devguard.ownership import siblings
    from devguard.ownership.resolve import has_local_siblings

    device: Any = getattr(worker, "device", None)
    if getattr(device, "type", None) != "cuda" or device.index is None:
        return
    if siblings.is_child() or has_local_siblings(os.environ):
        assign(device, role=f"vLLM worker {getattr(worker, 'rank', '')}".rstrip())


def _warn(problem: object) -> None:
    warn_user(f"devguard cannot find the devices of vLLM's workers: {problem}")
