"""Environment variables for ``devguard doctor``: which relevant ones are set, and which of devguard's are not valid.

It reads no device and needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from devguard.activation import environment
from devguard.ownership.resolve import LAUNCHERS
from devguard.support.redaction import redact_setting

__all__ = ["check_settings", "select_relevant", "SIMULATION"]

KNOWN = (
    "DEVGUARD",
    "DEVGUARD_CACHE_DIR",
    "DEVGUARD_DEVICE",
    "DEVGUARD_DOORS",
    "DEVGUARD_LOG",
    "DEVGUARD_RANK_LOCK",
    "DEVGUARD_STRICT",
    "DEVGUARD_TRANSPORT",
    "DEVGUARD_TRANSPORT_BUDGET",
)
SIMULATION = "DEVGUARD_SIM_"
# Variables set by `devguard sim`, by the tests of this package, and by `devguard run --trace-contexts`.
INTERNAL = (SIMULATION, "DEVGUARD_TEST_", "DEVGUARD_TRACE_")
OTHERS = (
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "RANK",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "WORLD_SIZE",
)


def check_settings(environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong with devguard's own variables, one sentence each."""
    wrong = environment.find_problems(environ)
    if environ.get("DEVGUARD_DOORS", "").strip() and not environ.get("DEVGUARD", "").strip():
        wrong.append("DEVGUARD_DOORS has no effect without DEVGUARD. Set DEVGUARD=repair, or unset DEVGUARD_DOORS.")
    if environ.get("DEVGUARD_TRANSPORT_BUDGET", "").strip() and not environ.get("DEVGUARD_TRANSPORT", "").strip():
        wrong.append(
            "DEVGUARD_TRANSPORT_BUDGET has no effect without DEVGUARD_TRANSPORT. Set DEVGUARD_TRANSPORT=host, or unset "
            "it."
        )
    wrong += [
        f"{name} is not a variable of devguard. Valid: {', '.join(KNOWN)}."
        for name in sorted(environ)
        if name.startswith("DEVGUARD") and name not in KNOWN and not name.startswith(INTERNAL)
    ]
    return wrong


def select_relevant(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in `environ` that influence devguard or the choice of its owner, without secrets."""
    names = {*OTHERS, *(name for launcher in LAUNCHERS for name in (launcher.rank, *launcher.size))}
    return {
        name: redact_setting(name, value)
        for name, value in sorted(environ.items())
        if name in names or name.startswith("DEVGUARD")
    }
