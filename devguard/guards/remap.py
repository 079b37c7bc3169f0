"""`remap`: a guard for deserialization, in which host buffers land on the owner too."""

from __future__ import annotations

from devguard.guards.guard import guard
from devguard.ownership import in_force
from devguard.ownership.owner import Owner

__all__ = ["remap"]


class remap(guard):
    """A scope for deserialization: data that arrives in it lands on the owner, host buffers included.

    As `guard`, and inside it ``torch.frombuffer`` gives a tensor on the owner, and memory that another process shares
    from another GPU (CUDA IPC) is copied to the owner. Those tensors are copies: they no longer alias the buffer, or
    the producer's memory. Outside ``remap()`` ``torch.frombuffer`` is left alone, because programs use it for host
    memory that they share.

    Parameters
    ----------
    device, argument, resolve, mode, doors
        As for `guard`; but an omitted device is that of the scope around this one, else that of the environment.
    """

    __slots__ = ()

    def requests(self, door: str) -> bool:
        """Return True: this scope requests every door that acts on request only."""
        return True

    def _search(self, tried: str) -> Owner:
        return in_force.owner() or super()._search(tried)
