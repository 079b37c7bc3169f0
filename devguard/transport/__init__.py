"""How tensors travel between the processes of one machine: one copy in an arena, read by each rank.

`Arena` and `Handle` are the sender's side, `join` and `Reader` the readers'. `ledger` keeps the books, `wire` and
`server` talk, `memory` is what is shared, `payload` turns objects into bytes, and `pinning` prepares memory for GPUs.
Nothing here imports torch before an object holds a tensor. Imports what lies below guards; guards import nothing here.
"""

from __future__ import annotations

from devguard.errors import BudgetFull, HandleReleased, PeerGone
from devguard.transport.arena import Arena
from devguard.transport.handle import Handle
from devguard.transport.reader import Reader
from devguard.transport.reading import join
from devguard.transport.usage import LeaseUsage, Usage

__all__ = [
    "Arena",
    "BudgetFull",
    "Handle",
    "HandleReleased",
    "join",
    "LeaseUsage",
    "PeerGone",
    "Reader",
    "Usage",
]
