"""Check the door ``triton`` with the real Triton on simulated GPUs; prints a line for each launch.

Triton is 700 MB, so the tests use a stand-in (tests/helpers/triton_stand_in.py). To check that the stand-in still has
Triton's shape, for any release since 3.4::

    pip install --no-deps --target /tmp/triton/site-packages triton==3.7.1
    devguard sim --gpus 4 -- python -m tests.real_triton /tmp/triton/site-packages

Only the driver and the result of the compiler are replaced, because a simulated GPU runs no kernels.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, sys.argv[1])

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import devguard
from devguard.reporting.journal import journal

devices: list[int] = []


class Driver:
    """Triton's driver, without its C part."""

    get_current_device = staticmethod(torch.cuda.current_device)
    get_active_torch_device = get_current_device
    get_device_interface = staticmethod(lambda: torch.cuda)

    def get_current_stream(self, device: int) -> int:
        devices.append(device)
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 80, 32)

    def get_benchmarker(self) -> Any:
        def benchmark(launch: Any, **options: Any) -> list[float]:
            launch()
            return [1.0, 1.0, 1.0]

        return benchmark


def compiled(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(
        run=lambda *args: None,
        launch_metadata=lambda *args: None,
        function=0,
        packed_metadata=(),
        __getitem__=lambda grid: None,
    )


@triton.jit
def add(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


KERNELS = {
    "plain": (add, {"B": 64}),
    "heuristics": (triton.heuristics({"B": lambda values: 64})(add), {}),
    "autotune": (triton.autotune(configs=[triton.Config({"B": b}) for b in (64, 128)], key=["n"])(add), {}),
}


def main() -> int:
    triton.runtime.driver.set_active(Driver())
    triton.compile = triton.runtime.jit.compile = compiled  # type: ignore[assignment]
    if hasattr(JITFunction, "_do_compile"):  # Triton 3.4
        JITFunction._do_compile = compiled
    own = JITFunction.run
    wrong = 0
    tensors = {index: torch.empty(64, device=f"cuda:{index}") for index in (1, 2)}
    cases = {
        "on the owner": (1, tensors[1], [1], None),
        "owner's arguments, another device current": (2, tensors[1], [1], "repaired"),
        "foreign arguments": (1, tensors[2], [2], "observed"),
    }
    for kind, (kernel, constants) in KERNELS.items():
        for what, (current, tensor, expected, action) in cases.items():
            journal.clear()
            devices.clear()
            with devguard.guard(1), torch.cuda.device(current):
                kernel[(1,)](tensor, tensor, 64, **constants)
                after = torch.cuda.current_device()
            strays = [(stray.door, stray.action, stray.count) for stray in journal.strays()]
            right = (
                set(devices) == set(expected)
                and after == current
                and strays == ([("triton", action, 1)] if action else [])
                and all(stray.site and stray.site.function == "main" for stray in journal.strays())
            )
            wrong += not right
            print("ok   " if right else "WRONG", kind, "|", what, "|", devices, strays)
    left = devguard.uninstall()
    wrong += bool(left) + (JITFunction.run is not own)
    print("Triton", triton.__version__, "torch", torch.__version__, "wrong:", wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
