"""``--devguard-gpus N``: restarts pytest with the same command line on N simulated GPUs.

The restart happens before any user code is imported and before output is captured. The process keeps its pid and its
streams, and its exit status is the exit status of pytest. Workers of pytest-xdist inherit the simulation.
"""

from __future__ import annotations

import os
import sys

import pytest

from devguard import simgpu
from devguard.errors import SimulationError
from devguard.support.notices import flush
from devguard.testing import options

__all__ = ["on_simulated_gpus"]


def on_simulated_gpus(config: pytest.Config) -> None:
    """Replace this process by the same program on simulated GPUs, unless it is there already or runs no tests."""
    number = options.gpus(config)
    if not number or _current_number() == number or options.is_query(config):
        return
    _check_can_restart(config, number)
    try:
        environment = simgpu.environment(number)
    except SimulationError as error:
        raise pytest.UsageError(f"--devguard-gpus {number}: {error}") from None
    flush()
    # Python finds its environment through argv[0].
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _current_number() -> int:
    return int(os.environ["DEVGUARD_SIM_GPUS"]) if simgpu.active() else 0


def _check_can_restart(config: pytest.Config, number: int) -> None:
    """Raise if a restarted process would not give the same run."""
    instead = f"Start it as `devguard sim --gpus {number} -- ...`, without --devguard-gpus."
    if "PYTEST_XDIST_WORKER" in os.environ:
        raise pytest.UsageError(f"--devguard-gpus {number} did not reach this xdist worker. {instead}")
    if config.invocation_params.args != tuple(sys.argv[1:]):
        raise pytest.UsageError(
            f"--devguard-gpus {number} restarts the process, and is not supported where pytest runs inside another "
            f"program (pytest.main). {instead}"
        )
    if sys.flags.ignore_environment:
        raise pytest.UsageError(
            f"--devguard-gpus {number} needs PYTHONPATH, which this Python ignores (options -E and -I). Leave them out."
        )
