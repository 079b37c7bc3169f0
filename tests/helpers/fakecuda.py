"""Fake devices that only have a current index, for tests of scopes on a CPU build of torch.

`FakeCuda` puts the functions into ``torch._C`` that devguard and ``torch.cuda.set_device`` call. No tensor can be on
such a device; tests/placement checks on simulated GPUs where bytes go.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import devguard


class FakeCuda:
    """`count` devices; each thread starts on device 0, as with CUDA."""

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.calls: list[tuple[str, int]] = []
        self._local = threading.local()

    @property
    def current(self) -> int:
        """The current device of this thread."""
        return getattr(self._local, "index", 0)

    def _move(self, how: str, index: int) -> int:
        assert index < self.count, f"{how}({index}) on {self.count} devices"
        previous = self.current
        self.calls.append((how, index))
        self._local.index = index
        return previous

    def exchange(self, index: int) -> int:
        return -1 if index < 0 else self._move("exchange", index)

    def maybe_exchange(self, index: int) -> int:
        return -1 if index < 0 else self._move("maybe_exchange", index)

    def set_device(self, index: int) -> None:
        self._move("set", index)

    @contextlib.contextmanager
    def installed(self) -> Iterator[FakeCuda]:
        """Patch the devices into torch inside this block. devguard is uninstalled before torch is restored."""
        functions: dict[str, Any] = {
            "_cuda_exchangeDevice": self.exchange,
            "_cuda_maybeExchangeDevice": self.maybe_exchange,
            "_cuda_getDevice": lambda: self.current,
            "_cuda_setDevice": self.set_device,
        }
        with contextlib.ExitStack() as patches:
            for name, function in functions.items():
                patches.enter_context(mock.patch.object(torch._C, name, function, create=True))
            patches.enter_context(mock.patch.object(torch.cuda, "device_count", return_value=self.count))
            devguard.uninstall()
            try:
                yield self
            finally:
                devguard.uninstall()
