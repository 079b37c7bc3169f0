"""``--devguard-gpus N``: the same command line again, in a process that sees N simulated GPUs.

It is done before any code of the user's is imported and before output is captured, and keeps the process: its number,
its streams and its exit status are those of pytest. The processes of pytest-xdist inherit the simulation.
"""

from __future__ import annotations

import os
import sys

import pytest

from devguard import simgpu
from devguard.errors import SimulationError
from devguard.testing import options

__all__ = ["on_simulated_gpus"]


def on_simulated_gpus(config: pytest.Config) -> None:
    """Become the same program on simulated GPUs, unless this is it already or nothing is going to run."""
    number = options.gpus(config)
    if not number or _current() == number or options.only_asks(config):
        return
    _check_can_restart(config, number)
    try:
        environment = simgpu.environment(number)
    except SimulationError as error:
        raise pytest.UsageError(f"--devguard-gpus {number}: {error}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    # argv[0] tells Python where its environment is
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _current() -> int:
    return int(os.environ["DEVGUARD_SIM_GPUS"]) if simgpu.active() else 0


def _check_can_restart(config: pytest.Config, number: int) -> None:
    """Raise if starting this process again would not give the same run."""
    instead = f"Start it as `devguard sim --gpus {number} -- ...`, without --devguard-gpus."
    if "PYTEST_XDIST_WORKER" in os.environ:
        raise pytest.UsageError(f"--devguard-gpus {number} did not reach this xdist worker. {instead}")
    if config.invocation_params.args != tuple(sys.argv[1:]):
        raise pytest.UsageError(
            f"--devguard-gpus {number} starts the process again, and here pytest runs inside another program "
            f"(pytest.main). {instead}"
        )
    if sys.flags.ignore_environment:
        raise pytest.UsageError(
            f"--devguard-gpus {number} needs PYTHONPATH, which this Python ignores (options -E and -I). Leave them out."
        )
