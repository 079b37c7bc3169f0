"""``devguard demo``: SGLang issue 5732 live, in real processes, before and after the guard.

A tokenizer process puts a picture on ``cuda:0``, as a fast image processor does, and sends it by pickle to N
rank processes that own one GPU each. The parts, in the order in which the data meets them: `pictures` (a file
to pixels), `patches` (pixels to model input), `transport` (the two ways to the ranks), `worker` (one rank),
`crew` (all of them), `scenario` (one pass, run as a process of its own), `launch` (both passes), `report` and
`plot`.

Only `patches`, `transport`, `worker` and `scenario` use torch; the command that shows the result never
imports it.
"""

from __future__ import annotations

from devguard.errors import DevGuardError

__all__ = ["DemoError"]


class DemoError(DevGuardError):
    """The demonstration could not be carried through; the message says which process failed and why."""
