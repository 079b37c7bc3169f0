"""What it costs to send the requests of a pass: copies between host and GPUs, and peaks of GPU 0, host and /dev/shm.

The simulation counts the copies; on real GPUs nothing does, and there are none in the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from devguard.demo import copies
from devguard.demo.host_memory import Sampler
from devguard.transport import Arena

__all__ = ["Costs"]


class Costs:
    """The costs of one pass.

    Parameters
    ----------
    pids : sequence of int
        All processes of the pass.
    log : str or None
        The simulation's log; None on real GPUs.
    """

    def __init__(self, pids: Sequence[int], log: str | None) -> None:
        self._pids = pids
        self._log = log
        self._copies: dict[str, dict[str, int]] = {}
        self._private = self._shared = 0

    @contextlib.contextmanager
    def measure(self, way: str) -> Iterator[None]:
        """Measure a block that sends in one way."""
        start = 0 if self._log is None else copies.size(self._log)
        with Sampler(self._pids) as sampler:
            yield
        self._private, self._shared = max(self._private, sampler.private), max(self._shared, sampler.shared)
        if self._log is not None:
            found = copies.read(self._log, start)._asdict()
            self._copies[way] = {direction: sum(sizes) for direction, sizes in found.items()}

    def as_dict(self, processes: Sequence[dict[str, Any]], arena: Arena | None) -> dict[str, Any]:
        """Return the result as plain data.

        Parameters
        ----------
        processes : sequence of dict
            What each process holds on each GPU.
        arena : Arena or None
            The arena, if the requests went through one.

        Returns
        -------
        dict
            ``copies``: bytes ``down``, ``up`` and ``across`` for each way, or None; ``contexts``; and in bytes
            ``gpu_0_peak`` (the peaks of all processes), ``host_peak`` (the private memory of all processes, beyond what
            they held before a block, and the arena's), ``shm_peak`` (of /dev/shm, beyond what was there before).
        """
        devices = [device for process in processes for device in process["devices"]]
        return {
            "copies": None if self._log is None else self._copies,
            "contexts": sum(bool(device["context"]) for device in devices),
            "gpu_0_peak": sum(device["peak_bytes"] for device in devices if device["index"] == 0),
            "host_peak": self._private + (0 if arena is None else arena.usage().allocated),
            "shm_peak": self._shared,
        }
