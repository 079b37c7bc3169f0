"""What the pytest plugin declares in every pytest run: its options, and its marker. Standard library only."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["marker", "Option", "OPTIONS"]


class Option(NamedTuple):
    """An option of the command line, with its twin in the ini file.

    Attributes
    ----------
    flag, name, metavar, help : str
        The option, the name of its twin, its value in the help, and the help.
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
        "the mode of single doors: threads=error,ipc=warn",
    ),
    Option("--devguard-gpus", "devguard_gpus", "N", "run everything on N simulated GPUs, 1 to 16 (0: none)"),
)


def marker(device: Any = None, mode: str | None = None, allow: Any = ()) -> dict[str, Any]:
    """Guard this test otherwise: its own device and mode, and devices that it may use besides."""
    return {"device": device, "mode": mode, "allow": allow}
