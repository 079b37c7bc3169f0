"""Arenas and their readers, in one process and in several: leases, budget, cancellations, deaths and ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devguard.errors import BudgetFull, ConfigError, DevGuardError, HandleReleased, PeerGone
from devguard.transport import Arena, Handle, join, server
from tests.helpers.interrupts import interrupted, lines
from tests.helpers.transport_peers import Peer

MIB = 1 << 20
LARGE = bytes(range(256)) * 2048  # 512 KiB: it travels in a segment
SMALL = b"small"


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def sent(handle: Handle) -> Handle:
    """The handle as it arrives in another process."""
    arrived: Handle = pickle.loads(pickle.dumps(handle))
    return arrived


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def start() -> Peer:
        made.append(Peer())
        return made[-1]

    yield start
    for peer in made:
        peer.kill()


def is_empty(arena: Arena) -> bool:
    usage = arena.usage()
    return not usage.leases and not usage.in_use


@pytest.mark.parametrize("value", [SMALL, LARGE], ids=["inline", "segment"])
class TestLease:
    def test_each_counted_reader_gets_the_object_once(self, arena: Arena, value: bytes) -> None:
        handle = sent(arena.put(value, to=2))
        with join(arena.address, "one"), join(arena.address, "two"):
            assert handle.get(reader="one") == value
            assert [lease.waits_for for lease in arena.usage().leases] != []
            assert handle.get(reader="two") == value
            wait_until(lambda: is_empty(arena))
            with pytest.raises(HandleReleased):
                handle.get(reader="one")

    def test_a_second_read_is_refused_also_of_a_handle_that_was_sent_again(self, arena: Arena, value: bytes) -> None:
        handle = sent(arena.put(value, to=2))
        assert handle.get() == value
        for again in (handle, sent(handle), sent(sent(handle))):
            with pytest.raises(HandleReleased, match="has read lease"):
                again.get()
            with pytest.raises(HandleReleased, match="has read lease"):
                again.skip()
        handle2 = sent(arena.put(value))
        assert handle2.get() == value

    def test_a_named_lease_is_for_its_readers(self, arena: Arena, value: bytes) -> None:
        handle = sent(arena.put(value, to=["one", "two"]))
        assert arena.usage().leases[0].waits_for == ("one (not connected)", "two (not connected)")
        with join(arena.address, "three"), pytest.raises(HandleReleased, match="This reader is three"):
            handle.get()
        with join(arena.address, "one"), join(arena.address, "two"):
            handle.skip(reader="two")
            wait_until(lambda: arena.usage().leases[0].waits_for == (f"one (process {os.getpid()})",))
            assert handle.get(reader="one") == value
            wait_until(lambda: is_empty(arena))

    def test_a_cancelled_lease_is_refused_and_its_room_is_free(self, arena: Arena, value: bytes) -> None:
        handle = sent(arena.put(value, to=3))
        assert handle.get() == value
        handle.cancel()
        handle.cancel()
        wait_until(lambda: is_empty(arena))
        with join(arena.address, "late"), pytest.raises(HandleReleased, match="cancelled"):
            handle.get(reader="late")

    def test_a_view_holds_the_lease_until_its_end(self, arena: Arena, value: bytes) -> None:
        handle = sent(arena.put(value))
        with handle.view() as seen:
            assert seen == value
            handle.cancel()
            with pytest.raises(HandleReleased):
                handle.get()
            wait_until(lambda: len(arena.usage().leases) == (value is LARGE))  # a handle's own bytes need no room
        wait_until(lambda: is_empty(arena))

    def test_a_handle_that_was_never_sent_ends_with_its_object(self, arena: Arena, value: bytes) -> None:
        handle = arena.put(value, to=4)
        assert len(arena.usage().leases) == 1
        del handle
        gc.collect()
        wait_until(lambda: is_empty(arena))

    def test_a_read_that_fails_may_be_repeated(
        self, arena: Arena, value: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handle = sent(arena.put(value))
        with monkeypatch.context() as patch:
            patch.setattr("devguard.transport.unpack.unpack", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                handle.get()
            with pytest.raises(ZeroDivisionError), handle.view():
                pass
        assert handle.get() == value

    def test_a_process_that_is_killed_ends_its_part(
        self, arena: Arena, value: bytes, peers: Callable[[], Peer]
    ) -> None:
        reader = peers()
        reader.join(arena.address, "one")
        handle = arena.put(value, to=["one"])
        assert reader.hold(sent(handle)) == value
        assert len(arena.usage().leases) == 1
        reader.kill()
        wait_until(lambda: is_empty(arena))

    def test_the_arena_ends_with_its_process(self, peers: Callable[[], Peer], value: bytes) -> None:
        sender, reader = peers(), peers()
        address = sender.make_arena(4 * MIB)
        first, second = sender.put(value, 1), sender.put(value, 1)
        reader.join(address, None)
        assert reader.get(first) == value
        sender.kill()
        wait_until(lambda: not reader.is_connected(address))
        with pytest.raises(PeerGone):
            reader.get(second)


class TestBudget:
    def test_a_put_waits_for_room_and_puts_are_served_in_their_order(self, arena: Arena) -> None:
        first = arena.put(bytes(3 * MIB))
        order: list[str] = []

        def put(name: str, nbytes: int) -> None:
            handle = arena.put(bytes(nbytes))
            order.append(name)
            assert len(handle.get()) == nbytes

        threads = []
        for name, nbytes in (("large", 3 * MIB), ("small", 100_000)):
            threads.append(threading.Thread(target=put, args=(name, nbytes)))
            threads[-1].start()
            wait_until(lambda: arena.usage().waiting == len(threads))
        assert order == []
        assert len(first.get()) == 3 * MIB
        for thread in threads:
            thread.join(20)
        assert sorted(order) == ["large", "small"]
        wait_until(lambda: is_empty(arena))
        assert arena.usage().peak <= 4 * MIB
        assert arena.usage().waits == 2

    def test_a_stream_larger_than_the_budget_flows_through(self, arena: Arena, peers: Callable[[], Peer]) -> None:
        reader = peers()
        reader.join(arena.address, None)
        for number in range(40):
            reader.post("get_ends", arena.put(bytes([number]) * MIB))
        assert [reader.answer() for _ in range(40)] == [(MIB, number, number) for number in range(40)]
        wait_until(lambda: is_empty(arena))
        assert arena.usage().peak <= 4 * MIB
        assert arena.usage().allocated <= 4 * MIB

    def test_no_room_now_is_an_error_that_names_the_holder_and_the_lines(self, arena: Arena) -> None:
        handle = arena.put(bytes(3 * MIB), to=["one"])
        with join(arena.address, "one"):
            with pytest.raises(BudgetFull) as caught:
                arena.put(bytes(2 * MIB), block=False)
            text = str(caught.value)
            assert f"lease {handle.number}" in text
            assert "one (process" in text
            assert text.count("test_arena.py:") == 2
            with pytest.raises(BudgetFull, match=r"after 0\.2 s"):
                arena.put(bytes(2 * MIB), timeout=0.2)
        wait_until(lambda: arena.usage().waiting == 0)

    def test_a_payload_above_the_budget_is_refused_or_travels_alone(self, arena: Arena) -> None:
        with pytest.raises(BudgetFull, match="oversize=True"):
            arena.put(bytes(5 * MIB))
        handle = arena.put(bytes(5 * MIB), oversize=True)
        with pytest.raises(BudgetFull):
            arena.put(bytes(MIB), block=False)
        assert len(handle.get()) == 5 * MIB
        wait_until(lambda: is_empty(arena))
        assert arena.usage().allocated <= 4 * MIB
        assert len(arena.put(bytes(MIB)).get()) == MIB

    def test_a_slow_reader_is_named_with_the_line_of_the_put(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "SLOW", 0.1)
        told: list[tuple[str, Any]] = []
        monkeypatch.setattr(server, "warn_user", lambda text, at: told.append((text, at)))
        held = arena.put(bytes(3 * MIB), to=["slow"])
        with join(arena.address, "slow"):
            with pytest.raises(BudgetFull):
                arena.put(bytes(2 * MIB), timeout=1)
            ((text, (file, line)),) = told
            assert "slow (process" in text
            assert f"lease {held.number}" in text
            assert file == __file__
            assert "arena.put(bytes(2 * MIB), timeout=1)" in Path(file).read_text().splitlines()[line - 1]

    def test_memory_is_used_again(self, arena: Arena) -> None:
        for _ in range(5):
            assert arena.put(LARGE).get() == LARGE
            wait_until(lambda: is_empty(arena))
        assert arena.usage().allocated == 4 * MIB

    def test_a_system_without_memory_fails_the_put_and_nothing_else(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
            with pytest.raises(DevGuardError, match="ulimit"):
                arena.put(LARGE)
        wait_until(lambda: is_empty(arena))
        assert arena.put(LARGE).get() == LARGE

    def test_a_value_that_cannot_be_written_gives_its_room_back(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("devguard.transport.payload.Packed.write", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                arena.put(LARGE)
        wait_until(lambda: is_empty(arena))


class TestAsync:
    def test_put_async_waits_without_blocking_the_loop(self, arena: Arena) -> None:
        async def main() -> bytes:
            first = await arena.put_async(bytes(3 * MIB))
            second = asyncio.create_task(arena.put_async(bytes(3 * MIB)))
            while not arena.usage().waiting:
                await asyncio.sleep(0)
            first.cancel()
            value: bytes = (await second).get()
            return value

        assert len(asyncio.run(main())) == 3 * MIB

    @pytest.mark.parametrize("room", [True, False])
    def test_a_cancelled_await_gives_its_room_back(self, arena: Arena, room: bool) -> None:
        async def main() -> None:
            held = await arena.put_async(bytes(MIB if room else 4 * MIB - 8192))
            task = asyncio.create_task(arena.put_async(bytes(MIB)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            held.cancel()

        asyncio.run(main())
        wait_until(lambda: is_empty(arena) and not arena.usage().waiting)


class TestInterrupts:
    """Ctrl-C at any line of this package; the threads of the arena and of the readers are not interrupted."""

    def test_a_put_that_is_interrupted_gives_its_room_back(self, arena: Arena) -> None:
        kept: list[Handle] = []  # so that the interrupt does not hit a finalizer, which would swallow it
        count = lines(lambda: kept.append(arena.put(LARGE)))
        assert count > 50
        for line in range(1, count + 20):
            kept.clear()
            wait_until(lambda: is_empty(arena) and not arena.usage().waiting)
            interrupted(lambda: kept.append(arena.put(LARGE)), line)
        assert arena.put(LARGE).get() == LARGE

    def test_a_read_that_is_interrupted_leaves_the_lease_or_ends_it(self, arena: Arena) -> None:
        with join(arena.address):
            count = lines(arena.put(LARGE).get)
            assert count > 50
            for line in range(1, count + 20):
                handle = sent(arena.put(LARGE))
                if interrupted(handle.get, line):
                    with contextlib.suppress(HandleReleased):  # the interrupt came after its end
                        assert handle.get() == LARGE
                wait_until(lambda: is_empty(arena))


class TestEnds:
    def test_close_ends_leases_puts_that_wait_and_connections(self, arena: Arena) -> None:
        handle = sent(arena.put(LARGE))
        late = sent(arena.put(SMALL))
        arena.put(bytes(3 * MIB)).__reduce__()
        failed: list[BaseException] = []

        def put() -> None:
            with pytest.raises(DevGuardError, match="closed") as caught:
                arena.put(bytes(3 * MIB))
            failed.append(caught.value)

        thread = threading.Thread(target=put)
        thread.start()
        wait_until(lambda: arena.usage().waiting == 1)
        with handle.view() as seen:
            arena.close()
            arena.close()
            assert seen == LARGE
        thread.join(20)
        assert len(failed) == 1
        for after in (lambda: arena.put(SMALL), late.get):
            with pytest.raises((DevGuardError, PeerGone)):
                after()
        wait_until(lambda: is_empty(arena))

    def test_nothing_is_left_behind(self, peers: Callable[[], Peer]) -> None:
        reader = peers()
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        with Arena("cpu", budget="8MiB") as arena:
            reader.join(arena.address, None)
            for _ in range(5):
                assert reader.get(arena.put(LARGE, to=2)) == LARGE
        reader.kill()
        gc.collect()
        del arena
        assert not [name for name in os.listdir("/dev/shm") if "devguard" in name]  # other programs write there, too
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    def test_an_arena_cannot_be_pickled(self, arena: Arena) -> None:
        with pytest.raises(TypeError, match="send the handles"):
            pickle.dumps(arena)

    def test_only_the_sender_cancels(self, peers: Callable[[], Peer]) -> None:
        sender = peers()
        sender.make_arena(4 * MIB)
        with pytest.raises(DevGuardError, match=r"skip\(\)"):
            sender.put(LARGE, 1).cancel()

    def test_a_forked_child_has_no_arena_but_may_read(self, arena: Arena) -> None:
        handle = arena.put(LARGE, to=2)
        assert sent(handle).get() == LARGE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
            child = multiprocessing.get_context("fork").Process(target=_in_child, args=(arena, handle))
            child.start()
        child.join(30)
        assert child.exitcode == 0
        wait_until(lambda: is_empty(arena))
        assert arena.put(SMALL).get() == SMALL

    def test_two_readers_of_one_process_say_which(self, arena: Arena) -> None:
        with join(arena.address, "one"), join(arena.address, "two"):
            handle = sent(arena.put(LARGE, to=2))
            with pytest.raises(ConfigError, match="one, two"):
                handle.get()
            handle.skip(reader="one"), handle.skip(reader="two")

    def test_a_successor_with_the_same_name_takes_the_place(self, arena: Arena, peers: Callable[[], Peer]) -> None:
        first, second = peers(), peers()
        first.join(arena.address, "tp0")
        handle = arena.put(LARGE, to=["tp0"])
        assert first.hold(sent(handle)) == LARGE
        second.join(arena.address, "tp0")
        wait_until(lambda: is_empty(arena))
        fresh = arena.put(LARGE, to=["tp0"])
        with pytest.raises((PeerGone, HandleReleased)):
            first.get(sent(fresh))
        assert second.get(sent(fresh)) == LARGE

    @pytest.mark.parametrize("kind", [BudgetFull, HandleReleased, PeerGone])
    def test_errors_survive_pickling(self, kind: type[DevGuardError]) -> None:
        error = pickle.loads(pickle.dumps(kind("lease 1")))
        assert type(error) is kind
        assert str(error) == "lease 1"


def _in_child(arena: Arena, handle: Handle) -> None:
    with pytest.raises(DevGuardError, match="belongs to process"):
        arena.put(SMALL)
    assert handle.get() == LARGE
    os._exit(0)
