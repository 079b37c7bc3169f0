"""Pinning needs a process that uses CUDA; tests/placement/transport has those that do."""

from __future__ import annotations

import subprocess
import sys

from devguard.transport import pinning
from devguard.transport.memory import Memory


def test_a_process_without_cuda_pins_nothing() -> None:
    _, mapping = Memory.make(4096)
    assert not pinning.pin(mapping, "cuda:0")
    assert mapping.before_unmap is None


def test_transport_imports_no_torch_for_objects_without_tensors() -> None:
    program = """
import sys
from devguard import transport
with transport.Arena("cpu", budget="1MiB") as arena:
    assert arena.put({"a": bytes(200_000)}).get() == {"a": bytes(200_000)}
print(sorted({"torch", "numpy", "wrapt"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
