"""One round: what is planned, and what must hold at its end."""

from __future__ import annotations

import contextlib
import heapq
import os
import signal
import time
from collections.abc import Callable
from functools import partial

from tests.chaos.cast import Delivery, Fault, Lease, Seat
from tests.chaos.events import Events
from tests.chaos.processes import Process
from tests.chaos.workers import Router, Sender

HOWS = {"get": 8, "view": 6, "skip": 2, "twice": 1, "scribble": 1, "raise": 1, "fork": 1, "raw": 1}
PUTS = {"wait": 10, "timeout": 3, "now": 2, "async": 2, "cancelled": 2, "oversize": 1}
BUDGETS = (1 << 17, 1 << 18, 1 << 20, 1 << 22)


class Round(Events):
    """A sender, a router and readers, with faults at random moments; the seed and the number decide them."""

    # What is planned.

    def prepare(self) -> None:
        chance = self.chance
        self.budget = chance.choice(BUDGETS)
        self.length = chance.uniform(0.05, 0.16)
        named = chance.random() < 0.4
        self.seats = [Seat(f"tp{number}" if named else None) for number in range(chance.randint(1, 4))]
        self.sender, self.router = self.enlist(Sender), self.enlist(Router)
        self.sender.send("open", self.budget)
        self.await_answer("opened", self.sender)
        self.address = self.answers.pop("opened")[0]
        self.begin = time.monotonic()
        self.note(f"budget {self.budget}, {len(self.seats)} {'named' if named else 'counted'} readers, "
                  f"{1000 * self.length:.0f} ms")  # fmt: skip
        for seat in self.seats:
            seat.joins = named or chance.random() < 0.5
            late = chance.random() < 0.15
            self.count("late joiner", late)
            self.at(chance.uniform(0, self.length) if late else 0, partial(self.seat, seat))
        for number in range(chance.randint(4, 14)):
            self.plan_put(self.number << 16 | number + 2)
        for fault, likely in self.faults().items():
            if chance.random() < likely:
                self.at(chance.uniform(0.2, 1) * self.length, fault)

    def plan_put(self, key: int) -> None:
        chance = self.chance
        (how,) = chance.choices(list(PUTS), list(PUTS.values()))
        nbytes = chance.choice([16, 2000, 16384, self.budget // 3, self.budget // 2, self.budget - 8192])
        if 16384 < nbytes < 1 << 16:
            nbytes = 1 << 16  # no handle of that many bytes, which would not pass the sockets of the chaos
        if how == "oversize" or chance.random() < 0.03:
            nbytes = self.budget + (1 << 16)
        seats = chance.sample(self.seats, chance.randint(1, len(self.seats)))
        to = len(seats) if self.seats[0].name is None or chance.random() < 0.2 else [seat.name for seat in seats]
        lease = self.leases[key] = Lease(key, nbytes, how, to)
        hows = chance.choices(list(HOWS), list(HOWS.values()), k=len(seats))
        for seat, one in zip(seats, hows, strict=True):
            hold = chance.choice([0, 0.005, 0.02, 0.08])
            lease.deliveries.append(Delivery(lease, seat, one, hold, chance.random() < 0.06))
        send = chance.random() >= 0.04
        when = chance.uniform(0, 0.7) * self.length
        self.at(when, partial(self.put, lease, chance.uniform(0, 0.03), send))
        if chance.random() < 0.2:
            self.at(when + chance.uniform(0, 0.4) * self.length, partial(self.cancel, lease))

    def faults(self) -> dict[Callable[[], None], float]:
        seat = self.chance.choice(self.seats)
        return {
            partial(self.kill, "sender"): 0.08,
            partial(self.kill_reader, self.chance.choice(self.seats), self.chance.random() < 0.6): 0.3,
            partial(self.kill_reader, seat, self.chance.random() < 0.6): 0.1,
            partial(self.kill, "router"): 0.1,
            partial(self.stop, "sender", self.chance.uniform(0.005, 0.08)): 0.1,
            partial(self.stop, self.chance.choice(self.seats), self.chance.uniform(0.005, 0.08)): 0.25,
            partial(self.stop, "router", self.chance.uniform(0.005, 0.08)): 0.1,
            partial(self.fork_sender, "child"): 0.12,
            partial(self.fork_sender, "raw"): 0.06,
            partial(self.succeed, self.chance.choice(self.seats)): 0.15,
            partial(self.leave, self.chance.choice(self.seats)): 0.06,
            self.close: 0.12,
        }

    def run(self) -> None:
        """Run the round.

        Raises
        ------
        Fault
            Something that may not happen has happened.
        """
        self.prepare()
        while self.plan:
            due = self.plan[0][0] - (time.monotonic() - self.begin)
            if due > 0:
                self.step(due)
            else:
                heapq.heappop(self.plan)[2]()
        self.end()

    # The end.

    def end(self) -> None:
        self.note("the end: all go on")
        for process in self.processes:
            self.go_on(process)
        if self.sender.is_alive:
            self.check_budget()
            self.measure()
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if self.sender.is_alive and not self.closed:
            self.closed = True
            self.await_answer("closed", self.sender, "close")
        self.until(self.all_read, lambda: f"reads without an answer: {self.unread()}")
        self.sender.send("end_round")
        for process in self.processes:
            if process.is_alive:
                self.check_clean(process)
        for process in self.processes:
            if process.is_alive:
                self.selector.unregister(process.end)
                self.crew.idle[process.role].append(process)
        self.selector.close()

    def unread(self) -> list[str]:
        return [
            f"{one.how} of {one.lease.key & 0xFFFF} by {one.process and one.process.pid}"
            for one in self.deliveries
            if not one.outcome
        ]

    def all_read(self) -> bool:
        return not self.unread()

    def check_budget(self) -> None:
        """Check that leases end without a cancellation where they must, and all others by one."""
        pending = [lease for lease in self.leases.values() if lease.answer]

        def leases() -> dict[int, str]:
            found: dict[int, str] = self.await_answer("usage", self.sender, "usage")[2]
            return found

        def late() -> list[str]:
            held = leases()
            return [f"put {one.key & 0xFFFF}, lease {one.number}: {held[one.number]}" for one in pending
                    if one.answer in ("handle", "discarded") and one.is_over and one.number in held]  # fmt: skip

        def answered() -> bool:
            for lease in pending:
                if (
                    lease.answer == "handle"
                    and not lease.cancelled
                    and not self.closed
                    and self.has_to_be_cancelled(lease)
                ):
                    self.cancel(lease)
            return self.all_read() and self.forks == 0 and not any(one.answer == "asked" for one in pending)

        def unanswered() -> str:
            puts = [one.key & 0xFFFF for one in pending if one.answer == "asked"]
            return f"puts {puts}, reads {self.unread()}, {self.forks} forks without an answer; leases: {leases()}"

        self.until(answered, unanswered)
        if self.closed:
            self.until(lambda: "closed" in self.answers, lambda: "close does not return")
            return
        self.until(lambda: not late(), lambda: f"leases that must have ended: {late()}")
        for lease in pending:
            if not lease.cancelled:
                self.cancel(lease)
        self.until(lambda: not leases(), lambda: f"leases after all were cancelled: {leases()}")
        in_use, waiting, _ = self.await_answer("usage", self.sender, "usage")
        if in_use or waiting:
            raise Fault(f"{in_use} bytes in use and {waiting} puts waiting, without a lease")
        (text,) = self.await_answer("filled", self.sender, "fill", self.bound)
        if text:
            raise Fault(f"the budget is not whole: {text}")
        self.until(lambda: not leases(), lambda: f"leases after the last one: {leases()}")

    def has_to_be_cancelled(self, lease: Lease) -> bool:
        """Return whether all answers of its readers are there, and some part of it will never be over."""
        return all(one.outcome for one in lease.deliveries) and not lease.is_over

    def measure(self) -> None:
        """Compare the arena's ends of dead readers with the kernel's notices of their deaths."""
        (dropped,) = self.await_answer("deaths", self.sender, "deaths")
        for pid, end in dropped.items():
            notice = self.notices.get(pid)
            if notice is not None and not any(begin <= end and notice <= over for begin, over in self.stops):
                self.latencies.append(max(0.0, end - notice))

    def check_clean(self, process: Process) -> None:
        """Check that a process holds what it held at its start."""
        self.until(
            lambda: self.await_answer("snapshot", process, "snapshot") == [[]],
            lambda: f"{process.role} {process.pid} holds {self.answers['snapshot'][0]}",
        )
