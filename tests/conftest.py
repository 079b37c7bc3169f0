"""Fixtures for every test: a reset devguard, fake devices, and programs on simulated GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from devguard.ownership.resolve import LAUNCHERS
from tests.helpers import simulated

pytest_plugins = ["pytester"]

# No example has a time limit: what a busy machine delays is not wrong.
hypothesis.settings.register_profile("untimed", deadline=None)
# `pytest --hypothesis-profile=long` for a run by hand.
hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("untimed")

if TYPE_CHECKING:
    from tests.helpers.fakecuda import FakeCuda

DEVICE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DEVGUARD",
    "DEVGUARD_DEVICE",
    "RANK",
    *(name for launcher in LAUNCHERS for name in (launcher.rank, *launcher.size)),
)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset devguard to its state after import, before and after the test, and unset variables that name a device."""
    from devguard.support import forks
    from tests.helpers import tagging

    for name in DEVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield from tagging.fresh()
    assert not any(lock._is_owned() for lock in list(forks._locks)), "a lock is held; later tests would wait for it"


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """Install eight fake devices, which only have a current index (tests/helpers/fakecuda.py)."""
    from tests.helpers.fakecuda import FakeCuda

    with FakeCuda(8).installed() as devices:
        yield devices


@pytest.fixture(scope="session")
def sim_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Return ``sim_environment(gpus=2, **options)``: an environment for a child process, with a new state file."""
    if not simulated.POSSIBLE:
        pytest.skip("simulated GPUs exist for Linux on x86-64 only")
    folder = tmp_path_factory.mktemp("sim")
    return functools.partial(simulated.sim_environment, folder=folder)


@pytest.fixture(scope="session")
def run_simulated(sim_environment: Callable[..., dict[str, str]]) -> Callable[..., simulated.Finished]:
    """Return ``run_simulated(code, gpus=2)`` or ``([script, ...], env=...)``; see tests/helpers/simulated.py."""

    def run(program: Any, *, env: Any = None, gpus: int = 2, **options: Any) -> simulated.Finished:
        passed = {name: options.pop(name) for name in ("input", "check", "timeout") if name in options}
        chosen = env if env is not None else sim_environment(gpus, **options)
        return simulated.run_simulated(program, env=chosen, **passed)

    return run
