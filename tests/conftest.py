"""Fixtures for every test: programs on simulated GPUs (tests/simulated.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests import simulated

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def sim_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """``sim_environment(gpus=2, **options)``: an environment for a child process, with a fresh state file each time."""
    if not simulated.POSSIBLE:
        pytest.skip("simulated GPUs exist for Linux on x86-64 only")
    folder = tmp_path_factory.mktemp("sim")
    return functools.partial(simulated.sim_environment, folder=folder)


@pytest.fixture(scope="session")
def run_simulated(sim_environment: Callable[..., dict[str, str]]) -> Callable[..., simulated.Finished]:
    """``run_simulated(code, gpus=2)``, ``run_simulated([script, ...], env=...)``: see tests/simulated.py."""

    def run(program: Any, *, env: Any = None, gpus: int = 2, **options: Any) -> simulated.Finished:
        passed = {name: options.pop(name) for name in ("input", "check", "timeout") if name in options}
        chosen = env if env is not None else sim_environment(gpus, **options)
        return simulated.run_simulated(program, env=chosen, **passed)

    return run
