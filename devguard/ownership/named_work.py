"""Work on GPUs that the program names, which refutes a guessed owner: a child can own ``cuda:2`` and ``cuda:3``.

The statistics of torch's allocator show such work; reading them opens nothing. Memory on another GPU is proof if it was
allocated while the main thread had another device selected, because then a call named that GPU (``.to("cuda:3")``,
``map_location=``, ``with torch.cuda.device(3)``); or if it lives, and the main thread had selected that GPU for it.

It is no proof, so that a process that has leaked already is still repaired: on ``cuda:0`` while that was current, since
every process starts on it, and on ``cuda:0`` in a launched process that took its local rank; where data came by its tag
and was not repaired; on allowed devices, and in ``unguarded()``. A context alone is no proof: queries open contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from devguard.support import accelerator, allocator

__all__ = ["NamedWork"]


class NamedWork:
    """The GPUs on which this process has worked by name.

    Parameters
    ----------
    is_accounted : callable
        ``is_accounted(index)`` returns whether the program may use that GPU besides its own.
    """

    __slots__ = ("_quiet", "_selected", "_strayed", "_while_selected", "is_accounted")

    def __init__(self, is_accounted: Callable[[int], bool]) -> None:
        self.is_accounted = is_accounted
        self._selected, self._while_selected = 0, {0: 0}  # device -> allocations there while it was selected
        self._strayed: set[int] = set()
        self._quiet: dict[str, int] = {}  # the devices that held no context at the last look

    def select(self, index: int) -> None:
        """Note that the main thread has selected a device."""
        before = self._selected
        if index != before:
            counts = self._while_selected
            counts[before] += _allocations(before)
            counts[index] = counts.get(index, 0) - _allocations(index)
            self._selected = index

    def note_stray(self, tags: str) -> None:
        """Note that data came to devices by their tags, and stayed there."""
        for tag in tags.split(","):
            if tag[:5] == "cuda:":
                self._strayed.add(int(tag[5:]))

    def may_have_begun(self, tag: str) -> bool:
        """Return whether a device that held no context at the last look holds one now."""
        index = self._quiet.get(tag)
        return index is not None and accelerator.has_context(index)

    def find(self, owner: int, *, ignored: Iterable[int] = ()) -> list[int]:
        """Return the devices, other than `owner` and the ignored ones, on which the program has worked by name."""
        if not accelerator.is_initialized():
            return []
        others = [index for index in range(accelerator.device_count()) if index != owner]
        open_devices = set(accelerator.contexts())
        self._quiet = {f"cuda:{index}": index for index in others if index not in open_devices}
        return [
            index
            for index in others
            if index in open_devices
            and index not in ignored
            and index not in self._strayed
            and not self.is_accounted(index)
            and self._is_named(index)
        ]

    def _is_named(self, index: int) -> bool:
        allocated = _allocations(index)
        while_selected = self._while_selected.get(index, 0) + (allocated if index == self._selected else 0)
        if allocated > while_selected:
            return True
        return index > 0 and while_selected > 0 and _allocations(index, "current") > 0


def _allocations(index: int, which: str = "allocated") -> int:
    """Return a count of torch's allocator for a device; 0 where the program uses an allocator without statistics."""
    stats = allocator.statistics(index)
    return int(stats["allocation"]["all"][which]) if stats else 0
