"""The plugin ``devguard`` for SGLang's own loader (group ``sglang.srt.plugins``, SGLang 0.5.12 and later).

SGLang calls it at the start of its launcher, schedulers, data-parallel controller and detokenizer, and only logs an
error raised in it. The plugin does not rely on SGLang's registry alone: `roles.arm` patches functions that the
registry cannot, and the hook that runs first sets the owner, once.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from devguard.integrations import is_asked_for
from devguard.integrations.sglang import roles
from devguard.support.notices import DEBUG, log

__all__ = ["plugin"]


def plugin() -> None:
    """Guard the SGLang process that calls this function, if ``DEVGUARD`` or ``SGLANG_PLUGINS`` requests it.

    SGLang calls the plugin wherever devguard is installed. Without ``DEVGUARD`` the mode is ``repair``;
    ``DEVGUARD=off`` turns the plugin off.
    """
    if not is_asked_for("SGLANG_PLUGINS"):
        log(
            "devguard: not requested in this process (set DEVGUARD, or name devguard in SGLANG_PLUGINS)",
            DEBUG,
            roles.LOGGER,
        )
        return
    roles.arm()
    role = roles.CONFIGURE
    if role.module not in sys.modules:
        return  # This process has no scheduler, and registering a hook would import all of it.
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    module = sys.modules[role.module]

    def own_device(*args: Any, **kwargs: Any) -> None:
        roles.take(role, getattr(module, role.path), args, kwargs)

    def announce_owner(result: Any, *args: Any, **kwargs: Any) -> None:
        roles.announce()

    registry.HookRegistry.register(role.target, own_device, registry.HookType.BEFORE)
    registry.HookRegistry.register(role.target, announce_owner, registry.HookType.AFTER)
