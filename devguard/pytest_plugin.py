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

if TYPE_CHECKING:
    from devguard.testing.live import Live

__all__ = ["devguard_contexts", "devguard_strays", "gpu_owner"]

_MODE = "off, observe, warn, repair or error"
# option, name of its twin in the ini file, metavar, help
_OPTIONS = (
    ("--devguard", "devguard_mode", "MODE", f"guard each test's device; what to do with strays: {_MODE}"),
    ("--devguard-doors", "devguard_doors", "DOOR=MODE,...", "the mode of single doors, such as threads=error,ipc=warn"),
    ("--devguard-gpus", "devguard_gpus", "N", "run everything on N simulated GPUs, 1 to 16 (0: none)"),
)


def marker(device: Any = None, mode: str | None = None, allow: Any = ()) -> dict[str, Any]:
    """Guard this test otherwise: its own device and mode, and devices that it may use besides."""
    return {"device": device, "mode": mode, "allow": allow}


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
    for option, name, metavar, text in _OPTIONS:
        group.addoption(option, dest=name, metavar=metavar, type=_checked(name), help=text)
        parser.addini(name, f"{option}: {text}")


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
    if any(_asks(config, name) for _, name, _, _ in _OPTIONS):
        from devguard.testing import options

        options.configure(config)


def _asks(config: pytest.Config, name: str) -> bool:
    given = getattr(getattr(config, "known_args_namespace", config.option), name, None)
    return given is not None or bool(config.getini(name))


@pytest.fixture
def devguard_strays(request: pytest.FixtureRequest) -> Live:
    """What strayed in this test so far, as a sequence of `devguard.Stray`: it grows as the test goes on."""
    from devguard.testing import live

    return live.strays(request.node)


@pytest.fixture
def devguard_contexts() -> Live:
    """The devices on which this process holds a CUDA context now, as a sequence of ``torch.device``."""
    from devguard.testing import live

    return live.contexts()


@pytest.fixture
def gpu_owner(request: pytest.FixtureRequest) -> Any:
    """The ``torch.device`` that this test owns: its marker's, else that of the xdist worker or the process."""
    from devguard.testing import marked, owning

    return owning.device_of(marked.of(request.node).device, os.environ)
