"""What happens in a round: requests, faults, and the answers to them."""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import select
import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.chaos.cast import Crew, Delivery, Fault, Lease, Seat
from tests.chaos.processes import Process, Worker
from tests.chaos.workers import Reader


class Events:
    """What happens in a round, and what the processes answer.

    Parameters
    ----------
    crew : Crew
        The processes.
    seed, number : int
        They decide what is planned.
    bound : float
        The most seconds for an answer.
    """

    def __init__(self, crew: Crew, seed: int, number: int, bound: float) -> None:
        self.crew, self.number, self.bound = crew, number, bound
        self.chance = random.Random(f"{seed} {number}")
        self.counts: Counter[str] = Counter()
        self.events: list[str] = []
        self.latencies: list[float] = []  # seconds from the kernel's notice of a death to the end of its parts
        self.begin = time.monotonic()
        self.plan: list[tuple[float, int, Callable[[], None]]] = []
        self.leases: dict[int, Lease] = {}
        self.deliveries: list[Delivery] = []
        self.routed: set[int] = set()
        self.children: list[int] = []
        self.joined: set[int] = set()  # readers that the arena has welcomed
        self.closing = self.closed = self.sender_died = False
        self.notices: dict[int, float] = {}
        self.stops: list[tuple[float, float]] = []  # of the sender
        self.answers: dict[str, Any] = {}
        self.address = ""
        self.selector = selectors.DefaultSelector()
        self.processes: list[Process] = []
        self.forks = 0

    def note(self, text: str) -> None:
        """Add a line to the list of events."""
        self.events.append(f"{1000 * (time.monotonic() - self.begin):7.1f} ms  {text}")

    def count(self, what: str, happened: bool = True) -> None:
        self.counts[what] += happened

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.plan, (when, len(self.plan) + 1000 * len(self.events), event))

    # What happens.

    def enlist(self, role: type[Worker]) -> Process:
        process = self.crew.take(role)
        self.processes.append(process)
        self.selector.register(process.end, selectors.EVENT_READ, process)
        return process

    def seat(self, seat: Seat) -> None:
        seat.process = self.enlist(Reader)
        self.note(f"reader {seat.process.pid} takes seat {self.seats.index(seat)}{' and joins' * seat.joins}")
        if seat.joins:
            seat.process.send("join", self.address, seat.name)

    def put(self, lease: Lease, limit: float, send: bool) -> None:
        if self.sender.is_alive and not self.closed:
            lease.answer = "asked"
            self.note(f"put {lease.key & 0xFFFF}: {lease.nbytes} bytes, {lease.how}, to {lease.to}, sent: {send}")
            self.sender.send("put", lease.key, lease.nbytes, lease.to, lease.how, limit, send)

    def cancel(self, lease: Lease) -> None:
        if lease.answer == "handle" and self.sender.is_alive and not self.closed:
            self.note(f"cancel {lease.key & 0xFFFF}")
            self.count("cancel", not lease.is_over)
            lease.cancelled = True
            self.sender.send("cancel", lease.key)

    def deliver(self, lease: Lease, blob: bytes) -> None:
        """Send the handle of a lease to the router, once for each reader."""
        for one in lease.deliveries:
            one.blob = blob
            if one.lost:
                self.count("lost handle")
                one.outcome = "lost"
            elif not self.router.is_alive:
                one.outcome = "lost"
            else:
                self.deliveries.append(one)
                self.router.send("route", len(self.deliveries) - 1, blob)

    def hand_over(self, number: int, blob: bytes) -> None:
        one = self.deliveries[number]
        self.routed.add(number)
        one.process = one.seat.process
        if one.process is None or not one.process.is_alive:
            one.outcome = "lost"
            return
        self.note(f"reader {one.process.pid} is to {one.how} {one.lease.key & 0xFFFF} for {1000 * one.hold:.0f} ms")
        self.counts[one.how] += 1
        one.process.send("read", number, one.lease.key, one.lease.nbytes, blob, one.how, one.hold)

    def kill_reader(self, seat: Seat, succeeded: bool) -> None:
        if seat.process is None or not seat.process.is_alive:
            return
        self.count("kill reader")
        self.end_process(seat.process)
        if succeeded and not self.closed and self.sender.is_alive:
            self.count("successor of a dead reader")
            before, seat.blurred = seat.process, True
            self.seat(seat)
            self.repeat(seat, before)

    def repeat(self, seat: Seat, before: Process) -> None:
        """Send handles that a reader has not finished to its successor."""
        for one in list(self.deliveries):
            if one.process is before and one.outcome == "dead" and self.router.is_alive and self.chance.random() < 0.5:
                self.count("handle sent again")
                one.lease.repeated = True
                again = Delivery(one.lease, seat, one.how, one.hold, False, blob=one.blob)
                self.deliveries.append(again)
                self.router.send("route", len(self.deliveries) - 1, one.blob)

    def succeed(self, seat: Seat) -> None:
        """Let another process join under the name of one that lives."""
        if seat.name is None or seat.process is None or not seat.process.is_alive or self.closed:
            return
        self.count("successor with the same name")
        for one in self.deliveries:
            if one.process is seat.process:
                one.lease.repeated = True
        seat.blurred = True
        self.seat(seat)

    def leave(self, seat: Seat) -> None:
        if seat.process is not None and seat.process.is_alive:
            self.count("leave")
            self.note(f"reader {seat.process.pid} leaves")
            seat.blurred = True
            seat.process.send("leave", self.address)

    def kill(self, role: str) -> None:
        process = self.sender if role == "sender" else self.router
        if process.is_alive:
            self.count(f"kill {role}")
            self.end_process(process)

    def end_process(self, process: Process) -> None:
        """Kill a process; note when the kernel says so, and hear its last words."""
        self.note(f"SIGKILL {process.role} {process.pid}")
        os.kill(process.pid, signal.SIGKILL)
        if not select.select([process.pidfd], [], [], self.bound)[0]:
            raise Fault(f"the kernel does not end process {process.pid}")
        self.notices[process.pid] = time.monotonic()
        self.sender_died |= process is self.sender
        with contextlib.suppress(EOFError):
            while (message := process.receive()) is not None:
                self.handle(process, message)
        self.bury(process)

    def bury(self, process: Process) -> None:
        self.selector.unregister(process.end)
        process.forget()
        for number, one in enumerate(self.deliveries):
            if one.outcome == "" and (one.process is process or (process is self.router and number not in self.routed)):
                one.outcome = "dead" if one.process is process else "lost"
                one.joined = process.pid in self.joined and not one.seat.blurred

    def stop(self, whom: str | Seat, seconds: float) -> None:
        process = {"sender": self.sender, "router": self.router}[whom] if isinstance(whom, str) else whom.process
        if process is None or not process.is_alive or process.is_stopped:
            return
        self.count(f"stop {process.role}")
        self.note(f"SIGSTOP {process.role} {process.pid}")
        process.is_stopped = True
        os.kill(process.pid, signal.SIGSTOP)
        if process is self.sender:
            self.stops.append((time.monotonic(), float("inf")))
        self.at(time.monotonic() - self.begin + seconds, partial(self.go_on, process))

    def go_on(self, process: Process) -> None:
        if process.is_alive and process.is_stopped:
            self.note(f"SIGCONT {process.role} {process.pid}")
            process.is_stopped = False
            os.kill(process.pid, signal.SIGCONT)
            if process is self.sender:
                self.stops[-1] = self.stops[-1][0], time.monotonic()

    def fork_sender(self, kind: str) -> None:
        if self.sender.is_alive and not self.closed:
            self.count(f"fork sender ({kind})")
            self.note(f"the sender forks: {kind}")
            self.forks += kind == "child"
            self.sender.send("fork", kind)

    def close(self) -> None:
        if self.sender.is_alive and not self.closed:
            self.count("close while in use")
            self.note("close")
            self.closed = True
            self.sender.send("close")

    # What is answered.

    def handle(self, process: Process, message: Any) -> None:
        kind, *rest = message
        if kind == "put":
            key, answer, number, blob, text = rest
            self.hear_put(self.leases[key], answer, number, blob, text)
        elif kind == "routed":
            self.hand_over(*rest)
        elif kind == "inside":
            self.deliveries[rest[0]].inside = True
        elif kind == "read":
            self.hear_read(*rest)
        elif kind == "child":
            self.children.append(rest[0])
        elif kind == "forked":
            self.forks -= 1
            if rest[0]:
                raise Fault(f"a forked child of the sender ended with {rest[0]}")
        elif kind == "fault":
            raise Fault(f"{process.role} {process.pid}: {rest[0]}")
        elif kind == "joined":
            if rest[0] and not (self.closed or self.sender_died):
                raise Fault(f"reader {process.pid} cannot join: {rest[0]}")
            self.joined.add(process.pid)
        else:
            self.answers[kind] = rest

    def hear_put(self, lease: Lease, answer: str, number: int, blob: bytes, text: str) -> None:
        self.note(f"put {lease.key & 0xFFFF} gave {answer}, lease {number} {text}")
        lease.answer, lease.number = answer, number
        self.counts[f"put: {answer}"] += 1
        expected = {"handle": True, "discarded": True, "BudgetFull": lease.how in ("timeout", "now"),
                    "CancelledError": lease.how == "cancelled", "DevGuardError": self.closed}  # fmt: skip
        if answer == "BudgetFull" and lease.nbytes > self.budget - 8192 and lease.how != "oversize":
            return
        if not expected.get(answer):
            raise Fault(f"put {lease.key & 0xFFFF} ({lease.how}) gave {answer}: {text}")
        if answer == "handle":
            self.deliver(lease, blob)

    def hear_read(self, number: int, outcome: str, text: str) -> None:
        one = self.deliveries[number]
        self.note(f"reader {one.process and one.process.pid}: {one.how} {one.lease.key & 0xFFFF} gave {outcome} {text}")
        one.outcome = outcome
        self.counts[f"read: {outcome}"] += 1
        if outcome == "wrong":
            raise Fault(f"wrong bytes: {text}")
        over = self.closed or self.sender_died or one.seat.blurred
        excused = {
            "ok": True,
            "HandleReleased": over or one.lease.cancelled or one.lease.repeated,
            "PeerGone": over,
        }
        if not excused[outcome]:
            raise Fault(f"{one.how} of lease {one.lease.key & 0xFFFF} gave {outcome}: {text}")

    # The loop.

    def step(self, seconds: float) -> None:
        """Hear what has arrived, and wait `seconds` at most."""
        for process in self.processes:
            if process.is_alive and process.outbox:
                process.flush()
        for key, _ in self.selector.select(max(0.0, seconds)):
            process = key.data
            try:
                while process.is_alive and (message := process.receive()) is not None:
                    self.handle(process, message)
            except EOFError:
                _, status = os.waitpid(process.pid, os.WNOHANG | os.WNOWAIT if hasattr(os, "WNOWAIT") else os.WNOHANG)
                raise Fault(f"{process.role} {process.pid} has ended by itself, status {status}") from None

    def until(self, holds: Callable[[], bool], what: Callable[[], str]) -> None:
        """Go on until something holds; a fault if it does not, within the bound."""
        deadline = time.monotonic() + self.bound
        while not holds():
            if time.monotonic() > deadline:
                raise Fault(f"stuck for {self.bound:g} s: {what()}")
            self.step(0.02)

    def await_answer(self, kind: str, process: Process, *question: Any) -> Any:
        """Ask a process and wait for its answer."""
        self.answers.pop(kind, None)
        if question:
            process.send(*question)
        self.until(lambda: kind in self.answers, lambda: f"{process.role} {process.pid} does not answer: {kind}")
        return self.answers[kind]
