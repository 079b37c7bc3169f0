"""The door ``buffers``: ``torch.frombuffer`` returns a tensor on the owner, on request.

The door acts only inside ``remap()``, or where ``doors=`` names it. Programs use ``torch.frombuffer`` for host memory
that they share (ring buffers, shared memory, gloo messages), and a tensor on an accelerator is a copy, which no longer
aliases the buffer. See docs/doors.md.
"""

from __future__ import annotations

from typing import Any

from devguard.ownership import in_force
from devguard.reporting.advice import OR_REPAIR, advise
from devguard.reporting.verdict import judge
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "buffers"

_patches = Patches()
_ADVICE = f"{advise(NAME)} {OR_REPAIR}"


def install() -> None:
    """Replace ``torch.frombuffer``."""
    import torch

    original = _patches.find(torch, "frombuffer")

    def frombuffer(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or owner.index < 0 or not in_force.is_requested(NAME):
            return original(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        tensor = original(*args, **kwargs)
        known = {"dtype": str(tensor.dtype), "shape": tensor.shape}
        if judge(NAME, "cpu", owner, tensor.nbytes, _ADVICE, target=owner.tag, **known):
            tensor = tensor.to(owner.tag)  # not its device, which is unset where another thread has closed the doors
        return tensor.requires_grad_() if requires_grad else tensor  # after the move, so that it is a leaf

    _patches.replace(torch, "frombuffer", frombuffer)


def uninstall() -> list[str]:
    """Put ``torch.frombuffer`` back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the copies of ``torch.frombuffer`` from before the door opened."""
    return {"early_copies": _patches.early_copies()}
