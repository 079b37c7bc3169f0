"""The options and the marker that the pytest plugin declares in every run. Standard library only."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["marker", "Option", "OPTIONS"]


class Option(NamedTuple):
    """An option of the command line and of the ini file.

    Attributes
    ----------
    flag, name, metavar, help : str
        The option, its name in the ini file, the placeholder for its value, and its help text.
    """

    flag: str
    name: str
    metavar: str
    help: str


_MODE = "off, observe, warn, repair or error"
OPTIONS = (
    Option("--devguard", "devguard_mode", "MODE", f"guard each test's device; what to do with strays: {_MODE}"),
    Option(
        "--devguard-doors",
        "devguard_doors",
        "DOOR=MODE,...",
        "the mode of individual doors: threads=error,ipc=warn",
    ),
    Option("--devguard-gpus", "devguard_gpus", "N", "run everything on N simulated GPUs, 1 to 16 (0: none)"),
)


def marker(device: Any = None, mode: str | None = None, allow: Any = ()) -> dict[str, Any]:
    """Guard this test differently: with its own device or mode, or with further devices that it may use."""
    return {"device": device, "mode": mode, "allow": allow}
