"""SGLang: each of its processes on the GPU that SGLang gave it, and the processes without a GPU on none.

Three roads to the same end, which may be taken together:

- ``DEVGUARD=repair`` in the environment, and no line of code: `arm`, called by torch's own autoload hook;
- the plugin ``devguard`` of the group ``sglang.srt.plugins`` (SGLang 0.5.12 and later): `plugin`;
- for programs that start the workers themselves: `worker`, and `guarded_engine`.

Schedulers own their ``gpu_id``; the data-parallel controller and the detokenizer own ``cpu``. Tokenizer and encoder
processes are left to the rule of adoption, because an image processor may use a GPU there.

Importing this imports neither SGLang nor torch.
"""

from __future__ import annotations

from devguard.integrations.sglang.bugs import BUGS, Bug, known_bugs
from devguard.integrations.sglang.entry import guarded_engine, worker
from devguard.integrations.sglang.plugin import plugin
from devguard.integrations.sglang.roles import arm, disarm
from devguard.integrations.sglang.versions import NEWEST, OLDEST, UnsupportedVersionError

__all__ = [
    "arm",
    "Bug",
    "BUGS",
    "disarm",
    "guarded_engine",
    "known_bugs",
    "NEWEST",
    "OLDEST",
    "plugin",
    "UnsupportedVersionError",
    "worker",
]
