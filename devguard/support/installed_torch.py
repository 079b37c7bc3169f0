"""The installed torch: importing it, with an error that names what to install."""

from __future__ import annotations

from typing import Any

from devguard.errors import DevGuardError

__all__ = ["import_torch", "MissingTorchError", "release", "SUPPORTED", "TORCH_MINIMUM"]

TORCH_MINIMUM = (2, 6)
SUPPORTED = "2.6 to 2.15"  # the releases that devguard was tested with: python -m tests.torch_versions


class MissingTorchError(DevGuardError, ImportError):
    """torch is needed now and is not installed, or is too old."""


def import_torch() -> Any:
    """Import torch.

    Raises
    ------
    MissingTorchError
        If torch is not installed or is too old; the message names what to install.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingTorchError(
            "devguard needs torch here and this environment has none. Install the build that fits your machine "
            "(see pytorch.org), or any build with: pip install 'torch-devguard[torch]'."
        ) from None
    if _release_of(torch.__version__) < TORCH_MINIMUM:
        raise MissingTorchError(
            f"devguard supports torch {'.'.join(map(str, TORCH_MINIMUM))} and newer; this environment has "
            f"{torch.__version__}. Upgrade torch, or remove devguard from this program."
        )
    return torch


def release() -> tuple[int, ...]:
    """Return the release of the installed torch, such as ``(2, 13)``."""
    return _release_of(import_torch().__version__)


def _release_of(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
