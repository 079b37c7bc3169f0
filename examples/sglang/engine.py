"""SGLang with each process on its own GPU: with two lines of code, or with none.

In the program that builds the engine, two lines:

    import devguard
    Engine = devguard.integrations.sglang.guarded_engine(sglang.Engine)

With no code:

    DEVGUARD=repair python -m sglang.launch_server --model-path ... --tp-size 2

This example needs SGLang, but no GPU and no model: it prints the entry point of the guarded engine's processes.
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
