"""A stand-in for vLLM's plugin contract (vllm/plugins), without anything that the contract does not promise."""

import os
from importlib.metadata import entry_points

loaded = False


def load_general_plugins():
    """Call every plugin once in a process; ``VLLM_PLUGINS`` is a whitelist."""
    global loaded
    if loaded:
        return
    loaded = True
    allowed = os.environ.get("VLLM_PLUGINS")
    for plugin in entry_points(group="vllm.general_plugins"):
        if allowed is None or plugin.name in allowed.split(","):
            plugin.load()()
