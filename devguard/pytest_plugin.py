"""The pytest plugin: ``pytest --devguard=error --devguard-gpus 4``.

Here is what every pytest run loads: the options, the marker, the fixtures. It imports nothing but the standard library
and pytest, and does nothing until an option asks for it; what then happens is in devguard/testing/. See docs/pytest.md.
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


def _checked(name: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        from devguard.testing import options

        try:
            return options.CHECKS[name](text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options and their twins in the ini file."""
    group = parser.getgroup("devguard", "devguard: which GPU does this test use?")
    for flag, name, metavar, text in OPTIONS:
        group.addoption(flag, dest=name, metavar=metavar, type=_checked(name), help=text)
        parser.addini(name, f"{flag}: {text}")


@pytest.hookimpl(
    hookwrapper=True, tryfirst=True
)  # before output is captured; hookwrapper: an old pytest must load this
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Start again on simulated GPUs, before any of the user's code is imported."""
    if _asks(early_config, "devguard_gpus"):
        from devguard.testing import restart

        restart.on_simulated_gpus(early_config)
    yield


def pytest_configure(config: pytest.Config) -> None:
    """Document the marker, and guard the tests if an option asks for it."""
    arguments = ", ".join(f"{name}={known.default!r}" for name, known in inspect.signature(marker).parameters.items())
    config.addinivalue_line("markers", f"devguard({arguments}): {inspect.getdoc(marker)}")
    if any(_asks(config, option.name) for option in OPTIONS):
        _guard_tests(config)


def _guard_tests(config: pytest.Config) -> None:
    """Guard the tests of this run, as the options say."""
    if int(pytest.__version__.partition(".")[0]) < PYTEST_MINIMUM:
        raise pytest.UsageError(
            f"devguard's options need pytest {PYTEST_MINIMUM} or newer; this is {pytest.__version__}"
        )
    from devguard import simgpu
    from devguard.testing import guarding, options, report

    if options.gpus(config) and not options.only_asks(config) and not simgpu.active():
        raise pytest.UsageError(
            "--devguard-gpus came too late: a conftest has loaded the plugin. Load it with -p devguard.pytest_plugin."
        )
    chosen = options.read(config)
    config.pluginmanager.register(report.Report(config, chosen), "devguard-report")
    if chosen is not None and not config.option.collectonly:
        config.pluginmanager.register(guarding.Guarding(config, chosen), "devguard-guarding")


def _asks(config: pytest.Config, name: str) -> bool:
    given = getattr(getattr(config, "known_args_namespace", config.option), name, None)
    return given is not None or bool(config.getini(name))


@pytest.fixture
def devguard_strays(request: pytest.FixtureRequest) -> Live:
    """What strayed in this test so far, as a sequence of `devguard.Stray`: it grows as the test goes on."""
    from devguard.testing import fixtures

    return fixtures.strays(request.node)


@pytest.fixture
def devguard_contexts() -> Live:
    """The devices on which this process holds a CUDA context now, as a sequence of ``torch.device``."""
    from devguard.testing import fixtures

    return fixtures.contexts()


@pytest.fixture
def gpu_owner(request: pytest.FixtureRequest) -> Any:
    """The ``torch.device`` that this test owns: its marker's, else that of the xdist worker or the process."""
    from devguard.testing import fixtures, markers

    return fixtures.device_of(markers.of(request.node).device, os.environ)
