"""SGLang: each process stays on the GPU that SGLang assigned to it, and processes without a GPU stay off all GPUs.

There are three ways to guard SGLang; they can be combined:

- ``DEVGUARD=repair`` in the environment, with no change to code: torch's autoload hook calls `arm`;
- the plugin ``devguard`` of the group ``sglang.srt.plugins`` (SGLang 0.5.12 and later): `plugin`;
- in programs that start the workers themselves: `worker` and `guarded_engine`.

Schedulers own their ``gpu_id``; the data-parallel controller and the detokenizer own ``cpu``. Tokenizer and encoder
processes are left to adoption, because an image processor may use a GPU there. No import of SGLang or torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from devguard.integrations.sglang.plugin import plugin
from devguard.integrations.sglang.roles import arm, disarm
from devguard.integrations.sglang.versions import NEWEST, OLDEST, UnsupportedVersionError

__all__ = [
    "arm",
    "Bug",
    "BUGS",
    "disarm",
    "guarded_engine",
    "known_bugs",
    "NEWEST",
    "OLDEST",
    "plugin",
    "transport_usage",
    "UnsupportedVersionError",
    "worker",
]

if TYPE_CHECKING:
    from devguard.integrations.sglang.bugs import BUGS, Bug, known_bugs
    from devguard.integrations.sglang.entry import guarded_engine, worker

# Public name -> its module, which is imported when the name is first used: activation by environment needs neither.
_HOMES = {
    **dict.fromkeys(("Bug", "BUGS", "known_bugs"), "bugs"),
    **dict.fromkeys(("guarded_engine", "worker"), "entry"),
}


def transport_usage() -> dict[str, int] | None:
    """Return what the arena of this process, a tokenizer's, holds; None without one (`host_transport.usage`)."""
    from devguard.integrations.sglang.host_transport import usage  # not needed to guard

    return usage()


def __getattr__(name: str) -> object:
    home = name if name in _HOMES.values() else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{home}")
    value: object = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
