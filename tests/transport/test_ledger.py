"""The books of an arena, against a model in which readers, deaths and cancellations come in any order."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from devguard.transport import ledger as module
from devguard.transport.leases import PAGE, Lease, Ticket, round_up
from devguard.transport.ledger import IDLE, Ledger

BUDGET = 16 * PAGE
NAMES = ["tp0", "tp1"]


def request(books: Ledger, nbytes: int, readers: Any = 1, now: float = 0.0) -> Ticket:
    ticket = Ticket(round_up(nbytes), readers, "a.py:1", now)
    books.request(ticket, now)
    return ticket


class Peer:
    """A reader as it really is: what it reads, and the messages that are under way in both directions."""

    def __init__(self, number: int, name: str | None) -> None:
        self.number, self.name = number, name
        self.inside: set[int] = set()
        self.finished: set[int] = set()
        self.sent: deque[tuple[str, int, bool]] = deque()
        self.asked: deque[int] = deque()


class Books(RuleBasedStateMachine):
    """Readers open, finish, die and answer late; no range may be granted anew while one of them reads it."""

    ledger_class: type[Ledger] = Ledger

    def __init__(self) -> None:
        super().__init__()
        self.ledger = self.ledger_class(BUDGET, segment=4 * PAGE)
        self.now = 0.0
        self.peers: dict[int, Peer] = {}
        self.ghosts: list[Peer] = []  # taken for dead, but still reading
        self.leases: dict[int, Lease] = {}  # all that were ever granted
        self.open: set[int] = set()  # those whose word in the index says so
        self.places: dict[int, tuple[Any, int, int]] = {}
        self.openers: dict[int, int] = {}
        self.tickets: list[Any] = []
        self.next_peer = 1

    def carry_out(self) -> None:
        effects = self.ledger.take_effects()
        for lease in effects.ended:
            self.open.discard(lease.number)
        for ticket in effects.granted:
            lease = ticket.lease
            assert lease is not None
            self.leases[lease.number] = lease
            self.open.add(lease.number)
            if lease.segment is not None:
                self.places[lease.number] = lease.segment, lease.offset, lease.nbytes
                self.check_place(lease)

    def check_place(self, lease: Lease) -> None:
        assert lease.segment is not None
        for peer in [*self.peers.values(), *self.ghosts]:
            for number in peer.inside & self.places.keys():
                segment, offset, nbytes = self.places[number]
                disjoint = offset + nbytes <= lease.offset or lease.offset + lease.nbytes <= offset
                assert segment is not lease.segment or disjoint, f"{peer.number} still reads lease {number}"

    @rule(pages=st.integers(0, 18), named=st.booleans(), data=st.data())
    def put(self, pages: int, named: bool, data: Any) -> None:
        readers = tuple(data.draw(st.sampled_from([NAMES, NAMES[:1]]))) if named else data.draw(st.integers(1, 3))
        self.tickets.append(request(self.ledger, pages * PAGE - (pages > 0), readers, self.now))
        self.carry_out()

    @rule(readers=st.integers(1, 3), published=st.booleans())
    def put_ahead(self, readers: int, published: bool) -> None:
        """A lease without bytes, which travels before the books have it."""
        made = self.ledger.make_ahead(1)
        assert made
        if published:
            self.ledger.publish(made[0], readers, "a.py:1", self.now)
            self.leases[made[0].number] = made[0]
            self.open.add(made[0].number)
        else:
            self.ledger.give_up(made[0], self.now)
        self.carry_out()

    @precondition(lambda self: self.ledger.waiting)
    @rule(data=st.data())
    def give_up_a_put(self, data: Any) -> None:
        self.ledger.withdraw(data.draw(st.sampled_from(list(self.ledger.waiting))), self.now)
        self.carry_out()

    @rule(name=st.sampled_from([None, *NAMES]))
    def join(self, name: str | None) -> None:
        peer = self.peers[self.next_peer] = Peer(self.next_peer, name)
        self.next_peer += 1
        former = self.ledger.join(peer.number, name)
        if former is not None:
            self.leave(self.peers[former], dead=False)
        self.carry_out()

    def may_open(self, peer: Peer, number: int) -> bool:
        lease = self.leases[number]
        if number not in self.open or lease.cancelled or number in peer.inside | peer.finished:
            return False
        if isinstance(lease.readers, int):  # no more readers than the put counts
            return self.openers.get(number, 0) < lease.readers
        return peer.name in lease.readers

    @precondition(lambda self: self.peers and self.open)
    @rule(data=st.data())
    def open_lease(self, data: Any) -> None:
        peer = data.draw(st.sampled_from(list(self.peers.values())))
        number = data.draw(st.sampled_from(sorted(self.open)))
        if self.may_open(peer, number):
            peer.inside.add(number)
            self.openers[number] = self.openers.get(number, 0) + 1
            peer.sent.append(("open", number, True))

    @precondition(lambda self: any(peer.inside for peer in self.peers.values()))
    @rule(data=st.data(), read=st.booleans())
    def finish(self, data: Any, read: bool) -> None:
        peer = data.draw(st.sampled_from([peer for peer in self.peers.values() if peer.inside]))
        number = data.draw(st.sampled_from(sorted(peer.inside)))
        peer.inside.discard(number)
        if read:
            peer.finished.add(number)
        else:
            self.openers[number] -= 1
        peer.sent.append(("acknowledge" if read else "put back", number, True))

    @precondition(lambda self: any(peer.sent for peer in self.peers.values()))
    @rule(data=st.data())
    def deliver(self, data: Any) -> None:
        self.hear(data.draw(st.sampled_from([peer for peer in self.peers.values() if peer.sent])))
        self.carry_out()

    def hear(self, peer: Peer) -> None:
        kind, number, inside = peer.sent.popleft()
        if kind == "open":
            self.ledger.open(peer.number, number)
        elif kind == "acknowledge":
            self.ledger.acknowledge(peer.number, number, self.now)
        elif kind == "put back":
            self.ledger.put_back(peer.number, number, self.now)
        else:
            self.ledger.confirm(peer.number, number, inside, self.now)

    @precondition(lambda self: self.ledger.leases)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.ledger.leases)))
        self.open.discard(number)
        for reader in self.ledger.cancel(number, self.now):
            self.peers[reader].asked.append(number)
        self.carry_out()

    @precondition(lambda self: any(peer.asked for peer in self.peers.values()))
    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        peer = data.draw(st.sampled_from([peer for peer in self.peers.values() if peer.asked]))
        number = peer.asked.popleft()
        peer.sent.append(("confirm", number, number in peer.inside))

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), dead=st.booleans())
    def die(self, data: Any, dead: bool) -> None:
        self.leave(data.draw(st.sampled_from(list(self.peers.values()))), dead)
        self.carry_out()

    def leave(self, peer: Peer, dead: bool) -> None:
        """The peer dies, or seems to: what it has sent arrives first."""
        while peer.sent:
            self.hear(peer)
        del self.peers[peer.number]
        if not dead:
            self.ghosts.append(peer)
        self.ledger.leave(peer.number, self.now)

    @rule(seconds=st.sampled_from([0.1, IDLE / 2, IDLE]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = self.ledger.expire(self.now)
        assert due is None or 0 < due <= IDLE
        self.carry_out()

    @invariant()
    def the_books_are_right(self) -> None:
        books = self.ledger
        assert (
            books.in_use
            == sum(lease.nbytes for lease in books.leases.values())
            <= max([BUDGET, *(lease.nbytes for lease in books.leases.values())])
        )
        for segment in books.segments.values():
            ranges = [(offset, nbytes) for offset, nbytes in segment.free]
            inside = [lease for lease in books.leases.values() if lease.segment is segment]
            ranges += [(lease.offset, lease.nbytes) for lease in inside]
            position = 0
            for offset, nbytes in sorted(ranges):  # they tile the segment
                assert (offset, nbytes > 0) == (position, True)
                position += nbytes
            assert position == segment.nbytes
            assert segment.leases == len(inside)
            assert not segment.retired or inside
        oversize = [segment for segment in books.segments.values() if segment.nbytes > BUDGET]
        assert books.size <= BUDGET or (len(books.segments) == 1 and oversize)
        slots = [lease.slot for lease in books.leases.values()]
        assert len(set(slots)) == len(slots)
        for lease in books.leases.values():
            assert lease.is_open or lease.inside or lease.asked  # a lease that nobody holds has ended

    @invariant()
    def nobody_waits_for_room_that_is_there(self) -> None:
        if self.ledger.waiting and not self.ledger.leases:
            raise AssertionError("a put waits, and nothing is under a lease")

    def teardown(self) -> None:
        """All readers die, all leases are cancelled: nothing is left."""
        for peer in list(self.peers.values()):
            self.leave(peer, dead=True)
        self.ghosts.clear()
        for _ in range(1 + len(self.tickets)):  # puts that waited are granted meanwhile
            for number in list(self.ledger.leases):
                self.ledger.cancel(number, self.now)
            self.carry_out()
        assert not self.ledger.leases
        assert not self.ledger.waiting
        assert self.ledger.in_use == 0
        self.ledger.expire(self.now + IDLE + 1)
        assert not self.ledger.segments


QUICK = settings(max_examples=120, stateful_step_count=40, suppress_health_check=list(HealthCheck))
MANY = settings(QUICK, max_examples=3000, database=None, derandomize=True, phases=[Phase.generate])
Books.TestCase.settings = QUICK
TestBooks = Books.TestCase


class _ReusesEarly(Ledger):
    """A mutant: a lease ends with its first acknowledgement."""

    def acknowledge(self, reader: int, number: int, now: float) -> None:
        lease = self.leases.get(number)
        if lease is not None:
            lease.missing, lease.awaited = 0, set()
            lease.inside.clear()
        super().acknowledge(reader, number, now)


class _OutlivesItsReader(Ledger):
    """A mutant: the death of a reader ends none of its parts."""

    def leave(self, reader: int, now: float) -> None:
        self.names.pop(reader, None)


class _ReusesAfterASeemingDeath(Ledger):
    """A mutant: the segment of a reader that seems dead is used again."""

    def leave(self, reader: int, now: float) -> None:
        before = [segment for segment in self.segments.values() if not segment.retired]
        super().leave(reader, now)
        for segment in before:
            segment.retired = False
        self._admit(now)


class _ForgetsToAsk(Ledger):
    """A mutant: a cancelled lease ends at once."""

    def cancel(self, number: int, now: float) -> list[int]:
        lease = self.leases[number]
        lease.cancelled = True
        lease.inside.clear()
        self._settle(lease, now)
        return []


# Each mutant, and the rules without which its fault shows, so that few examples find it.
MUTANTS: dict[type[Ledger], set[str]] = {
    _ReusesEarly: {"put_ahead", "give_up_a_put", "wait", "die", "cancel", "answer"},
    _OutlivesItsReader: {"put_ahead"},
    _ReusesAfterASeemingDeath: {"put_ahead"},
    _ForgetsToAsk: {"put_ahead"},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_finds_a_fault(mutant: type[Ledger]) -> None:
    left_out: dict[str, Any] = dict.fromkeys(MUTANTS[mutant])
    mutated: Any = type("Mutated", (Books,), {"ledger_class": mutant, **left_out})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(mutated, settings=MANY)  # type: ignore[no-untyped-call]


def test_puts_are_served_in_their_order() -> None:
    books = Ledger(BUDGET, segment=4 * PAGE)
    first = request(books, BUDGET)
    large = request(books, 10 * PAGE)
    small = request(books, PAGE)
    assert first.lease is not None
    assert large.lease is small.lease is None
    books.withdraw(first, 0.0)
    assert large.lease is not None
    assert small.lease is not None
    assert large.lease.number < small.lease.number


def test_a_payload_above_the_budget_travels_alone() -> None:
    books = Ledger(BUDGET, segment=4 * PAGE)
    small = request(books, PAGE)
    large = request(books, 2 * BUDGET)
    assert large.lease is None
    books.withdraw(small, 0.0)
    assert large.lease is not None
    assert books.size == 2 * BUDGET
    assert request(books, PAGE).lease is None
    books.withdraw(large, 0.0)
    assert books.size <= BUDGET
    assert books.in_use == PAGE


def test_memory_is_used_again_and_goes_back_after_some_idle_seconds() -> None:
    books = Ledger(BUDGET, segment=4 * PAGE)
    for _ in range(3):
        books.withdraw(request(books, 4 * PAGE), 1.0)
    assert list(books.segments) == [1]
    assert books.expire(1.0 + IDLE / 2) == pytest.approx(IDLE / 2)
    assert books.expire(1.0 + IDLE) is None
    assert not books.segments


def test_a_lease_that_was_made_ahead_gives_its_slot_back_once() -> None:
    books = Ledger(BUDGET)
    (lease,) = books.make_ahead(1)
    books.publish(lease, 1, "a.py:1", 0.0)
    books.cancel(lease.number, 0.0)
    books.give_up(lease, 0.0)
    slots = [made.slot for made in books.make_ahead(3)]
    assert len(set(slots)) == 3


class TestTotals:
    def test_a_put_counts_when_it_has_its_lease(self) -> None:
        books = Ledger(BUDGET)
        books.request(Ticket(PAGE, 1, "a.py:1", 0.0, payload=100), 0.0)
        (ahead,) = books.make_ahead(1)
        assert (books.totals.puts, books.totals.put_bytes) == (1, 100)
        books.publish(ahead, 1, "a.py:1", 0.0, 11)
        assert (books.totals.puts, books.totals.put_bytes) == (2, 111)

    def test_the_wait_of_a_put_ends_with_its_lease_its_end_or_the_arenas(self) -> None:
        books = Ledger(BUDGET)
        first = request(books, BUDGET, now=1.0)
        request(books, PAGE, now=2.0)
        given_up, last = request(books, BUDGET, now=3.0), request(books, BUDGET, now=3.0)
        assert books.totals.wait_seconds == 0.0
        books.withdraw(first, 12.0)
        assert books.totals.wait_seconds == 10.0
        books.withdraw(given_up, 13.0)
        assert books.totals.wait_seconds == 20.0
        books.end_all(14.0)
        assert books.totals.wait_seconds == 31.0
        assert last.lease is None
        assert books.totals.puts == 2

    def test_the_last_acknowledgement_is_a_release_and_nothing_else_is(self) -> None:
        books = Ledger(BUDGET)
        for reader, name in enumerate(NAMES):
            books.join(reader, name)
        acknowledged, cancelled, dies, withdrawn = (request(books, PAGE, tuple(NAMES), now=1.0) for _ in range(4))
        for ticket in (acknowledged, cancelled, dies):
            assert ticket.lease is not None
            books.acknowledge(0, ticket.lease.number, 2.0)
        assert sum(books.totals.released) == 0
        assert acknowledged.lease is not None
        books.acknowledge(1, acknowledged.lease.number, 4.0)
        assert (sum(books.totals.released), books.totals.released_seconds) == (1, 3.0)
        assert cancelled.lease is not None
        books.open(1, cancelled.lease.number)
        for _ in range(2):
            books.cancel(cancelled.lease.number, 5.0)
        books.confirm(1, cancelled.lease.number, True, 5.0)
        books.acknowledge(1, cancelled.lease.number, 5.0)
        books.withdraw(withdrawn, 5.0)
        books.leave(1, 5.0)
        assert not books.leases
        assert (sum(books.totals.released), books.totals.cancelled, books.totals.deaths) == (1, 1, 1)

    def test_a_reader_that_nothing_waits_for_leaves_in_peace(self) -> None:
        books = Ledger(BUDGET)
        books.join(1, "tp0")
        request(books, PAGE, ("tp1",))
        books.leave(1, 1.0)
        assert books.totals.deaths == 0


def test_the_number_of_leases_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LEASES", 2)
    books = Ledger(BUDGET)
    tickets = [request(books, 0) for _ in range(3)]
    assert [ticket.lease is None for ticket in tickets] == [False, False, True]
    books.withdraw(tickets[0], 0.0)
    assert tickets[2].lease is not None
    assert tickets[2].lease.slot == tickets[0].lease.slot if tickets[0].lease else False
