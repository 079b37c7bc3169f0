"""``devguard demo``: SGLang issue 5732 in real processes, before and after the guard.

A tokenizer process puts a picture on ``cuda:0``, as a fast image processor does, and sends it by pickle to N rank
processes that own one GPU each. The modules, in the order of the data flow: `pictures` (a file to pixels),
`image_patches` (pixels to model input), `transport` (tokenizer to ranks), `worker` (one rank), `crew` (all ranks),
`scenario` (one pass, in its own process), `launch` (both passes), `report` and `plot`.

Only `image_patches`, `transport`, `worker` and `scenario` use torch. The command that shows the result never imports
torch.
"""

from __future__ import annotations

from devguard.errors import DevGuardError

__all__ = ["DemoError"]


class DemoError(DevGuardError):
    """The demonstration failed. The message names the process that failed, and the reason."""
