"""Run the placement tests and the demo with several versions of torch on simulated GPUs, and print a table.

``python -m tests.torch_versions 2.8.0 2.11.0 2.15.0``; without arguments, the version of this environment. A version
that is not in the cache is downloaded (0.5 to 0.9 GB). Exits with 1 if anything failed. This is not a test module,
because the tests of one version take a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from devguard.errors import SimulationError
from devguard.simgpu import overlay

ROOT = Path(__file__).parent.parent
# tests/helpers/simulated.py takes the version from DEVGUARD_TEST_TORCH.
SIMULATION = ("tests/simgpu/test_devices.py", "tests/simgpu/test_ipc.py")
PLACEMENT = ("tests/placement",)
HEAD = ("torch", "overlay", "the simulation's tests", "placement tests", "demo")


def main(versions: Sequence[str]) -> int:
    """Run everything for each version; return the exit status."""
    rows, fine = [HEAD], True
    for version in versions or [overlay.wheels.installed_torch() or overlay.DEFAULT_TORCH]:
        cells = _run(version)
        fine = fine and not any(cell.startswith("FAILED") for cell in cells)
        rows.append((version, *cells))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0 if fine else 1


def _run(version: str) -> tuple[str, ...]:
    start = time.monotonic()
    try:
        overlay.prepare(version)
    except SimulationError as error:
        print(error, file=sys.stderr)
        return "FAILED", "-", "-", "-"
    return (
        f"ready, {time.monotonic() - start:.0f} s",
        _tests(version, SIMULATION),
        _tests(version, PLACEMENT),
        _demo(version),
    )


def _tests(version: str, places: Sequence[str]) -> str:
    folders = [name for name in places if (ROOT / name).exists()]
    if not folders:
        return "none here"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *folders]
    done = subprocess.run(command, cwd=ROOT, env=_environment(version), capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr[-200:]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
        return f"FAILED: {last}"
    return last


def _demo(version: str) -> str:
    if not (ROOT / "devguard" / "cli" / "demo.py").exists():
        return "no demo here"
    command = [sys.executable, "-m", "devguard", "demo", "--json", "--torch", version]
    done = subprocess.run(command, cwd=ROOT, env=_environment(version), capture_output=True, text=True)
    try:
        shown = json.loads(done.stdout)
        before, after = shown["unguarded"], shown["guarded"]
        text = f"{before['stray_bytes'] >> 20} MiB on other GPUs before, {after['stray_bytes']} bytes after"
        cured = before["stray_bytes"] > 0 and after["stray_bytes"] == 0 and after["values_equal"]
        right = cured and not after["stray_contexts"] and done.returncode == 0
    except (ValueError, KeyError, TypeError):
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        return f"FAILED: exit status {done.returncode}"
    return text if right else f"FAILED: {text}"


def _environment(version: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "DEVGUARD_TEST_TORCH": version, "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
