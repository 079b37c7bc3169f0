"""The plugin ``devguard`` of SGLang's own loader (group ``sglang.srt.plugins``, SGLang 0.5.12 and later).

SGLang calls it at the beginning of its launcher, schedulers, data-parallel controller and detokenizer, and only logs
what goes wrong in it. So it does not rely on the registry alone: `roles.arm` patches what SGLang's registry could not,
and whichever comes first sets the owner, once.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from devguard.integrations import is_asked_for
from devguard.integrations.sglang import roles

__all__ = ["plugin"]


def plugin() -> None:
    """Guard the SGLang process that calls this.

    Only if ``DEVGUARD`` or ``SGLANG_PLUGINS`` asks for it: SGLang calls it wherever devguard is installed. Without
    ``DEVGUARD`` the mode is ``repair``; ``DEVGUARD=off`` keeps the plugin out.
    """
    if not is_asked_for("SGLANG_PLUGINS"):
        roles.logger.debug("devguard: not asked for in this process (DEVGUARD, SGLANG_PLUGINS)")
        return
    roles.arm()
    role = roles.CONFIGURE
    if role.module not in sys.modules:
        return  # a process without a scheduler: registering a hook would import all of it
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    module = sys.modules[role.module]

    def own_device(*args: Any, **kwargs: Any) -> None:
        roles.take(role, getattr(module, role.path), args, kwargs)

    def say_so(result: Any, *args: Any, **kwargs: Any) -> None:
        roles.announce()

    registry.HookRegistry.register(role.target, own_device, registry.HookType.BEFORE)
    registry.HookRegistry.register(role.target, say_so, registry.HookType.AFTER)
