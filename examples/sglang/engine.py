"""SGLang with each process on its own GPU: in two lines, or with none at all.

In the program that builds the engine, two lines:

    import devguard
    Engine = devguard.integrations.sglang.guarded_engine(sglang.Engine)

With no line at all:

    DEVGUARD=repair python -m sglang.launch_server --model-path ... --tp-size 2

This file needs SGLang, but no GPU and no model: it shows what the guarded engine starts its processes with.
"""

from __future__ import annotations

import sglang

import devguard
from devguard.integrations.sglang import known_bugs

if __name__ == "__main__":
    Engine = devguard.integrations.sglang.guarded_engine(sglang.Engine)

    print("entry point:", Engine.run_scheduler_process_func.__name__)
    for bug in known_bugs(sglang.__version__):
        print("guarded against:", bug.reference)
