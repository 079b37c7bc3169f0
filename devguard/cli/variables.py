"""The environment variables that play a part: which are set, and which of devguard's own mean nothing.

A module of ``devguard doctor``. It reads no device and needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from devguard import doors, owners, settings
from devguard.errors import DevGuardError

__all__ = ["check_settings", "SIMULATION", "that_matter"]

KNOWN = ("DEVGUARD", "DEVGUARD_CACHE_DIR", "DEVGUARD_DEVICE", "DEVGUARD_DOORS", "DEVGUARD_LOG")
SIMULATION = "DEVGUARD_SIM_"
# set by `devguard sim`, by the tests of this package, by `devguard run --trace-contexts`
INTERNAL = (SIMULATION, "DEVGUARD_TEST_", "DEVGUARD_TRACE_")
SWITCHES = ("0", "1")  # off and repair, as a mode
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
    wrong = []
    mode = environ.get("DEVGUARD", "").strip().lower()
    if mode and mode not in (*settings.MODES, *SWITCHES):
        wrong.append(f"DEVGUARD={mode!r} is not a mode. Valid: {', '.join((*settings.MODES, *SWITCHES))}.")
    device = environ.get("DEVGUARD_DEVICE", "").strip()
    if device:
        try:
            owners.parse(device, "DEVGUARD_DEVICE")
        except DevGuardError as error:
            wrong.append(str(error))
    pairs = [pair.strip() for pair in environ.get("DEVGUARD_DOORS", "").split(",") if pair.strip()]
    if not all("=" in pair for pair in pairs):
        wrong.append(
            f"DEVGUARD_DOORS={','.join(pairs)!r} cannot be read. Valid: door=mode, with commas, as in load=warn."
        )
    else:
        try:
            modes = {name.strip(): mode.strip() for name, mode in (p.split("=", 1) for p in pairs)}
            settings.check_doors(modes, doors.NAMES, doors.EXTRA_MODES)
        except DevGuardError as error:
            wrong.append(f"DEVGUARD_DOORS: {error}")
    log = environ.get("DEVGUARD_LOG", "").strip()
    if log and Path(log).exists() and not Path(log).is_dir():
        wrong.append(f"DEVGUARD_LOG={log!r} is not a directory. Name a directory; it is made if it does not exist.")
    wrong += [
        f"{name} is not a variable that devguard knows. Known: {', '.join(KNOWN)}."
        for name in sorted(environ)
        if name.startswith("DEVGUARD") and name not in KNOWN and not name.startswith(INTERNAL)
    ]
    return wrong


def that_matter(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that play a part, those that are set."""
    names = {*OTHERS, *(name for launcher in owners.LAUNCHERS for name in (launcher.rank, *launcher.size))}
    return {name: value for name, value in sorted(environ.items()) if name in names or name.startswith("DEVGUARD")}
