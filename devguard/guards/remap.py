"""`remap`: a guard for deserialization, in which host buffers land on the owner too."""

from __future__ import annotations

from devguard.guards.guard import guard
from devguard.ownership import in_force
from devguard.ownership.owner import Owner

__all__ = ["remap"]


class remap(guard):
    """A scope for deserialization: what arrives here lands on the owner, host buffers included.

    As `guard`, and inside it ``torch.frombuffer`` gives a tensor on the owner, and memory that another process shares
    from another GPU (CUDA IPC) is copied to the owner. Those tensors are copies: they no longer alias the buffer, or
    the producer's memory. Outside ``remap()`` ``torch.frombuffer`` is left alone, because programs use it for host
    memory that they share.

    Parameters
    ----------
    device, argument, resolve, mode, doors
        As for `guard`; but left out, the owner is that of the scope around this one, before the environment
        is asked.
    """

    __slots__ = ()

    def asks_for(self, door: str) -> bool:
        """Tell whether this scope asks a door to act that acts on request only: here, all of them."""
        return True

    def _search(self, tried: str) -> Owner:
        return in_force.owner() or super()._search(tried)
