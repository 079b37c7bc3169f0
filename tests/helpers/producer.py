"""A process that shares CUDA tensors and events, for tests of the receiver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Producer:
    """The test's side: each method is one request."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._unread = 0
        address = str(folder / "producer")
        with Listener(address, "AF_UNIX") as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.producer", address],
                env={**os.environ, **(environment or {})},
                cwd=ROOT,
            )
            self._connection = listener.accept()

    def _request(self, *request: Any) -> Any:
        self._connection.send(request)
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def share(self, device: str, *, how: str = "tensor", shape: tuple[int, ...] = (4,)) -> bytes:
        """Return a message as a queue carries it, with the tensor 0, 1, 2, ...; the producer keeps the last tensor."""
        return self._request("share", device, how, shape)

    def again(self) -> bytes:
        """Return another message with the last tensor."""
        return self._request("again")

    def values(self) -> list[Any]:
        """Return the current values of the producer's last tensor."""
        return self._request("values")

    def fill(self, value: float) -> None:
        """Write into the producer's last tensor."""
        self._request("fill", value)

    def drop(self) -> int:
        """Drop the last tensor; return the bytes that the producer still keeps for messages of this test."""
        return self._request("drop") - self._unread

    def reset_count(self) -> None:
        """Leave the memory of earlier tests out of `drop`: messages that were never read keep theirs."""
        self._unread = self._request("drop")

    def do(self, code: str) -> None:
        """Run code in the producer."""
        self._request("do", code)

    def close(self) -> None:
        self._connection.send(None)
        self._connection.close()
        assert self._process.wait() == 0


def _make(device: str, how: str, shape: tuple[int, ...]) -> Any:
    import torch

    if how == "event":
        with torch.cuda.device(device):
            event = torch.cuda.Event(interprocess=True)
            event.record()
            return event
    numbers = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    if how == "integers":
        return numbers.to(torch.int64).to(device)
    tensor = numbers.to(device)
    if how == "parameter":
        return torch.nn.Parameter(tensor)
    if how == "grad":
        return tensor.requires_grad_()
    if how == "views":
        return [tensor, tensor[1:], tensor.view(2, -1).t(), tensor[::2]]
    return tensor


def _serve(connection: Connection) -> None:
    import torch
    import torch.multiprocessing

    kept: Any = None
    while (request := connection.recv()) is not None:
        verb, *rest = request
        answer: Any = None
        try:
            if verb == "share":
                kept = _make(*rest)
                answer = bytes(ForkingPickler.dumps(kept))
            elif verb == "again":
                answer = bytes(ForkingPickler.dumps(kept))
            elif verb == "values":
                answer = kept.detach().cpu().tolist()
            elif verb == "fill":
                kept.copy_(torch.full(kept.shape, rest[0]))
                torch.cuda.synchronize(kept.device)
            elif verb == "drop":
                kept = None
                torch.cuda.ipc_collect()
                answer = sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
            elif verb == "do":
                exec(rest[0], {})
        except Exception as error:  # noqa: BLE001 - the test raises it
            answer = error
        connection.send(answer)


if __name__ == "__main__":
    with Client(sys.argv[1], "AF_UNIX") as to_test:
        _serve(to_test)
