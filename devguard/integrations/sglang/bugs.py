"""SGLang's bugs that put work onto the wrong GPU, for ``devguard doctor``: the affected releases, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass

from devguard.integrations.sglang.versions import parse

__all__ = ["Bug", "BUGS", "known_bugs"]


@dataclass(frozen=True)
class Bug:
    """One bug.

    Attributes
    ----------
    what : str
        The effect of the bug.
    reference : str
        The issue or pull request in sgl-project/sglang.
    first, last : str or None
        The first and the last release with the bug. None as `first`: since before the oldest release that devguard
        supports; None as `last`: not fixed yet.
    remedy : str
        What devguard does about the bug.
    """

    what: str
    reference: str
    first: str | None
    last: str | None
    remedy: str


BUGS = (
    Bug(
        "pixel_values made on GPU 0 by the tokenizer are rebuilt on cuda:0 by every tensor- and data-parallel rank",
        "issue 5732, pull request 5745",
        None,
        "0.4.6.post2",
        "door load: rebuilt on the rank's own GPU",
    ),
    Bug(
        "broadcast_pyobj, point_to_point_pyobj and zmq recv_pyobj unpickle by the sender's device: any field that the "
        "tokenizer leaves on cuda:0 (grid_thws was one) opens GPU 0 in every rank and in the data-parallel controller",
        "issue 5732, pull requests 5745 and 22858",
        None,
        None,
        "door load: rebuilt on the rank's own GPU, kept on the host by a controller, which passes the tag on",
    ),
    Bug(
        "with SGLANG_USE_PICKLE_IPC=0 a message's tensors are moved to the sender's device (_restore_torch_tensor)",
        "utils/msgpack_utils.py",
        "0.5.23",  # The only release with this module that was checked.
        None,
        "the integration: moved to the rank's own GPU",
    ),
    Bug(
        "a CUDA IPC handle names the sender's index, which is another GPU where the visible devices differ",
        "pull request 4565 (its repair must be called by sender and receiver)",
        None,
        None,
        "door ipc: found by UUID, and opened with the owner current",
    ),
)


def known_bugs(version: str) -> tuple[Bug, ...]:
    """Return the bugs that a release of SGLang has."""
    here = parse(version)
    return tuple(
        bug
        for bug in BUGS
        if (bug.first is None or parse(bug.first) <= here) and (bug.last is None or here <= parse(bug.last))
    )
