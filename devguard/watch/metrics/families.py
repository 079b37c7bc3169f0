"""The names of the metrics, with their types, labels and texts. docs/watch.md and the dashboard use these names.

No label is a process ID, unless asked for, or a line of code: Prometheus keeps each combination of labels for weeks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from devguard.support.terminal import printable

__all__ = ["ARENA", "FAMILIES", "Family", "GPU", "Labels", "labels_of", "PROCESS", "series_names", "STRAY"]

Labels = tuple[str, ...]  # the values of the labels of one series

LONGEST_LABEL = 200

PROCESS = ("gpu_uuid", "gpu", "role", "owner", "verdict")
GPU = ("gpu_uuid", "gpu")
STRAY = ("door", "action", "from_device", "owner")
ARENA = ("arena", "kind")


class Family(NamedTuple):
    """One metric.

    Attributes
    ----------
    kind : str
        Its type in Prometheus.
    labels : tuple of str
        The names of its labels.
    text : str
        What it counts or measures.
    """

    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    text: str


FAMILIES: dict[str, Family] = {
    "devguard_process_gpu_memory_bytes": Family(
        "gauge", PROCESS, "what processes hold: with contexts where the driver says so, else by torch's allocator"
    ),
    "devguard_process_gpu_context": Family("gauge", PROCESS, "how many processes have a context"),
    "devguard_strays_total": Family("counter", STRAY, "strays, without what was only placed or kept"),
    "devguard_stray_bytes_total": Family("counter", STRAY, "the bytes of their tensors"),
    "devguard_gpu_memory_used_bytes": Family("gauge", GPU, "memory in use, as the driver counts it"),
    "devguard_gpu_memory_total_bytes": Family("gauge", GPU, "memory of the GPU"),
    "devguard_transport_in_use_bytes": Family("gauge", ARENA, "bytes under a lease"),
    "devguard_transport_budget_bytes": Family("gauge", ARENA, "the most bytes under a lease"),
    "devguard_transport_peak_bytes": Family("gauge", ARENA, "the most bytes that were under a lease"),
    "devguard_transport_leases": Family("gauge", ARENA, "payloads that some reader has not finished"),
    "devguard_transport_put_bytes_total": Family("counter", ARENA, "bytes of the payloads"),
    "devguard_transport_wait_seconds_total": Family(
        "counter", ARENA, "how long puts have waited for room, all together; those that still wait are in it"
    ),
    "devguard_transport_peer_deaths_total": Family(
        "counter", ARENA, "readers that ended, or were replaced, while a lease waited for them"
    ),
    "devguard_transport_cancelled_total": Family("counter", ARENA, "leases that were cancelled"),
    "devguard_transport_release_seconds": Family("histogram", ARENA, "from a put to its last acknowledgement"),
    "devguard_shm_orphan_bytes": Family("gauge", (), "what ended processes have left in /dev/shm"),
    "devguard_scrape_success": Family("gauge", (), "1 if everything could be read, else 0"),
}


def series_names() -> set[str]:
    """Return the names of all series; those of a histogram have endings."""
    names = {name for name, family in FAMILIES.items() if family.kind != "histogram"}
    histograms = FAMILIES.keys() - names
    return names | {name + ending for name in histograms for ending in ("_bucket", "_count", "_sum")}


def labels_of(*values: str) -> Labels:
    """Return values for labels. They come from logs and from other processes, so that they may hold anything."""
    return tuple(printable(value)[:LONGEST_LABEL] for value in values)
