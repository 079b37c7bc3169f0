"""Readers in one process that connect, end and read at the same time, and the memory that they give back at once."""

from __future__ import annotations

import threading

from devguard.transport import Arena, reading
from tests.helpers.transport_children import await_that, encode, hear, run, say, started


def test_first_reads_of_several_threads_wait_for_one_connection() -> None:
    with Arena("cpu", budget="1MiB") as arena:
        handles = [arena.put(bytes(10 + number)) for number in range(3)]
        sizes: list[int] = []
        threads = [threading.Thread(target=lambda one=one: sizes.append(len(one.get()))) for one in handles]
        with arena._lock:  # the arena does not answer yet
            threads[0].start()
            await_that(lambda: reading._hub.readers.get(arena.address))
            for thread in threads[1:]:
                thread.start()
            threads[2].join(0.2)  # the fault needs a moment to show; nothing depends on it
        for thread in threads:
            thread.join(30)
        assert sorted(sizes) == [10, 11, 12]


def test_a_reader_that_ends_while_its_message_waits_stops_no_other_one() -> None:
    assert (
        run("""
arena, other = transport.Arena(budget=1 << 20), transport.Arena(budget=1 << 20)
reader, hub = transport.join(arena.address), transport.reading._hub
hub._selector.unregister(reader.channel.socket)  # the other thread is in the middle of `forget`
hub.flush_later(reader)
print(len(other.put(b"ten bytes.").get()))
""")
        == "10"
    )


def test_what_was_read_is_given_back_at_once_without_a_collection() -> None:
    with Arena("cpu", budget="8MiB") as arena:
        values = {"array": bytearray(1 << 20), "view": memoryview(bytearray(1 << 18)), "text": b"x" * 1000}
        handles = [arena.put(values, to=2) for _ in range(2)]
        with started("""
gc.disable()
with handles[0].view() as value:
    assert len(value["view"]) == 1 << 18
print(len(handles[1].get()["array"]))
sys.stdin.readline()
del value
await_that(lambda: not transport.reading._hub.readers)
await_that(lambda: not maps())
print("all")
""", *map(encode, handles)) as reader:  # fmt: skip
            assert hear(reader) == str(1 << 20)
            arena.close()
            say(reader)
            assert hear(reader) == "all"


def test_a_forked_child_reads_on_its_own_and_its_parent_goes_on() -> None:
    with Arena("cpu", budget="8MiB") as arena:
        shared, own = arena.put(bytes(1 << 20), to=2), arena.put(bytes(1 << 20))
        assert run("""
with handles[1].view() as value:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        assert len(handles[0].get()) == len(value) == 1 << 20
        os._exit(0)
    status = os.waitpid(child, 0)[1]
print(status, len(handles[0].get()))
""", encode(shared), encode(own)) == f"0 {1 << 20}"  # fmt: skip
        await_that(lambda: not arena.usage().leases)
