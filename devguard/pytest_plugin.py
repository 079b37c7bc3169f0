"""The pytest plugin: ``pytest --devguard=error --devguard-gpus 4``.

Every pytest run loads this module: the options, the marker, the fixtures. It imports only the standard library and
pytest, and does nothing until an option is given. The rest lies in devguard/testing/. See docs/pytest.md.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from devguard.testing.declared import OPTIONS, marker

if TYPE_CHECKING:
    from devguard.testing.fixtures import Live

__all__ = ["devguard_contexts", "devguard_strays", "gpu_owner"]

PYTEST_MINIMUM = 8


def _checker(name: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        from devguard.testing import options

        try:
            return options.CHECKS[name](text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options, for the command line and the ini file."""
    group = parser.getgroup("devguard", "devguard: which GPU does this test use?")
    for flag, name, metavar, text in OPTIONS:
        group.addoption(flag, dest=name, metavar=metavar, type=_checker(name), help=text)
        parser.addini(name, f"{flag}: {text}")


# tryfirst: the restart must come before output is captured. hookwrapper: older versions of pytest must load this file.
@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Restart on simulated GPUs, before any user code is imported."""
    if _is_set(early_config, "devguard_gpus"):
        from devguard.testing import restart

        restart.on_simulated_gpus(early_config)
    yield


def pytest_configure(config: pytest.Config) -> None:
    """Document the marker, and guard the tests if an option is set."""
    arguments = ", ".join(f"{name}={known.default!r}" for name, known in inspect.signature(marker).parameters.items())
    config.addinivalue_line("markers", f"devguard({arguments}): {inspect.getdoc(marker)}")
    if any(_is_set(config, option.name) for option in OPTIONS):
        _guard_tests(config)


def _guard_tests(config: pytest.Config) -> None:
    """Guard the tests of this run according to the options."""
    if int(pytest.__version__.partition(".")[0]) < PYTEST_MINIMUM:
        raise pytest.UsageError(
            f"devguard's options need pytest {PYTEST_MINIMUM} or newer; this is {pytest.__version__}"
        )
    from devguard import simgpu
    from devguard.testing import guarding, options, report

    if options.gpus(config) and not options.is_query(config) and not simgpu.active():
        raise pytest.UsageError(
            "--devguard-gpus came too late: a conftest loaded the plugin. Load it with -p devguard.pytest_plugin."
        )
    chosen = options.read(config)
    config.pluginmanager.register(report.Report(config, chosen), "devguard-report")
    if chosen is not None and not config.option.collectonly:
        config.pluginmanager.register(guarding.Guarding(config, chosen), "devguard-guarding")


def _is_set(config: pytest.Config, name: str) -> bool:
    value = getattr(getattr(config, "known_args_namespace", config.option), name, None)
    return value is not None or bool(config.getini(name))


@pytest.fixture
def devguard_strays(request: pytest.FixtureRequest) -> Live:
    """The strays of this test so far, as a sequence of `devguard.Stray` that grows as the test runs."""
    from devguard.testing import fixtures

    return fixtures.strays(request.node)


@pytest.fixture
def devguard_contexts() -> Live:
    """The devices on which this process now holds a CUDA context, as a sequence of ``torch.device``."""
    from devguard.testing import fixtures

    return fixtures.contexts()


@pytest.fixture
def gpu_owner(request: pytest.FixtureRequest) -> Any:
    """The ``torch.device`` that this test owns, from its marker, else from the xdist worker or the process."""
    from devguard.testing import fixtures, markers

    return fixtures.owned_device(markers.read(request.node).device, os.environ)
