"""Time an arena against other ways to bring a tensor from one process to its readers.

An exchange is timed in wall time, from before the tensor is put or serialized until the last reader has replied and the
sender has removed what it made. A reader drops the tensor before it replies. The end states: *view*, every byte read
once in place; *warm*, copied into a tensor that the reader keeps; *new*, a new tensor. Reading (a sum) costs each way
the same, and so brings each ratio nearer to 1; *opened* is the hand-over without it, and has no budget, because data
that nobody reads is of no use. Readers are processes without CUDA, each with one thread of torch, as launchers start
ranks; the sender has torch's default. The replies are checked.
"""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import socket
import statistics
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.carriers import CARRIERS, Channel, End
from benchmarks.measure import ROUNDS, Row, Run, interleave, row
from devguard.transport import Arena

SIZES = (1, 19, 64, 256)  # MiB
READERS = (1, 4)
LEAST = 19  # MiB from which there are budgets
SEGMENT_BUDGET = {1: 1 / 3, 4: 1 / 2}  # by readers
PICKLE_BUDGET = 1 / 8
SMALL_BUDGET = 15.0
HAND_OVER = ("an arena", "a fresh segment", "a reused segment")  # those that can leave the bytes where they are
ENDS = {End.OPENED: "opened", End.VIEW: "view", End.WARM: "warm", End.NEW: "new"}

_HEAD = struct.Struct("=BBQ")  # the way, the end state, elements
_REPLY = struct.Struct("=ddQ")  # the first value, the sum of all, page faults


def _count_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _read(end: socket.socket) -> None:
    """Be a reader, until the other end closes the connection."""
    torch.set_num_threads(1)
    channel = Channel(end)
    readers = [reader(channel) for _, reader in CARRIERS.values()]
    kept: dict[int, Any] = {}

    def keep(count: int) -> Any:
        if count not in kept:
            kept[count] = torch.ones(count)
        return kept[count]

    while True:
        try:
            message = channel.receive()
        except EOFError:
            return
        faults = _count_faults()
        way, state, count = _HEAD.unpack_from(message)
        with readers[way].open(message[_HEAD.size :], partial(keep, count), End(state)) as tensor:
            total = float(tensor.sum()) if state == End.VIEW else 0.0
            first = float(tensor[0])
            del tensor
        channel.send_bytes(_REPLY.pack(first, total, _count_faults() - faults))


class Exchange:
    """The readers, and the sender's half of each way."""

    def __init__(self, readers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._channels, self._ends, self._processes = [], [], []
        for _ in range(readers):
            ours, theirs = socket.socketpair()
            process = context.Process(target=_read, args=(theirs,))
            process.start()
            theirs.close()
            self._channels.append(Channel(ours))
            self._ends.append(ours)
            self._processes.append(process)
        self._senders = [sender() for sender, _ in CARRIERS.values()]
        self._count = 0
        self.faults: list[tuple[int, int]] = []  # of the sender, and the most of a reader

    def run(self, way: int, end: End, tensor: Any, times: int) -> None:
        """Bring a tensor to the readers."""
        sender, reply = self._senders[way], memoryview(bytearray(_REPLY.size))
        for _ in range(times):
            faults, most = _count_faults(), 0
            self._count += 1
            tensor[0] = self._count % 1000
            sender.send(_HEAD.pack(way, end, tensor.numel()), tensor, self._channels)
            for channel in self._channels:
                channel.receive_into(reply)
                first, total, some = _REPLY.unpack(reply)
                assert first == self._count % 1000, f"{list(CARRIERS)[way]}: {first}, not {self._count % 1000}"
                assert end is not End.VIEW or abs(total / tensor.numel() - 1) < 0.01, total
                most = max(most, some)
            sender.end()
            self.faults.append((_count_faults() - faults, most))

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join()
        for sender in self._senders:
            sender.close()


def large(sizes: Sequence[int] = SIZES, readers: Sequence[int] = READERS, seconds: float = 10.0) -> list[Row]:
    """Compare all ways, for each size, number of readers and end state."""
    rows, faults = [], []
    for count in readers:
        exchange = Exchange(count)
        try:
            for size in sizes:
                tensor = torch.ones(size << 18)
                for end, name in ENDS.items():
                    what = f"{size} MiB, {name}, {_count(count)}"
                    budgets = _budgets(count) if size >= LEAST and end in (End.VIEW, End.WARM) else {}
                    rows += _compare(exchange, end, tensor, what, budgets, seconds)
                if size >= LEAST:
                    faults += _fault_rows(exchange, tensor, f"{size} MiB, warm, {_count(count)}")
        finally:
            exchange.close()
    return rows + faults


def _count(readers: int) -> str:
    return f"{readers} reader{'s' * (readers > 1)}"


def _budgets(readers: int) -> dict[str, float]:
    return {"a fresh segment": SEGMENT_BUDGET[readers], "pickle in band": PICKLE_BUDGET}


def _compare(
    exchange: Exchange, end: End, tensor: Any, what: str, budgets: dict[str, float], seconds: float
) -> list[Row]:
    ways = [way for way, name in enumerate(CARRIERS) if end is not End.OPENED or name in HAND_OVER]
    runs: list[Run] = [partial(exchange.run, way, end, tensor) for way in ways]
    times = interleave(runs, seconds)
    names = [list(CARRIERS)[way] for way in ways]
    return [
        row(
            f"{what} / {names[number]}",
            [one[0] / one[number] for one in times],
            budgets.get(names[number]),
            base_us=statistics.median(one[number] for one in times) / 1000,
        )
        for number in range(1, len(ways))
    ]


def _fault_rows(exchange: Exchange, tensor: Any, what: str) -> list[Row]:
    """Count the page faults of an arena's exchanges after the first ones."""
    exchange.run(0, End.WARM, tensor, 3)
    exchange.faults.clear()
    exchange.run(0, End.WARM, tensor, ROUNDS)
    sender, reader = zip(*exchange.faults, strict=True)
    return [
        row(f"{what}: page faults of the sender", sender, 0.0, "faults"),
        row(f"{what}: page faults of a reader", reader, 0.0, "faults"),
    ]


def _echo(end: socket.socket) -> None:
    """Reply to messages: to a handle after its tensor has been read."""
    torch.set_num_threads(1)
    while message := end.recv(1 << 16):
        if message[:1] == b"\x80":  # a pickle
            pickle.loads(message).get()
        end.send(b"done")


def small() -> list[Row]:
    """Compare put, get and reply at 1 KiB with a message of 1 KiB and its reply, over a SEQPACKET socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = multiprocessing.get_context("spawn").Process(target=_echo, args=(theirs,))
    process.start()
    theirs.close()
    data, tensor = bytes(1024), torch.zeros(256)

    def talk(times: int) -> None:
        for _ in range(times):
            ours.send(data)
            ours.recv(64)

    with Arena("cpu", budget="64MiB") as arena:

        def put(times: int) -> None:
            for _ in range(times):
                ours.send(pickle.dumps(arena.put(tensor)))
                ours.recv(64)

        put(100)
        times = interleave([talk, put])
        ours.close()
        process.join()
    ratios = [one[1] / one[0] for one in times]
    base = statistics.median(one[0] for one in times) / 1000
    return [row("1 KiB: put, get, reply / a raw round trip", ratios, SMALL_BUDGET, base_us=base)]


def transport() -> list[Row]:
    return large() + small()
